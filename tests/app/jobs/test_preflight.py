"""An earlier result as the model of the next job."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.artifacts import service as artifacts
from app.database import Database
from app.settings import Settings
from app.storage import open_storage
from tests.workers.attempts import compressed


def submit(client: TestClient, auth: dict[str, str], model_id: str) -> tuple[int, dict[str, Any]]:
    answer = client.post("/v1/jobs", json={"model": {"id": model_id}, "recipe": "int8"}, headers=auth)
    return answer.status_code, answer.json()


@pytest.fixture(params=["dense", "archive"])
def result(
    client: TestClient,
    auth: dict[str, str],
    model_id: str,
    settings: Settings,
    database: Database,
    tiny_llama: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> str:
    """The id of a job with an artifact that can be opened: a plain one, or one of bitmasks."""
    job_id = str(submit(client, auth, model_id)[1]["id"])
    recipe = {"stages": [{"technique": "magnitude"}], "output": {"format": "sparse-bitmask"}}
    if request.param == "archive":
        compressed(tmp_path / "work", tiny_llama, recipe).artifact.rename(tmp_path / "artifact")
    else:
        shutil.copytree(tiny_llama, tmp_path / "artifact")
    published = artifacts.publish(open_storage(settings), tmp_path / "artifact", job_id=job_id, fence=1)
    with database.transaction() as session:
        artifacts.record(session, published, job_id=job_id, fence=1)
    return job_id


def test_a_result_can_be_compressed_again(client: TestClient, auth: dict[str, str], result: str) -> None:
    status, job = submit(client, auth, f"job:{result}")
    assert status == 202
    assert job["model"]["id"] == f"job:{result}"


def test_anothers_result_is_not_there(client: TestClient, other_auth: dict[str, str], result: str) -> None:
    status, problem = submit(client, other_auth, f"job:{result}")
    assert (status, problem["code"], problem["param"]) == (422, "model_not_found", "model.id")


def test_a_result_that_storage_lost_is_refused(
    client: TestClient, auth: dict[str, str], result: str, settings: Settings
) -> None:
    (settings.home / "storage" / "artifacts" / result / "1" / "config.json").unlink()
    status, problem = submit(client, auth, f"job:{result}")
    assert (status, problem["code"], problem["param"]) == (422, "model_not_found", "model.id")
