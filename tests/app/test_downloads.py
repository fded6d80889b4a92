"""Downloads: complete, resumed, verified, and never outside their folder."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app.client import Client, DamagedError, OtherArtifactError, UnwritableError
from app.database import Database
from app.downloads import download_artifact
from app.settings import Settings
from tests.server import insert_finished_job, listening_app

FILES = {"model.safetensors": os.urandom(3_000_000), "deep/tokenizer.json": b"{}", "empty.txt": b""}


class CountingClient(Client):
    """Remembers which ranges were asked for."""

    def __init__(self, url: str, api_key: str) -> None:
        super().__init__(url, api_key)
        self.ranges: dict[str, str | None] = {}

    @contextmanager
    def open_artifact(self, job_id: str, path: str, headers: Any) -> Iterator[httpx2.Response]:
        self.ranges[path] = headers.get("Range")
        with super().open_artifact(job_id, path, headers) as response:
            yield response


@pytest.fixture(scope="module")
def url(settings: Settings) -> Iterator[str]:
    with listening_app(settings) as url:
        yield url


@pytest.fixture
def connected(url: str, api_key: str) -> Iterator[CountingClient]:
    with CountingClient(url, api_key) as client:
        yield client


@pytest.fixture(scope="module")
def job_id(settings: Settings, database: Database, tmp_path_factory: pytest.TempPathFactory) -> str:
    return insert_finished_job(settings, database, tmp_path_factory.mktemp("artifact"), FILES)


def test_every_file_arrives_as_it_is_and_is_counted(connected: CountingClient, job_id: str, tmp_path: Path) -> None:
    totals: list[int] = []
    counted: list[int] = []
    done = download_artifact(connected, job_id, tmp_path / "out", on_total=totals.append, on_bytes=counted.append)
    for name, content in FILES.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    assert not list((tmp_path / "out").rglob("*.part"))
    assert done.num_files == len(FILES) + 1
    assert totals == [done.size_bytes]
    assert sum(counted) == done.size_bytes


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_what_cannot_be_written_is_told(connected: CountingClient, job_id: str, tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UnwritableError, match="cannot write to"):
        download_artifact(connected, job_id, tmp_path / output)
    assert (tmp_path / "file").read_text() == "mine"


def test_the_folder_of_another_artifact_is_left_alone(
    connected: CountingClient, job_id: str, settings: Settings, database: Database, tmp_path: Path
) -> None:
    other = insert_finished_job(settings, database, tmp_path / "artifact", {"config.json": b"{}"})
    download_artifact(connected, other, tmp_path / "out")
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(OtherArtifactError, match="holds another artifact"):
        download_artifact(connected, job_id, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


def test_a_second_download_fetches_nothing(connected: CountingClient, job_id: str, tmp_path: Path) -> None:
    download_artifact(connected, job_id, tmp_path)
    connected.ranges.clear()
    download_artifact(connected, job_id, tmp_path)
    assert connected.ranges == {}


def test_an_interrupted_download_goes_on_where_it_stopped(
    connected: CountingClient, job_id: str, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors.part").write_bytes(FILES["model.safetensors"][:1_000_000])
    counted: list[int] = []
    done = download_artifact(connected, job_id, tmp_path, on_bytes=counted.append)
    assert connected.ranges["model.safetensors"] == "bytes=1000000-"
    assert (tmp_path / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert sum(counted) == done.size_bytes


@pytest.mark.parametrize("size_bytes", [1000, 3_000_000, 3_000_001])
def test_a_part_of_another_file_is_thrown_away(
    connected: CountingClient, job_id: str, tmp_path: Path, size_bytes: int
) -> None:
    (tmp_path / "model.safetensors.part").write_bytes(b"x" * size_bytes)
    download_artifact(connected, job_id, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_changed_file_is_fetched_again(connected: CountingClient, job_id: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"y" * 3_000_000)
    download_artifact(connected, job_id, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_bytes_that_differ_from_the_manifest_are_refused(
    connected: CountingClient, settings: Settings, database: Database, tmp_path: Path
) -> None:
    job_id = insert_finished_job(settings, database, tmp_path / "artifact", {"a.txt": b"right"})
    (stored,) = (settings.home / "storage" / "artifacts" / job_id).rglob("a.txt")
    stored.chmod(0o644)
    stored.unlink()
    stored.write_bytes(b"wrong")
    with pytest.raises(DamagedError, match=r"a\.txt arrives with other bytes"):
        download_artifact(connected, job_id, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("a.txt*"))


class LyingClient(Client):
    """A service that answers with what a test likes."""

    def __init__(self, files: list[tuple[str, bytes]]) -> None:
        super().__init__("http://127.0.0.1:1")
        self.files = dict(files)

    def artifacts(self, job_id: str) -> list[dict[str, Any]]:
        del job_id
        return [
            {"path": path, "size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for path, content in self.files.items()
        ]

    @contextmanager
    def open_artifact(self, job_id: str, path: str, headers: Any) -> Iterator[httpx2.Response]:
        del job_id, headers
        yield httpx2.Response(200, stream=httpx2.ByteStream(self.files[path]))


@pytest.mark.parametrize("path", ["../evil", "/etc/evil", "a/../../evil", "", "a\\..\\evil", "a\0b"])
def test_a_service_that_names_a_file_outside_the_folder_writes_nothing(path: str, tmp_path: Path) -> None:
    with LyingClient([(path, b"evil")]) as client, pytest.raises(DamagedError, match="outside"):
        download_artifact(client, "job_1", tmp_path / "out")
    assert not list(tmp_path.rglob("*evil*"))


def test_an_artifact_whose_manifest_says_something_else_is_refused(tmp_path: Path) -> None:
    manifest = json.dumps({"files": [{"path": "b", "bytes": 1, "sha256": "0"}]}).encode()
    with (
        LyingClient([("a", b"1"), ("manifest.json", manifest)]) as client,
        pytest.raises(DamagedError, match="differ in: a, b"),
    ):
        download_artifact(client, "job_1", tmp_path)


def test_an_artifact_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with LyingClient([("a", b"1")]) as client, pytest.raises(DamagedError, match="no manifest"):
        download_artifact(client, "job_1", tmp_path)
