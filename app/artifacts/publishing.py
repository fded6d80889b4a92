"""From a folder on a worker's disk to objects in storage: hash, write the manifest, upload, manifest last."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app.storage import Storage, StorageError
from workers.errors import CrashError, InfrastructureError, is_disk_full

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@ -]{0,199}")


@dataclass(frozen=True)
class PublishedFile:
    """One file of an artifact."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class PublishedArtifact:
    """An artifact that lies in storage and that no row names yet."""

    prefix: str
    files: tuple[PublishedFile, ...]
    size_bytes: int


def publish(storage: Storage, folder: Path, *, job_id: str, fence: int) -> PublishedArtifact:
    """Upload every file of ``folder``, after writing its ``manifest.json``, under a prefix of this fence alone.

    Raises:
        CrashError: ``invalid_artifact``, for a link or a name that has no business in an artifact.
        InfrastructureError: ``disk_full`` where the storage says so, else ``storage_unavailable``.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    files = [_described(folder, path) for path in _regular_files(folder)]
    if not files:
        raise CrashError("invalid_artifact", "The artifact has no files.")
    manifest = {"job_id": job_id, "files": [_listed(file) for file in files]}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    files.append(_described(folder, MANIFEST))
    prefix = artifact_prefix(job_id, fence)
    try:
        for file in files:
            storage.put_file(f"{prefix}/{file.path}", folder / file.path)
    except StorageError as error:
        logger.exception("the artifact could not be stored", extra={"job_id": job_id, "fence": fence})
        if is_disk_full(error):
            raise InfrastructureError(
                "disk_full", "The disk of the storage is full.", hint="Free space where ATTAR_STORAGE_URL leads."
            ) from error
        raise InfrastructureError("storage_unavailable", "The storage did not take the artifact.") from error
    size_bytes = sum(file.size_bytes for file in files)
    logger.info("published", extra={"job_id": job_id, "fence": fence, "size_bytes": size_bytes})
    return PublishedArtifact(prefix, tuple(files), size_bytes)


def _listed(file: PublishedFile) -> dict[str, str | int]:
    return {"path": file.path, "bytes": file.size_bytes, "sha256": file.sha256}


def artifact_prefix(job_id: str, fence: int) -> str:
    """Where the objects of an artifact lie; no two attempts share a prefix."""
    return f"artifacts/{job_id}/{fence}"


def _regular_files(folder: Path, parent: str = "") -> Iterator[str]:
    """Relative paths of all files below ``folder``; refuses whatever is not a plain file or folder."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = parent + entry.name
        if not _PART.fullmatch(entry.name):
            raise CrashError("invalid_artifact", f"The artifact holds a file with an odd name: {path!r}.")
        if entry.is_dir(follow_symlinks=False):
            yield from _regular_files(Path(entry.path), f"{path}/")
        elif entry.is_file(follow_symlinks=False):
            yield path
        else:
            raise CrashError("invalid_artifact", f"The artifact holds a link or a device: {path!r}.")


def _described(folder: Path, path: str) -> PublishedFile:
    with (folder / path).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return PublishedFile(path, os.fstat(file.fileno()).st_size, sha256)
