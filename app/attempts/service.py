"""The life of an attempt: claim, beat, report, end, release, reap. What workers and the dispatcher call.

Each function runs inside the caller's transaction and may be called again after a lost connection: an attempt that
has ended stays ended, and the same answer is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Literal, cast

from sqlalchemy import func
from sqlalchemy.orm import Session

from app.artifacts import service as artifacts
from app.attempts import repository
from app.attempts.repository import ClaimedJob as Claim
from app.attempts.repository import HeldJob
from app.errors import JobConflictError
from app.events import repository as events
from app.jobs.models import ENDED
from workers.errors import Blame, InfrastructureError, JobError

__all__ = ["Claim", "FailureDetails", "JobEvent", "Reaped"]

HeldStatus = Literal["running", "cancelling", "pausing"]
# How an attempt ended. `retried` and `released` put the job back into its queue; `lost` is a lease that was taken away.
Outcome = Literal["succeeded", "failed", "cancelled", "retried", "released", "lost"]

MAX_RETRIES: Mapping[Blame, int] = {"infrastructure": 5, "crash": 2, "user": 0}
NO_WORKER = "no_worker"  # the code of a warning that holds until a worker claims the job
_MAX_BACKOFF_SECONDS = 60
_REAP_BATCH = 100


@dataclass(frozen=True)
class JobEvent:
    """Something to append to a job's events."""

    type: str
    data: dict[str, Any]


@dataclass(frozen=True)
class FailureDetails:
    """What the attempt's row keeps of a dead process."""

    exit_signal: int | None = None
    peak_memory_bytes: int | None = None
    log_tail: str | None = None


@dataclass(frozen=True)
class Reaped:
    """A job whose lease had run out, and where it went."""

    job_id: str
    fence: int
    status: str


def claim(session: Session, queue: str, worker: str, lease_seconds: float) -> Claim | None:
    """Take the best waiting job of ``queue`` under a new fence; None when none waits."""
    job = repository.claim_next(session, queue, lease_seconds)
    if job is None:
        return None
    stages = [
        {"index": index, "technique": stage["technique"], "status": "pending", "metrics": {}}
        for index, stage in enumerate(job.recipe["stages"])
    ]
    warnings = [warning for warning in job.warnings if warning["code"] != NO_WORKER]
    repository.update_held(session, job.job_id, job.fence, {"stages": stages, "warnings": warnings})
    repository.insert_attempt(session, job, worker)
    events.append(session, job.job_id, "job.running", {"attempt": job.attempt})
    return job


def beat(session: Session, job_id: str, fence: int, lease_seconds: float) -> HeldStatus | None:
    """Renew the lease; None when it was lost."""
    return cast("HeldStatus | None", repository.extend_lease(session, job_id, fence, lease_seconds))


def held_status(session: Session, job_id: str, fence: int) -> HeldStatus | None:
    """The status of a held job, without a write; None when the lease was lost."""
    return cast("HeldStatus | None", repository.held_status(session, job_id, fence))


def report_progress(
    session: Session,
    job_id: str,
    fence: int,
    progress: dict[str, Any],
    stages: list[dict[str, Any]],
    revision: str | None = None,
    warnings: Sequence[dict[str, Any]] = (),
    new_events: Sequence[JobEvent] = (),
) -> HeldStatus | None:
    """Show how far the attempt is; None, and nothing written, when the lease was lost."""
    values: dict[str, Any] = {"progress": progress, "stages": stages}
    if revision is not None:
        values["revision"] = revision
    if warnings:
        held = repository.lock_held(session, job_id, fence)
        known = held.warnings if held else []
        # An earlier attempt may have warned of the same thing.
        values["warnings"] = known + [warning for warning in warnings if warning not in known]
    status = repository.update_held(session, job_id, fence, values)
    if status is not None:
        for event in new_events:
            events.append(session, job_id, event.type, event.data)
    return cast("HeldStatus | None", status)


