"""Objects by key: a local folder, or a bucket through obstore (S3, GCS, Azure).

Storage                  what the service and the supervisor call
├── FolderStorage        file:///… or a null URL; every write is on the disk before it returns
└── BucketStorage        s3://…, gs://…, az://…
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import obstore
from obstore.exceptions import BaseError
from obstore.store import ObjectStore, from_url
from typing_extensions import Buffer

from app.settings import Settings

if TYPE_CHECKING:
    from obstore.store import RetryConfig

CHUNK_BYTES = 1024 * 1024

_RETRIES: RetryConfig = {"max_retries": 5, "retry_timeout": timedelta(seconds=30)}


class StorageError(Exception):
    """The store could not be reached or refused: trying again may succeed."""


class ObjectMissingError(StorageError):
    """No object has this key."""


class Storage(Protocol):
    """What every store can do. Keys are relative paths with ``/`` between their parts."""

    def put_file(self, key: str, path: Path) -> None:
        """Store the file at ``path``; a reader sees all of it or nothing."""

    def put_bytes(self, key: str, data: bytes) -> None:
        """Store ``data``; a reader sees all of it or nothing."""

    def open_range(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """The bytes from ``start`` on, in pieces; raises ObjectMissingError at once, not at the first piece."""

    def size(self, key: str) -> int:
        """Size of the object in bytes."""

    def download(self, key: str, path: Path) -> None:
        """Write the object to a new file at ``path``."""

    def delete_prefix(self, prefix: str) -> None:
        """Delete every object whose key lies under the folder ``prefix``; none is fine."""

    def check(self) -> None:
        """Raise StorageError where the store cannot be read."""


def open_storage(settings: Settings) -> Storage:
    """The store that the settings name."""
    url = settings.storage_url
    if url is None:
        return FolderStorage(settings.home / "storage")
    parts = urlsplit(url)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise ValueError(f"ATTAR_STORAGE_URL must be an absolute path such as file:///srv/attar, not {url}")
        return FolderStorage(Path(unquote(parts.path)))
    return BucketStorage(from_url(url, retry_config=_RETRIES))


def checked_key(key: str) -> str:
    """``key``, unless a part of it is empty, ``.`` or ``..``, or holds a backslash or control character."""
    parts = key.split("/")
    if any(part in ("", ".", "..") or "\\" in part or not part.isprintable() for part in parts):
        raise ValueError(f"not a storage key: {key!r}")
    return key


class FolderStorage:
    """Objects are files below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._incoming = root / ".incoming"  # no key begins with a dot, so no reader looks here

    def put_file(self, key: str, path: Path) -> None:
        """Store ``path`` as a hard link where the file systems allow it: its owner must not write to it again."""
        incoming = self._new_incoming()
        try:
            if not _linked(path, incoming):
                shutil.copyfile(path, incoming)
            self._publish(incoming, key)
        except OSError as error:
            raise StorageError(f"cannot store {key}: {error}") from error
        finally:
            incoming.unlink(missing_ok=True)

    def put_bytes(self, key: str, data: bytes) -> None:
        """Store ``data``."""
        incoming = self._new_incoming()
        try:
            incoming.write_bytes(data)
            self._publish(incoming, key)
        except OSError as error:
            raise StorageError(f"cannot store {key}: {error}") from error
        finally:
            incoming.unlink(missing_ok=True)

    def open_range(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """The bytes from ``start`` on."""
        path = self._path(key)
        try:
            file = path.open("rb", buffering=0)
        except FileNotFoundError as error:
            raise ObjectMissingError(key) from error
        except OSError as error:
            raise StorageError(f"cannot read {key}: {error}") from error
        return _read_range(file, start, length)

    def size(self, key: str) -> int:
        """Size of the object in bytes."""
        try:
            return self._path(key).stat(follow_symlinks=False).st_size
        except FileNotFoundError as error:
            raise ObjectMissingError(key) from error

    def download(self, key: str, path: Path) -> None:
        """Copy the object; never a link, since the copy may be written to."""
        with path.open("xb") as target:
            for piece in self.open_range(key):
                target.write(piece)

    def delete_prefix(self, prefix: str) -> None:
        """Delete the folder ``prefix``."""
        try:
            shutil.rmtree(self._path(prefix))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StorageError(f"cannot delete {prefix}: {error}") from error
        # Folders are no objects: those above that are empty now go with it. One that is not refuses, as it should.
        with suppress(OSError):
            for folder in list(self._path(prefix).parents)[: len(PurePosixPath(prefix).parts) - 1]:
                folder.rmdir()

    def check(self) -> None:
        """The folder can be made and written to."""
        try:
            self._incoming.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot use {self.root}: {error}") from error
        if not os.access(self._incoming, os.W_OK | os.X_OK):
            raise StorageError(f"cannot write to {self.root}")

    def _path(self, key: str) -> Path:
        if key.startswith("."):
            raise ValueError(f"not a storage key: {key!r}")
        return self.root / PurePosixPath(checked_key(key))

    def _new_incoming(self) -> Path:
        self.check()
        return self._incoming / uuid4().hex

    def _publish(self, incoming: Path, key: str) -> None:
        """Move a complete file to its key: contents first, then its name, then the names of new folders."""
        target = self._path(key)
        _sync(incoming)
        new_folders = [folder for folder in target.parents if folder != self.root and not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        incoming.replace(target)
        _sync(target.parent)
        for folder in new_folders:
            _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _linked(path: Path, target: Path) -> bool:
    """Whether ``path`` could be hard-linked to ``target``; a file with other names may be written to through them."""
    if path.stat().st_nlink != 1:
        return False
    try:
        os.link(path, target, follow_symlinks=False)
    except OSError:
        return False
    return True


def _read_range(file: FileIO, start: int, length: int | None) -> Iterator[bytes]:
    with file:
        file.seek(start)
        left = length
        while left is None or left > 0:
            piece = file.read(CHUNK_BYTES if left is None else min(left, CHUNK_BYTES))
            if not piece:
                return
            left = None if left is None else left - len(piece)
            yield piece


class BucketStorage:
    """Objects in a bucket; a put becomes visible all at once, as these stores promise."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def put_file(self, key: str, path: Path) -> None:
        """Upload ``path``, in parts when it is large."""
        with path.open("rb") as file, _store_errors(key):
            obstore.put(self._store, checked_key(key), file)

    def put_bytes(self, key: str, data: bytes) -> None:
        """Upload ``data``."""
        with _store_errors(key):
            obstore.put(self._store, checked_key(key), data)

    def open_range(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """The bytes from ``start`` on."""
        if length == 0:
            return iter(())
        with _store_errors(key):
            if length is None and start == 0:
                answer = obstore.get(self._store, checked_key(key))
            elif length is None:
                answer = obstore.get(self._store, checked_key(key), options={"range": {"offset": start}})
            else:
                answer = obstore.get(self._store, checked_key(key), options={"range": (start, start + length)})
            stream = answer.stream(min_chunk_size=CHUNK_BYTES)
        return _pieces(key, stream)

    def size(self, key: str) -> int:
        """Size of the object in bytes."""
        with _store_errors(key):
            return obstore.head(self._store, checked_key(key))["size"]

    def download(self, key: str, path: Path) -> None:
        """Write the object to a new file."""
        pieces = self.open_range(key)
        with path.open("xb") as target:
            for piece in pieces:
                target.write(piece)

    def delete_prefix(self, prefix: str) -> None:
        """Delete every object under ``prefix``."""
        with _store_errors(prefix):
            for batch in obstore.list(self._store, checked_key(prefix)):
                obstore.delete(self._store, [entry["path"] for entry in batch])

    def check(self) -> None:
        """The bucket answers."""
        with suppress(ObjectMissingError):
            self.size("readiness")


def _pieces(key: str, stream: Iterable[Buffer]) -> Iterator[bytes]:
    with _store_errors(key):
        for piece in stream:
            yield bytes(piece)


@contextmanager
def _store_errors(key: str) -> Iterator[None]:
    """Turn what obstore raises into our two errors."""
    try:
        yield
    except FileNotFoundError as error:
        raise ObjectMissingError(key) from error
    except (BaseError, OSError) as error:
        raise StorageError(f"{key}: {error}") from error
