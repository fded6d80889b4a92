"""``/v1/jobs/{id}/events``."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict

from app.auth import CurrentPrincipal
from app.dependencies import AppParts
from app.errors import responses
from app.events import service

router = APIRouter(prefix="/v1/jobs/{job_id}/events", tags=["jobs"], responses=responses(401))


class EventView(BaseModel):
    """Something that happened to a job; ids grow by one."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": 1,
                    "object": "event",
                    "type": "job.queued",
                    "data": {"queue": "cpu"},
                    "created_at": "2026-11-22T09:29:20Z",
                }
            ]
        }
    )

    id: int
    object: Literal["event"]
    type: str
    data: dict[str, Any]
    created_at: datetime


class EventList(BaseModel):
    """Events, oldest first."""

    object: Literal["list"]
    data: list[EventView]
    first_id: int | None
    last_id: int | None
    has_more: bool


@router.get("", summary="List a job's events", responses=responses(404, 422))
def list_events(
    job_id: str,
    principal: CurrentPrincipal,
    parts: AppParts,
    after: Annotated[int, Query(ge=0, le=2**31 - 1, description="Only events with a larger id.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> EventList:
    """What happened to the job, in order."""
    with parts.database.transaction() as session:
        page, has_more = service.list_events(session, principal.tenant_id, job_id, after=after, limit=limit)
    data = [
        EventView(id=event.sequence, object="event", type=event.type, data=event.data, created_at=event.created_at)
        for event in page
    ]
    return EventList(
        object="list",
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=has_more,
    )
