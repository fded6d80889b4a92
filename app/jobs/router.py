"""``/v1/jobs``."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Header, Query, Request, Response
from sqlalchemy.orm import Session

from app.auth import BearerCredentials, CurrentPrincipal, KeyBeforeBody, authenticate
from app.dependencies import AppParts
from app.errors import responses
from app.jobs import preflight, service
from app.jobs.models import JOB_ID
from app.jobs.repository import ShownJob
from app.jobs.schemas import JobList, JobSubmission, JobView, Status
from app.jobs.service import Idempotency, JobService
from app.jobs.views import view_of

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], responses=responses(401))
submissions = APIRouter(prefix="/v1/jobs", tags=["jobs"], responses=responses(401), route_class=KeyBeforeBody)

_IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="Two submissions with one key and one body are one job, whatever happens to the first answer.",
    ),
]


async def _idempotency(request: Request, key: _IdempotencyKey = None) -> Idempotency | None:
    """The key, and a hash of the body that white space and the order of fields do not change."""
    if key is None:
        return None
    body = await request.body()
    try:
        body = json.dumps(json.loads(body), sort_keys=True).encode()
    except (ValueError, RecursionError):
        # Not JSON: refused in a moment, by whoever reads the body.
        return None
    return Idempotency(key, hashlib.sha256(body).hexdigest())


@submissions.post(
    "",
    status_code=202,
    summary="Submit a job",
    responses=responses(400, 403, 413, 415, 422, 503)
    | {
        202: {
            "description": "Accepted: it will end as `succeeded`, `failed` or `cancelled`.",
            "headers": {
                "Location": {"description": "The job.", "schema": {"type": "string"}},
                "Idempotency-Replayed": {
                    "description": "`true` where an earlier request with this key made the job.",
                    "schema": {"type": "string"},
                },
            },
        }
    },
)
async def submit_job(
    submission: JobSubmission,
    principal: CurrentPrincipal,
    parts: AppParts,
    response: Response,
    idempotency: Annotated[Idempotency | None, Depends(_idempotency)],
) -> JobView:
    """Check the model, the data and the recipe, then queue the job."""
    jobs = JobService(parts.settings, parts.database, parts.storage)
    submit = partial(jobs.submit, principal.tenant_id, submission, idempotency)
    if preflight.asks_hub(submission):
        shown, is_replayed = await parts.hub_threads.run(principal.tenant_id, submit)
    else:
        shown, is_replayed = await to_thread.run_sync(submit)
    response.headers["Location"] = f"/v1/jobs/{shown.job.id}"
    if is_replayed:
        response.headers["Idempotency-Replayed"] = "true"
    return view_of(shown)


@router.get("", summary="List jobs", responses=responses(422))
def list_jobs(
    principal: CurrentPrincipal,
    parts: AppParts,
    after: Annotated[
        str | None, Query(pattern=f"^{JOB_ID.pattern}$", description="The `last_id` of the page before.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    status: Status | None = None,
    model: Annotated[str | None, Query(max_length=600, pattern=r"^[^\x00]*$", description="A `model.id`.")] = None,
) -> JobList:
    """The tenant's jobs, newest first."""
    with parts.database.transaction() as session:
        page, has_more = service.list_jobs(
            session, principal.tenant_id, after=after, status=status, model_id=model, limit=limit
        )
    data = [view_of(shown) for shown in page]
    return JobList(
        object="list",
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=has_more,
    )


@router.get("/{job_id}", summary="Read a job", response_model=JobView, responses=responses(404, 422))
def get_job(job_id: str, credentials: BearerCredentials, parts: AppParts) -> Response:
    """The job as it is now."""

    def read(session: Session) -> ShownJob:
        return service.get(session, authenticate(session, credentials).tenant_id, job_id)

    # This is what everyone polls while both cores compute, when each change of threads takes a millisecond. So the key
    # is read here, with the job, and the answer is not validated again in another thread by the framework.
    view = view_of(parts.database.read(read))
    return Response(view.model_dump_json(), media_type="application/json")


@router.post("/{job_id}/cancel", summary="Cancel a job", responses=responses(404, 409, 422))
def cancel_job(job_id: str, principal: CurrentPrincipal, parts: AppParts) -> JobView:
    """A waiting job ends at once; one that runs is stopped within seconds, and is `cancelling` until then."""
    with parts.database.transaction() as session:
        shown = service.cancel(session, principal.tenant_id, job_id)
    return view_of(shown)


@router.get("/{job_id}/report", summary="Read a job's report", responses=responses(404, 422))
def get_report(job_id: str, principal: CurrentPrincipal, parts: AppParts) -> dict[str, Any]:
    """What was measured on the original and on the artifact."""
    with parts.database.transaction() as session:
        return service.get_report(session, principal.tenant_id, job_id)
