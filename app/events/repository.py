"""SQL of events."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, insert, literal, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from app.events.models import Event


def append(session: Session, job_id: str, event_type: str, data: dict[str, Any] | None = None) -> None:
    """Add the next event of a job.

    The caller holds the lock on the job's row, or has just inserted it: that is what keeps the numbers
    without gap and without repeat.
    """
    following = select(
        literal(job_id),
        func.coalesce(func.max(Event.sequence), 0) + 1,
        literal(event_type),
        literal(data or {}, JSONB),
    ).where(Event.job_id == job_id)
    session.execute(insert(Event).from_select(["job_id", "sequence", "type", "data"], following))


def list_after(session: Session, job_id: str, after: int, limit: int) -> list[Event]:
    """Events of a job with a number above ``after``, oldest first."""
    query = select(Event).where(Event.job_id == job_id, Event.sequence > after).order_by(Event.sequence).limit(limit)
    return list(session.scalars(query))
