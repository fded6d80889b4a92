"""All SQL of the life of a lease: claim, beat, progress, end, requeue, reap.

Every write names the fence that it was claimed under and the statuses that it may change, so that a worker whose
lease was taken away changes nothing. Time is the database's clock alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, case, func, insert, or_, select, update
from sqlalchemy.orm import Session

from app.artifacts.models import Artifact
from app.attempts.models import Attempt
from app.jobs.models import ENDED, Job

LIVE = ("running", "pausing", "cancelling")  # statuses in which a worker holds the job


@dataclass(frozen=True)
class ClaimedJob:
    """The columns of a job that its worker needs."""

    job_id: str
    tenant_id: str
    fence: int
    attempt: int
    model_id: str
    requested_revision: str | None
    revision: str | None
    recipe: dict[str, Any]
    constraints: dict[str, Any]
    timeout_seconds: int
    warnings: list[dict[str, Any]]


@dataclass(frozen=True)
class HeldJob:
    """A job whose row this transaction has locked."""

    job_id: str
    fence: int
    status: str
    stages: list[dict[str, Any]]
    warnings: list[dict[str, Any]]
    num_infrastructure_failures: int
    num_crashes: int


def _claimable() -> ColumnElement[bool]:
    return and_(Job.status == "queued", or_(Job.not_before.is_(None), Job.not_before <= func.now()))


def _held(job_id: str, fence: int) -> ColumnElement[bool]:
    return and_(Job.id == job_id, Job.fence == fence, Job.status.in_(LIVE))


_HELD_COLUMNS = (
    Job.id,
    Job.fence,
    Job.status,
    Job.stages,
    Job.warnings,
    Job.num_infrastructure_failures,
    Job.num_crashes,
)


def claim_next(session: Session, queue: str, lease_seconds: float) -> ClaimedJob | None:
    """Take the best waiting job of ``queue``: highest priority, then oldest."""
    best = (
        select(Job.id)
        .where(Job.queue == queue, _claimable())
        .order_by(Job.priority.desc(), Job.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .cte("best")
    )
    row = session.execute(
        update(Job)
        .where(Job.id == best.c.id, Job.status == "queued")
        .values(
            status="running",
            fence=Job.fence + 1,
            attempt=Job.attempt + 1,
            not_before=None,
            started_at=func.coalesce(Job.started_at, func.now()),
            heartbeat_at=func.now(),
            lease_expires_at=func.now() + timedelta(seconds=lease_seconds),
            progress={},
        )
        .returning(
            Job.id,
            Job.tenant_id,
            Job.fence,
            Job.attempt,
            Job.model_id,
            Job.requested_revision,
            Job.revision,
            Job.recipe,
            Job.constraints,
            Job.timeout_seconds,
            Job.warnings,
        )
        .execution_options(synchronize_session=False)
    ).one_or_none()
    return None if row is None else ClaimedJob(*row)


def insert_attempt(session: Session, job: ClaimedJob, worker: str) -> None:
    """Record that ``worker`` has begun to try ``job``."""
    session.execute(
        insert(Attempt).values(job_id=job.job_id, fence=job.fence, number=job.attempt, worker=worker),
    )


def extend_lease(session: Session, job_id: str, fence: int, lease_seconds: float) -> str | None:
    """Renew the lease; the job's status, or None when it is no longer held under ``fence``."""
    return session.execute(
        update(Job)
        .where(_held(job_id, fence))
        .values(heartbeat_at=func.now(), lease_expires_at=func.now() + timedelta(seconds=lease_seconds))
        .returning(Job.status)
        .execution_options(synchronize_session=False)
    ).scalar_one_or_none()


def held_status(session: Session, job_id: str, fence: int) -> str | None:
    """The job's status, or None when it is no longer held under ``fence``. Locks nothing."""
    return session.execute(select(Job.status).where(_held(job_id, fence))).scalar_one_or_none()


def lock_held(session: Session, job_id: str, fence: int) -> HeldJob | None:
    """Lock the row of a job that is held under ``fence``."""
    row = session.execute(select(*_HELD_COLUMNS).where(_held(job_id, fence)).with_for_update()).one_or_none()
    return None if row is None else HeldJob(*row)


