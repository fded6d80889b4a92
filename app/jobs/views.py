"""From rows to answers."""

from __future__ import annotations

from app.jobs.repository import ShownJob
from app.jobs.schemas import JobErrorView, JobView, ModelView, ProgressView, ResultView, StageView, WarningView

_ERROR_FIELDS = tuple(JobErrorView.model_fields)
_RESULT_FIELDS = tuple(ResultView.model_fields)


def view_of(shown: ShownJob) -> JobView:
    """The job as the API tells it."""
    job, progress = shown.job, shown.job.progress
    return JobView(
        id=job.id,
        object="job",
        status=job.status,
        attempt=job.attempt,
        model=ModelView(id=job.model_id, revision=job.revision or job.requested_revision),
        recipe=shown.recipe,
        constraints=job.constraints,
        queue=job.queue,
        priority=job.priority,
        timeout_seconds=job.timeout_seconds,
        progress=ProgressView(
            fraction=progress.get("fraction", 0.0),
            stage=progress.get("stage"),
            step=progress.get("step"),
            block=progress.get("block"),
            num_blocks=progress.get("num_blocks"),
            eta_seconds=progress.get("eta_seconds") if job.status == "running" else None,
            queue_position=shown.queue_position,
            heartbeat_at=job.heartbeat_at,
        ),
        stages=[StageView(**stage) for stage in job.stages],
        result=ResultView(**dict.fromkeys(_RESULT_FIELDS) | job.result) if job.result is not None else None,
        error=JobErrorView(**{name: job.error.get(name) for name in _ERROR_FIELDS}) if job.error is not None else None,
        warnings=[WarningView(**{"param": None} | warning) for warning in job.warnings],
        metadata=job.metadata_,
        retry_of=job.retry_of,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
    )
