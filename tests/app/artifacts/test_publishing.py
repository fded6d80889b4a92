"""Publishing: all files and a manifest under the fence's own prefix, or nothing."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from app.artifacts.publishing import publish
from app.storage import FolderStorage, Storage, StorageError
from workers.errors import CrashError, InfrastructureError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    (folder / "deep").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "deep" / "tokenizer.json").write_bytes(b"{}")
    return folder


class RecordingStorage(FolderStorage):
    """A folder that remembers the order of its puts."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.keys: list[str] = []

    def put_file(self, key: str, path: Path) -> None:
        self.keys.append(key)
        super().put_file(key, path)


def read(storage: Storage, key: str) -> bytes:
    return b"".join(storage.open_range(key))


def test_every_file_is_stored_under_the_fence_and_the_manifest_last(folder: Path, tmp_path: Path) -> None:
    storage = RecordingStorage(tmp_path / "store")
    published = publish(storage, folder, job_id="job_1", fence=3)
    assert storage.keys == [
        "artifacts/job_1/3/deep/tokenizer.json",
        "artifacts/job_1/3/model.safetensors",
        "artifacts/job_1/3/manifest.json",
    ]
    assert published.prefix == "artifacts/job_1/3"
    assert [file.path for file in published.files] == ["deep/tokenizer.json", "model.safetensors", "manifest.json"]
    assert published.size_bytes == sum(file.size_bytes for file in published.files)
    for file in published.files:
        content = read(storage, f"{published.prefix}/{file.path}")
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file.size_bytes, file.sha256)


def test_the_manifest_tells_of_every_other_file(folder: Path, tmp_path: Path) -> None:
    publish(FolderStorage(tmp_path / "store"), folder, job_id="job_1", fence=1)
    again = publish(FolderStorage(tmp_path / "store"), folder, job_id="job_1", fence=2)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == {
        "job_id": "job_1",
        "files": [
            {"path": "deep/tokenizer.json", "bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()},
            {"path": "model.safetensors", "bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()},
        ],
    }
    assert len(again.files) == 3


@pytest.mark.parametrize("name", [".hidden", "a\nb", "é", "-x", "x" * 201])
def test_an_odd_name_is_refused_and_nothing_is_stored(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).touch()
    with pytest.raises(CrashError) as caught:
        publish(FolderStorage(tmp_path / "store"), folder, job_id="job_1", fence=1)
    assert caught.value.code == "invalid_artifact"
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("target", ["model.safetensors", "/etc/passwd", "deep", "nowhere"])
def test_a_link_is_refused(folder: Path, tmp_path: Path, target: str) -> None:
    (folder / "link").symlink_to(target)
    with pytest.raises(CrashError):
        publish(FolderStorage(tmp_path / "store"), folder, job_id="job_1", fence=1)


def test_an_empty_folder_is_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CrashError):
        publish(FolderStorage(tmp_path / "store"), tmp_path / "empty", job_id="job_1", fence=1)


def test_a_store_that_fails_can_be_tried_again(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file is in the way")
    with pytest.raises(InfrastructureError) as caught:
        publish(FolderStorage(tmp_path / "store"), folder, job_id="job_1", fence=1)
    assert caught.value.code == "storage_unavailable"
    assert isinstance(caught.value.__cause__, StorageError)


_ON_FULL_DISK = """
import os, subprocess, sys
from pathlib import Path
from app.artifacts.publishing import publish
from app.storage import FolderStorage
from workers.errors import InfrastructureError
folder, disk = map(Path, sys.argv[1:])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
try:
    publish(FolderStorage(disk), folder, job_id="job_1", fence=1)
except InfrastructureError as error:
    print(error.code, sum(path.stat().st_size for path in disk.rglob("*.safetensors")), os.listdir(disk / ".incoming"))
"""


def test_a_storage_whose_disk_is_full_says_so_and_keeps_no_half_of_a_file(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(200_000))
    (tmp_path / "disk").mkdir()
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*alone, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here without root")
    told = subprocess.run(
        [*alone, sys.executable, "-c", _ON_FULL_DISK, str(folder), str(tmp_path / "disk")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert told.stdout.split(maxsplit=2) == ["disk_full", "0", "[]\n"]
