"""Errors that become answers, and the one place that writes them (RFC 9457, ``application/problem+json``).

ServiceError                 status, code, message, param, hint
├── InvalidRequestError      422  the request is well-formed and cannot be done
├── UnauthorizedError        401  no key, or one that is not valid
├── ForbiddenError           403  the key, or the hub's token, does not reach that far
├── NotFoundError            404  there is no such thing for this tenant
│   └── JobNotFoundError     404  no such job, or another tenant's
├── ConflictError            409  the thing's status forbids it
│   └── JobConflictError     409  the job's status forbids it
├── GoneError                410  what was there has been lost
├── PreconditionError        412  the entity is not the one that the caller named
├── RangeError               416  no byte of the file lies in the range
└── UnavailableError         503  something that we need does not answer; try again

Whatever a model or data source says (workers.errors.JobError) becomes one of these in ``of_job_error``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from app.body_schema import BodySchema
from app.storage import StorageError
from app.validation import Fault, faults_of
from workers.errors import InfrastructureError, JobError

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"


class ServiceError(Exception):
    """An answer other than success; ``param`` is a path such as ``recipe.stages[0].group_size``."""

    status: ClassVar[int]

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        hint: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.hint = hint
        self.headers = dict(headers or {})


class InvalidRequestError(ServiceError):
    """The request is well-formed and cannot be done."""

    status = 422


class UnauthorizedError(ServiceError):
    """No key, or one that is not valid."""

    status = 401


class ForbiddenError(ServiceError):
    """The key, or the hub's token, does not reach that far."""

    status = 403


class NotFoundError(ServiceError):
    """There is no such thing for this tenant."""

    status = 404


class JobNotFoundError(NotFoundError):
    """The tenant has no such job, whoever else has it."""

    def __init__(self, job_id: str) -> None:
        super().__init__("job_not_found", f"There is no job {job_id[:100]!r}.")


class ConflictError(ServiceError):
    """The thing's status forbids it."""

    status = 409


class JobConflictError(ConflictError):
    """The job's status forbids it."""

    def __init__(self, job_id: str, status: str, action: str) -> None:
        super().__init__("job_conflict", f"Job {job_id} is {status}: it cannot {action}.", param="status")


class GoneError(ServiceError):
    """What was there has been lost."""

    status = 410


class PreconditionError(ServiceError):
    """The entity is not the one that the caller named."""

    status = 412


class RangeError(ServiceError):
    """No byte of the file lies in the range."""

    status = 416


class UnavailableError(ServiceError):
    """Something that we need does not answer; trying again may succeed."""

    status = 503


class Problem(BaseModel):
    """An error, as RFC 9457 says it."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "type": "urn:attar:error:unknown_technique",
                "title": "Unknown technique",
                "status": 422,
                "detail": "There is no technique 'gtpq'.",
                "code": "unknown_technique",
                "param": "recipe.stages[0].technique",
                "hint": "One of: gptq, magnitude, round_to_nearest.",
                "errors": None,
            }
        }
    )

    type: str
    title: str
    status: int
    detail: str
    code: str = Field(description="Stable, snake_case.")
    param: str | None = Field(description="Path of the field at fault, for example `recipe.stages[1].group_size`.")
    hint: str | None = Field(description="What to do about it.")
    errors: list[Fault] | None = Field(description="Every fault of the request, where there is more than one.")


def of_job_error(error: JobError) -> ServiceError:
    """The answer for what a model or data source said while a request was checked."""
    kind: type[ServiceError] = InvalidRequestError
    headers = {}
    if isinstance(error, InfrastructureError):
        kind, headers = UnavailableError, {"Retry-After": "10"}
    elif error.code == "model_gated":
        kind = ForbiddenError
    return kind(error.code, error.message, param=error.param, hint=error.hint, headers=headers)


def problem(
    status: int,
    code: str,
    detail: str,
    *,
    param: str | None = None,
    hint: str | None = None,
    errors: list[Fault] | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """The response that tells of one error."""
    body = Problem(
        type=f"urn:attar:error:{code}",
        title=code.replace("_", " ").capitalize(),
        status=status,
        detail=detail,
        code=code,
        param=param,
        hint=hint,
        errors=errors,
    )
    return JSONResponse(body.model_dump(), status_code=status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Let ``app`` answer every error as a problem."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(StorageError, _storage_error)
    for kind in (OperationalError, InterfaceError, PoolTimeoutError):
        app.add_exception_handler(kind, _database_error)
    app.add_exception_handler(Exception, _defect)


def _service_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return problem(error.status, error.code, error.message, param=error.param, hint=error.hint, headers=error.headers)


def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    schema = BodySchema(request.app, request.scope["route"].path, request.method)
    faults = faults_of(error.errors(), error.body, schema)
    first = faults[0]
    if first.code == "json_invalid":
        return problem(400, "invalid_json", f"The body is not JSON: {first.detail}", hint="Send a JSON object.")
    if isinstance(error.body, bytes):
        sent = request.headers.get("content-type") or "none"
        return problem(
            415,
            "unsupported_media_type",
            f"The body's Content-Type is {sent[:100]}.",
            hint="Send `Content-Type: application/json`.",
        )
    return problem(
        422,
        first.code,
        first.detail,
        param=first.param,
        hint=first.hint,
        errors=faults if len(faults) > 1 else None,
    )


def body_too_large() -> JSONResponse:
    """The answer to a body over the service's limit."""
    return problem(
        413,
        "body_too_large",
        "The body is larger than this service accepts.",
        hint="Put long texts into a dataset file (`file:NAME`).",
    )


def _http_error(request: Request, error: Exception) -> JSONResponse:
    """What the framework itself refuses."""
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    match error.status_code:
        case 400:  # the framework's word for a body that it could not parse
            return problem(400, "invalid_json", str(error.detail), hint="Send a JSON object.")
        case 404:
            return problem(404, "route_not_found", f"There is no {path}.")
        case 405:
            allow = ", ".join(_methods_at(request))
            detail = f"{method} is not allowed on {path}; {allow} is."
            return problem(405, "method_not_allowed", detail, headers={"Allow": allow})
        case 413:
            return body_too_large()
        case status:
            return problem(status, HTTPStatus(status).name.lower(), str(error.detail), headers=error.headers)


def _methods_at(request: Request) -> list[str]:
    """Every method that the request's path answers; the framework names those of the first route alone."""
    methods = set()
    for path, operations in request.app.openapi()["paths"].items():
        if compile_path(path.replace("{path}", "{path:path}"))[0].match(request.url.path):
            methods |= {name.upper() for name in operations}
    return sorted(methods)


def _storage_error(request: Request, error: Exception) -> JSONResponse:
    logger.error("storage failed: %s", error, extra={"path": request.url.path})
    return problem(503, "storage_unavailable", "The storage does not answer.", headers={"Retry-After": "5"})


def _database_error(request: Request, error: Exception) -> JSONResponse:
    logger.error("database failed: %s", error, extra={"path": request.url.path})
    return problem(503, "database_unavailable", "The database does not answer.", headers={"Retry-After": "5"})


def _defect(request: Request, error: Exception) -> JSONResponse:
    logger.error("unexpected error", exc_info=error, extra={"method": request.method, "path": request.url.path})
    return problem(500, "internal_error", "Something went wrong on our side.", hint="It has been logged; try again.")


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The problems that a route may answer, for its OpenAPI description."""
    return {
        status: {
            "model": Problem,
            "description": HTTPStatus(status).phrase,
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in statuses
    }
