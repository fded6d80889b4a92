"""Downloads that go on where they stopped, and that are complete only when every byte was verified."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import Any

from app.client import Client, DamagedError, NoArtifactError, OtherArtifactError, UnreachableError, UnwritableError

_CHUNK_BYTES = 1024 * 1024
_NUM_TRIES = 5

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Downloaded:
    """A verified copy of an artifact."""

    folder: Path
    num_files: int
    size_bytes: int


def download_artifact(
    client: Client, job_id: str, folder: Path, *, on_total: OnBytes = lambda _: None, on_bytes: OnBytes = lambda _: None
) -> Downloaded:
    """Bring every file of a job's artifact into ``folder`` and verify each against the manifest.

    ``on_total`` is told the bytes of all files, ``on_bytes`` each number of bytes that is there.

    Raises:
        NoArtifactError: the job has none.
        OtherArtifactError: ``folder`` has a manifest already, and it is not this artifact's.
        UnwritableError: a file cannot be written below ``folder``.
        DamagedError: a file's bytes are not those that the manifest names.
    """
    files = client.artifacts(job_id)
    if not files:
        raise NoArtifactError(client.job(job_id))
    manifest = folder / "manifest.json"
    known = {file["sha256"] for file in files if file["path"] == "manifest.json"}
    if manifest.is_file() and _sha256(manifest) not in known:
        raise OtherArtifactError(folder)
    on_total(sum(file["size_bytes"] for file in files))
    try:
        for file in files:
            _download(client, job_id, file, _inside(folder, file["path"]), on_bytes)
    except OSError as error:
        raise UnwritableError(folder, error) from error
    _agrees_with_manifest(folder, files)
    return Downloaded(folder, len(files), sum(file["size_bytes"] for file in files))


def _download(client: Client, job_id: str, file: dict[str, Any], target: Path, on_bytes: OnBytes) -> None:
    if target.is_file() and target.stat().st_size == file["size_bytes"] and _sha256(target) == file["sha256"]:
        on_bytes(file["size_bytes"])
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    for num_left in reversed(range(_NUM_TRIES)):
        try:
            digest = _continue(client, job_id, file, part, on_bytes)
        except UnreachableError:
            if not num_left:
                raise
            time.sleep(0.5)
            continue
        if digest == file["sha256"]:
            part.replace(target)
            return
        part.unlink()  # what was left from an earlier download may be of another file: once more from the start
        on_bytes(-file["size_bytes"])
    raise DamagedError(f"{file['path']} arrives with other bytes than the manifest names")


def _continue(client: Client, job_id: str, file: dict[str, Any], part: Path, on_bytes: OnBytes) -> str:
    """Append what ``part`` lacks; the sha256 of the whole."""
    size_bytes = file["size_bytes"]
    start = part.stat().st_size if part.exists() else 0
    if start > size_bytes:
        part.unlink()
        start = 0
    digest = hashlib.sha256()
    if start:
        with part.open("rb") as existing:
            while chunk := existing.read(_CHUNK_BYTES):
                digest.update(chunk)
    counted = start
    on_bytes(start)
    if start < size_bytes or not part.exists():
        headers = {"Range": f"bytes={start}-", "If-Range": f'"{file["sha256"]}"'} if start else {}
        try:
            with client.open_artifact(job_id, file["path"], headers) as response, part.open("ab") as output:
                if response.status_code != HTTPStatus.PARTIAL_CONTENT and start:
                    output.truncate(0)
                    digest = hashlib.sha256()
                    on_bytes(-start)
                    counted = 0
                for chunk in response.iter_raw(_CHUNK_BYTES):
                    output.write(chunk)
                    digest.update(chunk)
                    on_bytes(len(chunk))
                    counted += len(chunk)
        except UnreachableError:
            on_bytes(-counted)
            raise
    if counted != size_bytes:
        on_bytes(size_bytes - counted)
    return digest.hexdigest()


def _agrees_with_manifest(folder: Path, files: list[dict[str, Any]]) -> None:
    """The manifest inside the artifact must say the same as the service: it is what stays with the files."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        inside = {(file["path"], file["bytes"], file["sha256"]) for file in manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"the artifact has no manifest that can be read: {error}") from error
    outside = {(file["path"], file["size_bytes"], file["sha256"]) for file in files if file["path"] != "manifest.json"}
    if inside != outside:
        names = ", ".join(sorted({name for name, _, _ in inside ^ outside}))
        raise DamagedError(f"the artifact's manifest and the service's list differ in: {names}")


def _inside(folder: Path, name: str) -> Path:
    """The place of a file; a service must not write outside the folder that its user chose."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in name or "\0" in name:
        raise DamagedError(f"the service names a file outside the artifact: {name!r}")
    return folder.joinpath(*path.parts)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
