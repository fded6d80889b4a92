"""What endpoints are given: the parts that the app was built with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, Request

from app.database import Database
from app.settings import Settings
from app.storage import Storage

T = TypeVar("T")


class HubThreads:
    """Threads for submissions that ask a hub: each may wait for long, and no other must. A tenant has few of them."""

    def __init__(self, total: int = 16, each: int = 4) -> None:
        self._all = CapacityLimiter(total)
        self._of_tenant: dict[str, CapacityLimiter] = {}
        self._each = each

    async def run(self, tenant_id: str, work: Callable[[], T]) -> T:
        """What ``work`` returns, when it is the tenant's turn."""
        own = self._of_tenant.setdefault(tenant_id, CapacityLimiter(self._each))
        async with own:
            return await to_thread.run_sync(work, limiter=self._all)


@dataclass(frozen=True)
class Parts:
    """Made once, when the app starts."""

    settings: Settings
    database: Database
    storage: Storage
    hub_threads: HubThreads = field(default_factory=HubThreads)


async def _parts(request: Request) -> Parts:  # async, so that no thread is needed for it
    parts = request.app.state.parts
    assert isinstance(parts, Parts)
    return parts


AppParts = Annotated[Parts, Depends(_parts)]
