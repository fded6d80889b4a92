"""Rules of events: a tenant reads those of its own jobs."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.orm import Session

from app.events import repository
from app.events.models import Event
from app.jobs import service as jobs


def list_events(
    session: Session, tenant_id: str, job_id: str, *, after: int, limit: int
) -> tuple[Sequence[Event], bool]:
    """Events of a job with a number above ``after``, oldest first, and whether there are more."""
    jobs.get(session, tenant_id, job_id)
    page = repository.list_after(session, job_id, after, limit + 1)
    return page[:limit], len(page) > limit