def finish(
    session: Session,
    claim: Claim,
    status: Literal["succeeded", "failed", "cancelled"],
    *,
    result: dict[str, Any] | None = None,
    report: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
    published: artifacts.PublishedArtifact | None = None,
    details: FailureDetails | None = None,
) -> Outcome:
    """End the job: the one moment of truth.

    Returns the outcome that holds, which is not ``status`` when the job was being cancelled (then nothing is
    published), or when the lease was lost. The caller discards what it stored unless the outcome is ``status``.
    """
    held = repository.lock_held(session, claim.job_id, claim.fence)
    if held is None:
        return _settled_outcome(session, claim)
    if held.status == "cancelling" or status == "cancelled":
        return _end(session, held, "cancelled", details=details)
    values: dict[str, Any] = {"result": result, "report": report}
    if status == "succeeded":
        values["progress"] = {"fraction": 1.0, "stage": None, "step": None, "eta_seconds": 0}
    if published is not None:
        artifacts.record(session, published, job_id=claim.job_id, fence=claim.fence)
    return _end(session, held, status, error=error, details=details, values=values)


def fail_attempt(session: Session, claim: Claim, error: JobError, details: FailureDetails | None = None) -> Outcome:
    """Put the job back into its queue when trying again may help, else end it ``failed``."""
    held = repository.lock_held(session, claim.job_id, claim.fence)
    if held is None:
        return _settled_outcome(session, claim)
    if held.status == "cancelling":
        return _end(session, held, "cancelled", details=details)
    num_failures = _num_failures(held, error.blame)
    if num_failures >= MAX_RETRIES[error.blame]:
        return _end(session, held, "failed", error=error_json(error), details=details)
    delay_seconds = min(2 ** (num_failures + 1), _MAX_BACKOFF_SECONDS)
    data = {"error": error_json(error), "delay_seconds": delay_seconds}
    _requeue(session, held, error.blame, delay_seconds, JobEvent("job.retrying", data))
    _end_attempt(session, held, "retried", error=error_json(error), details=details)
    return "retried"


def release(session: Session, claim: Claim) -> Outcome:
    """Give the job back because its worker stops; no failure is counted."""
    held = repository.lock_held(session, claim.job_id, claim.fence)
    if held is None:
        return _settled_outcome(session, claim)
    if held.status == "cancelling":
        return _end(session, held, "cancelled")
    _requeue(session, held, None, 0, JobEvent("job.queued", {"reason": "worker_stopped"}))
    _end_attempt(session, held, "released")
    return "released"


def request_cancel(session: Session, tenant_id: str, job_id: str) -> str | None:
    """Cancel a waiting job at once, or have the worker of a running one stop it; the status after the request.

    None when the tenant has no such job. Asking again while it is being cancelled is fine; an ended job raises
    JobConflictError.
    """
    statuses = repository.request_cancel(session, tenant_id, job_id)
    if statuses is None:
        return None
    before, after = statuses
    if before in ENDED:
        raise JobConflictError(job_id, before, "be cancelled")
    if before != after:
        events.append(session, job_id, f"job.{after}")
    return after


def reap(session: Session) -> list[Reaped]:
    """Take jobs away from workers that no longer beat; their fences are outdated at once."""
    expired = repository.lock_expired(session, _REAP_BATCH)
    return [Reaped(held.job_id, held.fence, _reap_one(session, held)) for held in expired]


def count_claimable(session: Session) -> dict[str, int]:
    """How many jobs could be claimed now, by queue."""
    return repository.count_claimable(session)


def not_ended(session: Session, job_ids: Sequence[str]) -> set[str]:
    """Those of the jobs that wait or run."""
    return repository.not_ended(session, job_ids)


def unnamed_fences(session: Session, claim: Claim) -> list[int]:
    """Fences, of this attempt and of earlier ones, under which storage may hold files that belong to no artifact."""
    return repository.unnamed_fences(session, claim.job_id, claim.fence)


