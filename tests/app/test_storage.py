"""One set of promises, kept by the local folder and by an S3 bucket (moto's server on loopback)."""

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from moto.server import ThreadedMotoServer

from app.settings import Settings
from app.storage import FolderStorage, ObjectMissingError, Storage, StorageError, open_storage


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket_url(s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    httpx2.put(f"{s3_endpoint}/attar").raise_for_status()
    return f"s3://attar/{tmp_path.name}"


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    is_bucket = request.param == "bucket"
    url = request.getfixturevalue("bucket_url") if is_bucket else (tmp_path / "a folder").as_uri()
    return open_storage(Settings(home=tmp_path, storage_url=url))


def read(storage: Storage, key: str, start: int = 0, length: int | None = None) -> bytes:
    return b"".join(storage.open_range(key, start, length))


def num_open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_what_is_put_can_be_read_whole_and_in_part(storage: Storage, tmp_path: Path) -> None:
    content = bytes(range(256)) * 12_000  # more than one piece
    (tmp_path / "file").write_bytes(content)
    storage.put_file("a/1/model.safetensors", tmp_path / "file")
    assert storage.size("a/1/model.safetensors") == len(content)
    assert read(storage, "a/1/model.safetensors") == content
    assert read(storage, "a/1/model.safetensors", 5) == content[5:]
    assert read(storage, "a/1/model.safetensors", 1_000_000, 1_500_000) == content[1_000_000:2_500_000]
    assert read(storage, "a/1/model.safetensors", 3, 0) == b""


def test_a_put_replaces_what_was_there(storage: Storage) -> None:
    storage.put_bytes("a/file", b"old and long")
    storage.put_bytes("a/file", b"new")
    assert read(storage, "a/file") == b"new"


def test_an_empty_object_is_an_object(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    storage.put_file("a/empty", tmp_path / "empty")
    assert storage.size("a/empty") == 0
    assert read(storage, "a/empty") == b""


def test_a_missing_object_is_told_before_the_first_piece(storage: Storage) -> None:
    with pytest.raises(ObjectMissingError):
        storage.open_range("a/nothing")
    with pytest.raises(ObjectMissingError):
        storage.size("a/nothing")


def test_deleting_a_prefix_spares_its_neighbours(storage: Storage) -> None:
    for key in ("a/1/x", "a/1/deep/y", "a/10/x", "b"):
        storage.put_bytes(key, b"x")
    storage.delete_prefix("a/1")
    storage.delete_prefix("a/1")
    for key in ("a/1/x", "a/1/deep/y"):
        with pytest.raises(ObjectMissingError):
            storage.size(key)
    assert storage.size("a/10/x") == storage.size("b") == 1


def test_deleting_leaves_no_empty_folder(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path / "root")
    for key in ("artifacts/job/1/x", "artifacts/job/2/x"):
        storage.put_bytes(key, b"1")
    storage.delete_prefix("artifacts/job/1")
    assert storage.size("artifacts/job/2/x") == 1
    storage.delete_prefix("artifacts/job/2")
    assert not (tmp_path / "root" / "artifacts").exists()


def test_a_download_is_a_file_of_ones_own(storage: Storage, tmp_path: Path) -> None:
    storage.put_bytes("a/file", b"content")
    storage.download("a/file", tmp_path / "copy")
    (tmp_path / "copy").write_bytes(b"changed")
    assert read(storage, "a/file") == b"content"


def test_a_store_that_works_passes_its_check(storage: Storage) -> None:
    storage.check()


@pytest.mark.parametrize("key", ["", "../x", "a/../../x", "/etc/passwd", "a//b", "a/./b", "a\\..\\b", "a/b\n", "a/\0"])
def test_a_key_cannot_leave_the_store(storage: Storage, key: str) -> None:
    with pytest.raises(ValueError, match="not a storage key"):
        storage.put_bytes(key, b"x")
    with pytest.raises(ValueError, match="not a storage key"):
        storage.open_range(key)


def test_a_bucket_that_is_not_there_is_a_storage_error(bucket_url: str, tmp_path: Path) -> None:
    missing = open_storage(Settings(home=tmp_path, storage_url=bucket_url.replace("attar", "no-such-bucket")))
    with pytest.raises(StorageError):
        missing.put_bytes("a", b"x")


def test_a_file_with_a_second_name_is_copied_so_that_its_owner_cannot_change_the_object(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path / "store")
    original = tmp_path / "original"
    original.write_bytes(b"content")
    (tmp_path / "second").hardlink_to(original)
    storage.put_file("a", tmp_path / "second")
    original.write_bytes(b"changed")
    assert read(storage, "a") == b"content"


def test_a_failed_put_leaves_nothing(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path / "store")
    storage.put_bytes("a", b"x")
    with pytest.raises(StorageError):
        storage.put_bytes("a/b", b"x")  # a file is in the way of the folder
    with pytest.raises(StorageError):
        storage.put_file("b", tmp_path / "nothing")
    assert [path.name for path in (tmp_path / "store").rglob("*") if path.is_file()] == ["a"]


def test_no_object_can_be_hidden_in_the_incoming_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a storage key"):
        FolderStorage(tmp_path).put_bytes(".incoming/x", b"x")


def test_a_reader_that_stops_early_gives_its_file_back(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    storage.put_bytes("a", b"x" * 3_000_000)
    before = num_open_files()
    for _ in range(10):
        storage.open_range("a")
        next(iter(storage.open_range("a")))
    assert num_open_files() == before


@pytest.mark.parametrize("url", ["file://host/folder", "file:relative"])
def test_a_folder_url_must_be_absolute(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absolute path"):
        open_storage(Settings(home=tmp_path, storage_url=url))
