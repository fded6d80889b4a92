"""``/healthz`` and ``/readyz``, which need no key."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel

from app.dependencies import AppParts
from app.errors import problem, responses
from app.health import service

router = APIRouter(tags=["health"])


class HealthView(BaseModel):
    """The process answers."""

    status: Literal["ok"]


class ReadinessView(BaseModel):
    """Everything that requests need answers."""

    status: Literal["ready"]


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> HealthView:
    """Always `ok`: whoever is asked can answer."""
    return HealthView(status="ok")


@router.head("/readyz", include_in_schema=False, response_model=None)
@router.get("/readyz", summary="Can it serve?", response_model=ReadinessView, responses=responses(503))
def readyz(parts: AppParts) -> ReadinessView | Response:
    """Asks the database, Redis and the storage."""
    failures = service.failures(parts)
    if not failures:
        return ReadinessView(status="ready")
    detail = "; ".join(f"{name} {what}" for name, what in failures.items()) + "."
    return problem(503, "not_ready", detail, headers={"Retry-After": "5"})
