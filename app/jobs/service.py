"""Rules of jobs: submit once, read one's own, cancel."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session
from ulid import ULID

from app import queue
from app.attempts import service as attempts
from app.database import Database
from app.errors import InvalidRequestError, JobNotFoundError, NotFoundError
from app.events import repository as events
from app.jobs import preflight, repository
from app.jobs.models import JOB_ID, Job
from app.jobs.repository import ShownJob
from app.jobs.schemas import JobSubmission
from app.jobs.warnings import warnings_of
from app.settings import Settings
from app.storage import Storage
from workers.sources.facts import ModelFacts

logger = logging.getLogger(__name__)

_SHOWN_TEXT_CHARACTERS = 2_000


@dataclass(frozen=True)
class Idempotency:
    """A caller's promise that two submissions with this key are one."""

    key: str
    body_sha256: str


class _KeyTakenError(Exception):
    """Another request bound the same Idempotency-Key first."""


class JobService:
    """Submissions; what it is given lives as long as the app."""

    def __init__(self, settings: Settings, database: Database, storage: Storage) -> None:
        self._settings = settings
        self._database = database
        self._storage = storage

    def submit(
        self, tenant_id: str, submission: JobSubmission, idempotency: Idempotency | None = None
    ) -> tuple[ShownJob, bool]:
        """The job that runs ``submission``, and whether an earlier request made it.

        Raises ServiceError where the submission cannot be run; then nothing is stored.
        """
        if idempotency is not None:
            with self._database.transaction() as session:
                earlier = _replayed(session, tenant_id, idempotency)
            if earlier is not None:
                return earlier, True
        facts = preflight.check(
            submission,
            tenant_id=tenant_id,
            settings=self._settings,
            database=self._database,
            storage=self._storage,
        )
        job = new_job(tenant_id, submission, facts, self._settings)
        job_id, queue_name = job.id, job.queue
        has_worker = queue.has_worker(queue_name)
        if has_worker is False:
            job.warnings = [*job.warnings, _no_worker(queue_name)]
        try:
            with self._database.transaction() as session:
                _store(session, job, idempotency)
                shown = get(session, tenant_id, job_id)
        except _KeyTakenError:
            assert idempotency is not None
            with self._database.transaction() as session:
                winner = _replayed(session, tenant_id, idempotency)
            assert winner is not None, "the key was bound by a transaction that has committed"
            return winner, True
        logger.info("queued", extra={"job_id": job_id, "tenant_id": tenant_id, "model": submission.model.id})
        if has_worker is not None:  # a broker that hangs is waited for once; the dispatcher wakes later
            queue.wake(queue_name)
        return shown, False


def get(session: Session, tenant_id: str, job_id: str) -> ShownJob:
    """One of the tenant's jobs; raises NotFoundError ``job_not_found``."""
    found = repository.find(session, tenant_id, job_id) if JOB_ID.fullmatch(job_id) else None
    if found is None:
        raise JobNotFoundError(job_id)
    return found


def list_jobs(
    session: Session, tenant_id: str, *, after: str | None, status: str | None, model_id: str | None, limit: int
) -> tuple[Sequence[ShownJob], bool]:
    """A page of the tenant's jobs, newest first, and whether there are more."""
    page = repository.list_newest(session, tenant_id, after=after, status=status, model_id=model_id, limit=limit + 1)
    return page[:limit], len(page) > limit


def get_report(session: Session, tenant_id: str, job_id: str) -> dict[str, Any]:
    """What was measured; raises NotFoundError while there is nothing yet."""
    found = repository.find_report(session, tenant_id, job_id) if JOB_ID.fullmatch(job_id) else None
    if found is None:
        raise JobNotFoundError(job_id)
    status, report = found
    if report is None:
        raise NotFoundError(
            "report_not_found",
            f"Job {job_id} is {status} and has no report.",
            hint="A job has a report once its result has been measured.",
        )
    return report


def cancel(session: Session, tenant_id: str, job_id: str) -> ShownJob:
    """Cancel a job that waits, or ask the worker of one that runs to stop; raises JobConflictError for an ended one."""
    status = attempts.request_cancel(session, tenant_id, job_id) if JOB_ID.fullmatch(job_id) else None
    if status is None:
        raise JobNotFoundError(job_id)
    logger.info("cancel requested", extra={"job_id": job_id, "status": status})
    return get(session, tenant_id, job_id)


def new_job(tenant_id: str, submission: JobSubmission, facts: ModelFacts, settings: Settings) -> Job:
    """The row of a job that is about to be queued."""
    recipe = submission.recipe.model_dump(mode="json")
    shown_recipe = _abridged(recipe)
    return Job(
        id=f"job_{ULID()}",
        tenant_id=tenant_id,
        model_id=submission.model.id,
        requested_revision=submission.model.revision,
        revision=facts.revision,
        recipe=recipe,
        shown_recipe=None if shown_recipe == recipe else shown_recipe,
        recipe_version=submission.recipe.version,
        constraints=submission.constraints.model_dump(mode="json", exclude_none=True),
        queue=submission.queue or settings.queue,
        priority=submission.priority,
        timeout_seconds=submission.timeout_seconds,
        metadata_=submission.metadata,
        warnings=warnings_of(submission, facts, settings.memory_limit_bytes),
        stages=[
            {"index": index, "technique": stage.technique, "status": "pending", "metrics": {}}
            for index, stage in enumerate(submission.recipe.stages)
        ],
    )


def _no_worker(queue_name: str) -> dict[str, Any]:
    """Until the job is claimed: whoever reads it wonders why it waits."""
    message = (
        f"No worker of the queue {queue_name!r} was heard of within the last minute: the job waits until one is there. "
        f"`attar worker --queue {queue_name}` is one."
    )
    return {"code": attempts.NO_WORKER, "message": message, "param": "queue"}


def _store(session: Session, job: Job, idempotency: Idempotency | None) -> None:
    repository.insert_job(session, job)
    if idempotency is not None and not repository.claim_idempotency_key(
        session, job.tenant_id, idempotency.key, idempotency.body_sha256, job.id
    ):
        raise _KeyTakenError
    events.append(session, job.id, "job.queued", {"queue": job.queue})
    # What follows reads the row as the database filled it in.
    session.expunge(job)


def _replayed(session: Session, tenant_id: str, idempotency: Idempotency) -> ShownJob | None:
    """The job that an earlier request with this key made; raises InvalidRequestError when its body was another."""
    bound = repository.find_idempotency_key(session, tenant_id, idempotency.key)
    if bound is None:
        return None
    if bound.body_sha256 != idempotency.body_sha256:
        raise InvalidRequestError(
            "idempotency_key_reused",
            "This Idempotency-Key came with another body before.",
            param="Idempotency-Key",
            hint="Use a new key for a new job.",
        )
    return get(session, tenant_id, bound.job_id)


def _abridged(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with long inline texts cut: their first, its beginning, and how many there are."""
    shown = dict(recipe)
    for name in ("calibration", "training", "evaluation"):
        dataset = (recipe[name] or {}).get("dataset")
        if isinstance(dataset, dict) and len(json.dumps(dataset)) > _SHOWN_TEXT_CHARACTERS:
            texts = dataset["texts"]
            cut = {"texts": [texts[0][:200] + "…"], "num_texts": len(texts), "labels": None}
            shown[name] = {**recipe[name], "dataset": cut}
    return shown
