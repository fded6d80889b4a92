"""From an API key to the principal that it stands for."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.orm import Session

from app.dependencies import AppParts
from app.errors import UnauthorizedError
from app.keys import service as keys


@dataclass(frozen=True)
class Principal:
    """Who asks. Everything that a request reads or writes belongs to this tenant."""

    tenant_id: str
    key_id: str
    scopes: frozenset[str]


_bearer = HTTPBearer(auto_error=False, description="An API key, made by `attar keys create NAME`.")


BearerCredentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def authenticate(session: Session, credentials: HTTPAuthorizationCredentials | None) -> Principal:
    """Whoever the key stands for; raises UnauthorizedError without a key that is valid now."""
    if credentials is None:
        raise UnauthorizedError(
            "missing_api_key",
            "The request has no API key.",
            hint="Send `Authorization: Bearer KEY`; `attar keys create NAME` makes a key.",
            headers={"WWW-Authenticate": "Bearer"},
        )
    key = keys.authenticate(session, credentials.credentials)
    return Principal(key.tenant_id, key.id, frozenset(key.scopes))


def _principal(parts: AppParts, credentials: BearerCredentials) -> Principal:
    return parts.database.read(lambda session: authenticate(session, credentials))


CurrentPrincipal = Annotated[Principal, Depends(_principal)]


class KeyBeforeBody(APIRoute):
    """A route that reads no body of those without a key.

    The framework parses a body on the event loop, which a hostile one holds for seconds, and before any dependency.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's handler behind the question for the key."""
        handle = super().get_route_handler()

        async def handle_with_key(request: Request) -> Response:
            await run_in_threadpool(_principal, request.app.state.parts, await _bearer(request))
            return await handle(request)

        return handle_with_key
