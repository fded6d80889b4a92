"""Every error is a problem with a code, and says nothing of the inside."""

from fastapi import FastAPI
from starlette.testclient import TestClient

from app import errors
from workers.errors import InfrastructureError, UserError


def test_a_defect_is_a_problem_that_tells_no_secrets() -> None:
    app = FastAPI()
    errors.install(app)

    @app.get("/")
    def fail() -> None:
        raise RuntimeError("password=hunter2")

    answer = TestClient(app, raise_server_exceptions=False).get("/")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert answer.headers["content-type"] == "application/problem+json"
    assert "hunter2" not in answer.text


def test_a_models_fault_keeps_its_code_field_and_hint() -> None:
    error = errors.of_job_error(UserError("pickle_only_model", "No.", param="model.id", hint="Convert it."))
    assert (error.status, error.code, error.param, error.hint) == (422, "pickle_only_model", "model.id", "Convert it.")


def test_a_gated_model_is_forbidden() -> None:
    assert errors.of_job_error(UserError("model_gated", "No.")).status == 403


def test_what_may_work_later_says_when() -> None:
    error = errors.of_job_error(InfrastructureError("hub_unreachable", "No."))
    assert error.status == 503
    assert error.headers["Retry-After"]
