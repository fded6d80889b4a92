"""Artifacts: publish, record and discard (for the supervisor); list and open (for the API)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy.orm import Session

from app.artifacts import repository
from app.artifacts.models import Artifact, ArtifactFile
from app.artifacts.publishing import PublishedArtifact, PublishedFile, artifact_prefix, publish
from app.errors import GoneError, JobNotFoundError, NotFoundError
from app.jobs.models import JOB_ID
from app.storage import ObjectMissingError, Storage, StorageError

__all__ = ["PublishedArtifact", "PublishedFile", "artifact_prefix", "discard", "publish", "record"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredFile:
    """A file of an artifact and the key that it is stored under."""

    key: str
    path: str
    size_bytes: int
    sha256: str


def record(session: Session, published: PublishedArtifact, *, job_id: str, fence: int) -> None:
    """Make a published artifact the job's own; called inside the transaction that ends the job."""
    files = [(file.path, file.size_bytes, file.sha256) for file in published.files]
    repository.insert_artifact(session, job_id, fence, published.prefix, published.size_bytes, files)


def discard(storage: Storage, prefix: str) -> None:
    """Delete the objects of an artifact that no row names. A store that does not answer is logged, not raised."""
    try:
        storage.delete_prefix(prefix)
    except StorageError:
        logger.exception("could not discard files", extra={"prefix": prefix})


def list_files(session: Session, tenant_id: str, job_id: str) -> tuple[Artifact | None, list[ArtifactFile]]:
    """The artifact of a job and its files; no artifact and no files while there is none."""
    artifact = _artifact_of(session, tenant_id, job_id)
    return artifact, repository.list_files(session, artifact.id) if artifact is not None else []


def find_file(session: Session, tenant_id: str, job_id: str, path: str) -> StoredFile:
    """One file of a job's artifact."""
    artifact = _artifact_of(session, tenant_id, job_id)
    if artifact is None:
        raise NotFoundError(
            "artifact_not_found", f"Job {job_id} has no artifact.", hint="A job has one once it has succeeded."
        )
    file = repository.find_file(session, artifact.id, path) if path.isprintable() else None
    if file is None:
        raise NotFoundError(
            "file_not_found",
            f"The artifact of job {job_id} has no file {path[:200]!r}.",
            hint=f"GET /v1/jobs/{job_id}/artifacts lists its files.",
        )
    return StoredFile(f"{artifact.prefix}/{file.path}", file.path, file.size_bytes, file.sha256)


def _artifact_of(session: Session, tenant_id: str, job_id: str) -> Artifact | None:
    """The artifact of a job, if it has one; raises JobNotFoundError."""
    if not JOB_ID.fullmatch(job_id) or not repository.job_exists(session, tenant_id, job_id):
        raise JobNotFoundError(job_id)
    return repository.find_artifact(session, tenant_id, job_id)


def open_file(storage: Storage, file: StoredFile, start: int, length: int) -> Iterator[bytes]:
    """Bytes of a file from ``start`` on; raises GoneError ``file_lost`` where the storage has it no more."""
    try:
        return storage.open_range(file.key, start, length)
    except ObjectMissingError:
        logger.error("an artifact's file is gone from storage", extra={"key": file.key})  # noqa: TRY400
        raise GoneError(
            "file_lost",
            f"The storage has lost {file.path}, which this artifact had.",
            hint="Ask whoever runs this service for a backup, or run the job again.",
        ) from None


def find_artifact(session: Session, tenant_id: str, job_id: str) -> tuple[str, list[ArtifactFile]] | None:
    """Key prefix and files of the artifact of one of the tenant's jobs."""
    artifact = repository.find_artifact(session, tenant_id, job_id)
    return (artifact.prefix, repository.list_files(session, artifact.id)) if artifact is not None else None
