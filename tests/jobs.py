"""Rows of jobs as a submission leaves them, and what became of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import select, update
from ulid import ULID

from app.attempts.models import Attempt
from app.database import Database
from app.events import repository as events
from app.events.models import Event
from app.jobs.models import ENDED, Job

RECIPE = {
    "version": 1,
    "stages": [{"technique": "magnitude", "sparsity": 0.5}, {"technique": "round_to_nearest", "scheme": "W8A16"}],
}


def insert_job(database: Database, *, model_id: str = "fake/normal", queue: str = "cpu", **columns: Any) -> str:
    """Queue a job, past the API and its checks."""
    job_id = f"job_{ULID()}"
    values = {"tenant_id": "default", "recipe": RECIPE, "recipe_version": 1, "timeout_seconds": 600, **columns}
    with database.transaction() as session:
        session.add(Job(id=job_id, model_id=model_id, queue=queue, **values))
        session.flush()
        events.append(session, job_id, "job.queued")
    return job_id


def read_job(database: Database, job_id: str) -> Job:
    """The row of a job."""
    with database.transaction() as session:
        return session.get_one(Job, job_id)


def read_attempts(database: Database, job_id: str) -> list[Attempt]:
    """The attempts at a job, first to last."""
    with database.transaction() as session:
        return list(session.scalars(select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.fence)))


def read_events(database: Database, job_id: str) -> list[Event]:
    """The events of a job, first to last."""
    with database.transaction() as session:
        return list(session.scalars(select(Event).where(Event.job_id == job_id).order_by(Event.sequence)))


def wait_until(condition: Callable[[], Any], timeout_seconds: float = 30) -> Any:
    """The first true answer of ``condition``."""
    deadline = time.monotonic() + timeout_seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return answer


def abandon_jobs(database: Database) -> None:
    """End what other tests left."""
    with database.transaction() as session:
        session.execute(update(Job).where(Job.status.not_in(ENDED)).values(status="cancelled", lease_expires_at=None))
