"""What endpoints are given: the parts that the app was built with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from anyio import CapacityLimiter
from fastapi import Depends, Request

from app.database import Database
from app.settings import Settings
from app.storage import Storage


@dataclass(frozen=True)
class Parts:
    """Made once, when the app starts."""

    settings: Settings
    database: Database
    storage: Storage
    # Threads that submissions have of their own: each may wait for a slow hub, and everybody else must not.
    submitting: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(16))


async def _parts(request: Request) -> Parts:  # async, so that no thread is needed for it
    parts = request.app.state.parts
    assert isinstance(parts, Parts)
    return parts


AppParts = Annotated[Parts, Depends(_parts)]
