"""SQL of jobs and of idempotent submissions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, and_, bindparam, case, func, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session, aliased, defer

from app.jobs.models import IdempotencyKey, Job


@dataclass(frozen=True)
class ShownJob:
    """A job with what answers show of it; ``job.recipe``, ``shown_recipe`` and ``report`` are not loaded."""

    job: Job
    recipe: dict[str, Any]
    queue_position: int | None


def _shown_jobs() -> Select[Any]:
    """Jobs without their large columns, each with its place in its queue."""
    other = aliased(Job)
    num_up_to_here = (
        select(func.count())
        .where(
            other.status == "queued",
            other.queue == Job.queue,
            or_(other.priority > Job.priority, and_(other.priority == Job.priority, other.id <= Job.id)),
        )
        .scalar_subquery()
    )
    return select(
        Job,
        func.coalesce(Job.shown_recipe, Job.recipe),
        case((Job.status == "queued", num_up_to_here)),
    ).options(defer(Job.recipe), defer(Job.shown_recipe), defer(Job.report))


# Built once: building a statement, and its key in SQLAlchemy's cache, takes longer than running it.
_SHOWN_JOBS = _shown_jobs()
_FIND = _SHOWN_JOBS.where(Job.id == bindparam("job_id"), Job.tenant_id == bindparam("tenant_id"))


def find(session: Session, tenant_id: str, job_id: str) -> ShownJob | None:
    """One of the tenant's jobs."""
    row = session.execute(_FIND, {"job_id": job_id, "tenant_id": tenant_id}).one_or_none()
    return ShownJob(*row) if row is not None else None


def list_newest(
    session: Session, tenant_id: str, *, after: str | None, status: str | None, model_id: str | None, limit: int
) -> Sequence[ShownJob]:
    """The tenant's jobs, newest first, from the one older than ``after`` on."""
    query = _SHOWN_JOBS.where(Job.tenant_id == tenant_id).order_by(Job.id.desc()).limit(limit)
    if after is not None:
        query = query.where(Job.id < after)
    if status is not None:
        query = query.where(Job.status == status)
    if model_id is not None:
        query = query.where(Job.model_id == model_id)
    return [ShownJob(*row) for row in session.execute(query)]


def find_report(session: Session, tenant_id: str, job_id: str) -> tuple[str, dict[str, Any] | None] | None:
    """Status and report of one of the tenant's jobs."""
    row = session.execute(
        select(Job.status, Job.report).where(Job.id == job_id, Job.tenant_id == tenant_id)
    ).one_or_none()
    return (row[0], row[1]) if row is not None else None


def insert_job(session: Session, job: Job) -> None:
    """Store a new job."""
    session.add(job)
    session.flush()


def claim_idempotency_key(session: Session, tenant_id: str, key: str, body_sha256: str, job_id: str) -> bool:
    """Bind a key to a job; False when it is bound already. Waits for a transaction that is binding it now."""
    bound = session.execute(
        insert(IdempotencyKey)
        .values(tenant_id=tenant_id, key=key, body_sha256=body_sha256, job_id=job_id)
        .on_conflict_do_nothing()
        .returning(IdempotencyKey.job_id)
    )
    return bound.scalar_one_or_none() is not None


def find_idempotency_key(session: Session, tenant_id: str, key: str) -> IdempotencyKey | None:
    """What a key is bound to."""
    return session.get(IdempotencyKey, (tenant_id, key))