def lock_expired(session: Session, limit: int) -> list[HeldJob]:
    """Lock held jobs whose lease has run out, longest first; rows that someone is writing are left for later."""
    rows = session.execute(
        select(*_HELD_COLUMNS)
        .where(Job.status.in_(LIVE), Job.lease_expires_at < func.now())
        .order_by(Job.lease_expires_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return [HeldJob(*row) for row in rows]


def update_held(session: Session, job_id: str, fence: int, values: Mapping[str, Any]) -> str | None:
    """Set columns of a job that is held under ``fence``; its status, or None when it is not held."""
    return session.execute(
        update(Job)
        .where(_held(job_id, fence))
        .values(dict(values))
        .returning(Job.status)
        .execution_options(synchronize_session=False)
    ).scalar_one_or_none()


def end_lease(session: Session, job: HeldJob, status: str, values: Mapping[str, Any]) -> None:
    """Move a job that this transaction has locked out of its worker's hands, into ``status``."""
    changed = update_held(session, job.job_id, job.fence, {"status": status, "lease_expires_at": None, **values})
    assert changed == status, "the row was locked by this transaction"


def end_attempt(
    session: Session,
    job_id: str,
    fence: int,
    outcome: str,
    *,
    error: dict[str, Any] | None = None,
    exit_signal: int | None = None,
    peak_memory_bytes: int | None = None,
) -> None:
    """Record how an attempt ended, if that is not recorded yet."""
    session.execute(
        update(Attempt)
        .where(Attempt.job_id == job_id, Attempt.fence == fence, Attempt.outcome.is_(None))
        .values(
            outcome=outcome,
            error=error,
            exit_signal=exit_signal,
            peak_memory_bytes=peak_memory_bytes,
            ended_at=func.now(),
        )
        .execution_options(synchronize_session=False)
    )


def attempt_outcome(session: Session, job_id: str, fence: int) -> str | None:
    """How the attempt under ``fence`` ended, if it has."""
    return session.execute(
        select(Attempt.outcome).where(Attempt.job_id == job_id, Attempt.fence == fence)
    ).scalar_one_or_none()


def request_cancel(session: Session, tenant_id: str, job_id: str) -> tuple[str, str] | None:
    """Cancel a waiting job, or ask the worker of a held one to.

    Returns the status before and after; None when the tenant has no such job. An ended job keeps its status.
    """
    before = session.execute(
        select(Job.status).where(Job.id == job_id, Job.tenant_id == tenant_id).with_for_update()
    ).scalar_one_or_none()
    if before is None:
        return None
    after = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.status.in_(("queued", "paused", "running", "pausing")))
        .values(
            status=case((Job.status.in_(("queued", "paused")), "cancelled"), else_="cancelling"),
            finished_at=case((Job.status.in_(("queued", "paused")), func.now()), else_=None),
        )
        .returning(Job.status)
        .execution_options(synchronize_session=False)
    ).scalar_one_or_none()
    return before, after or before


def count_claimable(session: Session) -> dict[str, int]:
    """How many jobs could be claimed now, by queue."""
    rows = session.execute(select(Job.queue, func.count()).where(_claimable()).group_by(Job.queue))
    return {queue: count for queue, count in rows}  # noqa: C416 — a Row is not typed as a pair


def not_ended(session: Session, job_ids: Sequence[str]) -> set[str]:
    """Those of the jobs that have not ended."""
    return set(session.scalars(select(Job.id).where(Job.id.in_(job_ids), Job.status.not_in(ENDED))))


def unnamed_fences(session: Session, job_id: str, up_to: int) -> list[int]:
    """Fences of attempts whose files in storage, if there are any, belong to no artifact."""
    named = select(Artifact.fence).where(Artifact.job_id == job_id)
    query = select(Attempt.fence).where(Attempt.job_id == job_id, Attempt.fence <= up_to, Attempt.fence.not_in(named))
    return list(session.scalars(query))
