"""The app as a whole: its documents, its limits, and no torch in it."""

import re
import subprocess
import sys

import pytest
from openapi_spec_validator import validate
from starlette.testclient import TestClient

from app.jobs.schemas import JOB_EXAMPLE, SUBMISSION_EXAMPLE, JobSubmission, JobView
from app.main import create_app
from app.settings import Settings


def test_importing_the_app_leaves_torch_out() -> None:
    program = (
        "import sys, app.main\n"
        "heavy = 'torch', 'transformers', 'compressed_tensors', 'bitsandbytes', 'numba'\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def schema() -> dict[str, object]:
    return create_app(Settings()).openapi()


def test_the_openapi_document_is_valid(schema: dict[str, object]) -> None:
    validate(schema)


def test_every_route_of_the_interface_is_described(schema: dict[str, dict[str, object]]) -> None:
    assert {
        "/v1/jobs",
        "/v1/jobs/{job_id}",
        "/v1/jobs/{job_id}/cancel",
        "/v1/jobs/{job_id}/events",
        "/v1/jobs/{job_id}/report",
        "/v1/jobs/{job_id}/artifacts",
        "/v1/jobs/{job_id}/artifacts/{path}",
        "/v1/techniques",
        "/v1/recipes",
        "/healthz",
        "/readyz",
    } <= set(schema["paths"])


def test_a_recipe_may_be_a_preset_and_the_submission_has_an_example(
    schema: dict[str, dict[str, dict[str, dict[str, object]]]],
) -> None:
    submission = schema["components"]["schemas"]["JobSubmission"]
    assert "int4" in str(submission["properties"])
    assert submission["examples"]


def test_examples_are_what_the_service_itself_would_take_and_give() -> None:
    JobSubmission.model_validate(SUBMISSION_EXAMPLE)
    assert JobView.model_validate(JOB_EXAMPLE).model_dump(mode="json")["progress"] == JOB_EXAMPLE["progress"]


def test_an_unknown_route_is_a_problem(client: TestClient) -> None:
    answer = client.get("/v1/nothing")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json() == {
        "type": "urn:attar:error:route_not_found",
        "title": "Route not found",
        "status": 404,
        "detail": "There is no /v1/nothing.",
        "code": "route_not_found",
        "param": None,
        "hint": None,
        "errors": None,
    }


def test_a_wrong_method_is_a_problem_that_names_the_right_ones(client: TestClient) -> None:
    answer = client.put("/v1/jobs")
    assert answer.status_code == 405
    assert answer.json()["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "GET, POST"
    assert client.post("/v1/jobs/x/artifacts/deep/file").headers["allow"] == "GET"


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_over_the_limit_is_refused(settings: Settings, auth: dict[str, str], is_chunked: bool) -> None:
    small = settings.model_copy(update={"max_body_bytes": 1000})
    body = b'{"model": "' + b"x" * 2000 + b'"}'
    content = iter([body[:500], body[500:]]) if is_chunked else body
    with TestClient(create_app(small)) as client:
        answer = client.post("/v1/jobs", content=content, headers={**auth, "Content-Type": "application/json"})
    assert answer.status_code == 413
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "body_too_large"


def test_the_documentation_page_needs_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/docs").text
    assets = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert assets
    for asset in assets:
        assert asset.startswith("/"), asset
        assert client.get(asset).status_code == 200
