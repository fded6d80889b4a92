"""SQL of artifacts."""

from __future__ import annotations

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from app.artifacts.models import Artifact, ArtifactFile
from app.jobs.models import Job


def insert_artifact(
    session: Session, job_id: str, fence: int, prefix: str, size_bytes: int, files: list[tuple[str, int, str]]
) -> None:
    """Record an artifact and its files (path, size in bytes, sha256)."""
    values = {"job_id": job_id, "fence": fence, "prefix": prefix, "size_bytes": size_bytes}
    artifact_id = session.execute(insert(Artifact).values(values).returning(Artifact.id)).scalar_one()
    session.execute(
        insert(ArtifactFile),
        [
            {"artifact_id": artifact_id, "path": path, "size_bytes": size_bytes, "sha256": sha256}
            for path, size_bytes, sha256 in files
        ],
    )


def job_exists(session: Session, tenant_id: str, job_id: str) -> bool:
    """Whether the tenant has this job."""
    return session.scalar(select(Job.id).where(Job.id == job_id, Job.tenant_id == tenant_id)) is not None


def find_artifact(session: Session, tenant_id: str, job_id: str) -> Artifact | None:
    """The artifact of one of the tenant's jobs."""
    return session.scalar(
        select(Artifact).join(Job, Job.id == Artifact.job_id).where(Job.id == job_id, Job.tenant_id == tenant_id)
    )


def list_files(session: Session, artifact_id: int) -> list[ArtifactFile]:
    """Every file of an artifact, by path."""
    query = select(ArtifactFile).where(ArtifactFile.artifact_id == artifact_id).order_by(ArtifactFile.path)
    return list(session.scalars(query))


def find_file(session: Session, artifact_id: int, path: str) -> ArtifactFile | None:
    """One file of an artifact."""
    return session.get(ArtifactFile, (artifact_id, path))