def error_json(error: JobError) -> dict[str, Any]:
    """The error as the API shows it."""
    return {
        "code": error.code,
        "message": error.message,
        "param": error.param,
        "hint": error.hint,
        "retryable": error.blame != "user",
    }


def _reap_one(session: Session, held: HeldJob) -> str:
    lost = InfrastructureError(
        "worker_lost",
        "The worker that ran the job stopped answering.",
        hint="Look for a killed worker or a machine out of memory, then submit the job again.",
    )
    _end_attempt(session, held, "lost", error=error_json(lost))
    outdated = {"fence": held.fence + 1}
    if held.status == "cancelling":
        return _settle_job(session, held, "cancelled", values=outdated)
    if _num_failures(held, "infrastructure") >= MAX_RETRIES["infrastructure"]:
        return _settle_job(session, held, "failed", error=error_json(lost), values=outdated)
    data = {"error": error_json(lost), "delay_seconds": 0}
    return _requeue(session, held, "infrastructure", 0, JobEvent("job.retrying", data), fence=held.fence + 1)


def _num_failures(held: HeldJob, blame: Blame) -> int:
    return {"infrastructure": held.num_infrastructure_failures, "crash": held.num_crashes, "user": 0}[blame]


def _requeue(
    session: Session, held: HeldJob, blame: Blame | None, delay_seconds: float, event: JobEvent, *, fence: int = 0
) -> str:
    """Back into the queue, or to rest when a pause was asked for meanwhile."""
    values: dict[str, Any] = {
        "fence": max(held.fence, fence),
        "not_before": func.now() + timedelta(seconds=delay_seconds),
        "stages": _stopped(held.stages, "pending"),
    }
    if blame == "infrastructure":
        values["num_infrastructure_failures"] = held.num_infrastructure_failures + 1
    if blame == "crash":
        values["num_crashes"] = held.num_crashes + 1
    events.append(session, held.job_id, event.type, event.data)
    if held.status == "pausing":
        repository.end_lease(session, held, "paused", values)
        events.append(session, held.job_id, "job.paused")
        return "paused"
    repository.end_lease(session, held, "queued", values)
    return "queued"


def _end(
    session: Session,
    held: HeldJob,
    status: Literal["succeeded", "failed", "cancelled"],
    *,
    error: dict[str, Any] | None = None,
    details: FailureDetails | None = None,
    values: Mapping[str, Any] | None = None,
) -> Outcome:
    _settle_job(session, held, status, error=error, values=values)
    _end_attempt(session, held, status, error=error, details=details)
    return status


def _settle_job(
    session: Session,
    held: HeldJob,
    status: Literal["succeeded", "failed", "cancelled"],
    *,
    error: dict[str, Any] | None = None,
    values: Mapping[str, Any] | None = None,
) -> str:
    stages = _stopped(held.stages, status)
    ending: dict[str, Any] = {"finished_at": func.now(), "error": error, "stages": stages, **(values or {})}
    repository.end_lease(session, held, status, ending)
    events.append(session, held.job_id, f"job.{status}", {"error": error} if error else {})
    return status


def _stopped(stages: list[dict[str, Any]], status: str) -> list[dict[str, Any]]:
    """The stages, none of them running any more."""
    return [{**stage, "status": status} if stage["status"] == "running" else stage for stage in stages]


def _end_attempt(
    session: Session,
    held: HeldJob,
    outcome: Outcome,
    *,
    error: dict[str, Any] | None = None,
    details: FailureDetails | None = None,
) -> None:
    found = asdict(details or FailureDetails())
    log_tail = found.pop("log_tail")
    kept = {**(error or {}), "log_tail": log_tail} if log_tail else error
    repository.end_attempt(session, held.job_id, held.fence, outcome, error=kept, **found)


def _settled_outcome(session: Session, claim: Claim) -> Outcome:
    """How an attempt ended that no longer holds its job: by our own earlier call, or by the reaper."""
    return cast("Outcome", repository.attempt_outcome(session, claim.job_id, claim.fence) or "lost")
