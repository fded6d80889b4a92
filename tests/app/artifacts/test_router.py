"""A published artifact over HTTP: listed, downloaded whole and in part, gone on with."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.artifacts import service as artifacts
from app.database import Database
from app.settings import Settings
from app.storage import open_storage

WEIGHTS = bytes(range(256)) * 10_000


@dataclass
class Published:
    url: str
    prefix: str
    etag: str


@pytest.fixture(scope="module")
def published(
    client: TestClient,
    auth: dict[str, str],
    model_id: str,
    settings: Settings,
    database: Database,
    tmp_path_factory: pytest.TempPathFactory,
) -> Published:
    job_id = client.post("/v1/jobs", json={"model": {"id": model_id}, "recipe": "int8"}, headers=auth).json()["id"]
    folder = tmp_path_factory.mktemp("artifact")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "empty.txt").touch()
    (folder / "deep").mkdir()
    (folder / "deep" / "a file+x.json").write_text("{}")
    result = artifacts.publish(open_storage(settings), folder, job_id=job_id, fence=1)
    with database.transaction() as session:
        artifacts.record(session, result, job_id=job_id, fence=1)
    etag = f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
    return Published(f"/v1/jobs/{job_id}/artifacts", result.prefix, etag)


def test_the_list_tells_size_and_sha256_of_every_file(
    client: TestClient, auth: dict[str, str], published: Published
) -> None:
    answer = client.get(published.url, headers=auth).json()
    paths = [file["path"] for file in answer["data"]]
    assert paths == ["deep/a file+x.json", "empty.txt", "manifest.json", "model.safetensors"]
    weights = answer["data"][-1]
    assert (weights["size_bytes"], weights["sha256"]) == (len(WEIGHTS), published.etag.strip('"'))
    assert answer["size_bytes"] == sum(file["size_bytes"] for file in answer["data"])


def test_the_manifest_verifies_what_is_downloaded(
    client: TestClient, auth: dict[str, str], published: Published
) -> None:
    manifest = client.get(f"{published.url}/manifest.json", headers=auth).json()
    assert len(manifest["files"]) == 3
    for file in manifest["files"]:
        content = client.get(f"{published.url}/{file['path']}", headers=auth).content
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])


def test_a_whole_file_comes_with_its_sha256_as_a_strong_etag(
    client: TestClient, auth: dict[str, str], published: Published
) -> None:
    answer = client.get(f"{published.url}/model.safetensors", headers=auth)
    assert (answer.status_code, answer.content) == (200, WEIGHTS)
    assert answer.headers["etag"] == published.etag
    assert answer.headers["content-length"] == str(len(WEIGHTS))
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_download_goes_on_where_it_stopped(client: TestClient, auth: dict[str, str], published: Published) -> None:
    headers = {**auth, "Range": "bytes=1000000-", "If-Range": published.etag}
    answer = client.get(f"{published.url}/model.safetensors", headers=headers)
    assert (answer.status_code, answer.content) == (206, WEIGHTS[1_000_000:])
    assert answer.headers["content-range"] == f"bytes 1000000-{len(WEIGHTS) - 1}/{len(WEIGHTS)}"
    assert answer.headers["content-length"] == str(len(WEIGHTS) - 1_000_000)


def test_a_download_of_another_file_begins_again(
    client: TestClient, auth: dict[str, str], published: Published
) -> None:
    headers = {**auth, "Range": "bytes=1000000-", "If-Range": '"another"'}
    answer = client.get(f"{published.url}/model.safetensors", headers=headers)
    assert (answer.status_code, answer.content) == (200, WEIGHTS)


def test_a_range_past_the_end_is_a_problem(client: TestClient, auth: dict[str, str], published: Published) -> None:
    answer = client.get(f"{published.url}/model.safetensors", headers={**auth, "Range": "bytes=99999999-"})
    assert (answer.status_code, answer.json()["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{len(WEIGHTS)}"


def test_a_known_file_is_not_sent_again(client: TestClient, auth: dict[str, str], published: Published) -> None:
    answer = client.get(f"{published.url}/model.safetensors", headers={**auth, "If-None-Match": published.etag})
    assert (answer.status_code, answer.content) == (304, b"")
    assert answer.headers["etag"] == published.etag


def test_head_says_everything_but_the_bytes(client: TestClient, auth: dict[str, str], published: Published) -> None:
    got = client.get(f"{published.url}/model.safetensors", headers=auth)
    answer = client.head(f"{published.url}/model.safetensors", headers={**auth, "Range": "bytes=0-1"})
    assert (answer.status_code, answer.content) == (200, b"")
    for name in ("etag", "content-length", "content-type", "accept-ranges"):
        assert answer.headers[name] == got.headers[name]


def test_an_empty_file_is_a_file(client: TestClient, auth: dict[str, str], published: Published) -> None:
    answer = client.get(f"{published.url}/empty.txt", headers=auth)
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", "0")


def test_names_are_quoted_in_a_path(client: TestClient, auth: dict[str, str], published: Published) -> None:
    answer = client.get(f"{published.url}/deep/a%20file%2Bx.json", headers=auth)
    assert answer.json() == {}
    assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''a%20file%2Bx.json"


@pytest.mark.parametrize(
    "path",
    ["nothing", "../1/manifest.json", "%2e%2e/%2e%2e/x", "%00", "deep", "deep/", "/etc/passwd", "x%0d%0aSet-Cookie:y"],
)
def test_only_a_listed_file_can_be_read(
    client: TestClient, auth: dict[str, str], published: Published, path: str
) -> None:
    answer = client.get(f"{published.url}/{path}", headers=auth)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_job_without_a_result_has_no_files(client: TestClient, auth: dict[str, str], model_id: str) -> None:
    job_id = client.post("/v1/jobs", json={"model": {"id": model_id}, "recipe": "int8"}, headers=auth).json()["id"]
    assert client.get(f"/v1/jobs/{job_id}/artifacts", headers=auth).json()["data"] == []
    answer = client.get(f"/v1/jobs/{job_id}/artifacts/model.safetensors", headers=auth)
    assert (answer.status_code, answer.json()["code"]) == (404, "artifact_not_found")


def test_a_file_that_storage_lost_is_an_answer_not_a_broken_stream(
    client: TestClient, auth: dict[str, str], published: Published, settings: Settings, tmp_path: Path
) -> None:
    path = settings.home / "storage" / published.prefix / "empty.txt"
    path.rename(tmp_path / "gone")
    answer = client.get(f"{published.url}/empty.txt", headers=auth)
    (tmp_path / "gone").rename(path)
    assert (answer.status_code, answer.json()["code"]) == (410, "file_lost")


def test_discarded_files_are_gone(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "file").touch()
    storage = open_storage(settings)
    result = artifacts.publish(storage, tmp_path / "artifact", job_id="job_x", fence=9)
    artifacts.discard(storage, result.prefix)
    assert not (settings.home / "storage" / result.prefix).exists()
