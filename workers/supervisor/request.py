"""What an attempt's processes find in their work folder before the first of them starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from app.artifacts import service as artifacts
from app.attempts.service import Claim
from app.database import Database
from app.errors import NotFoundError
from app.settings import Settings
from app.storage import Storage
from workers.errors import InfrastructureError, UserError


def write_request(settings: Settings, claim: Claim, folder: Path) -> None:
    """Write ``request.json``: the job, as far as its processes may know it."""
    # A hub's branch may have moved since an earlier attempt; a folder's digest is not a revision to ask for.
    pinned = claim.revision if not claim.model_id.startswith(("job:", "file:")) else None
    request = {
        "job_id": claim.job_id,
        "fence": claim.fence,
        "attempt": claim.attempt,
        "model": {"id": claim.model_id, "revision": pinned or claim.requested_revision},
        "recipe": claim.recipe,
        "constraints": claim.constraints,
        "model_roots": [str(root) for root in settings.model_roots],
        "artifact_files": claim.model_id.startswith("job:"),
    }
    (folder / "request.json").write_text(json.dumps(request))


def copy_artifact(database: Database, storage: Storage, claim: Claim, folder: Path, check: Callable[[], None]) -> None:
    """Copy the files of one of the tenant's earlier results, where the model is one, each checked against its hash.

    ``check`` is called before each file and may raise.
    """
    if not claim.model_id.startswith("job:"):
        return
    job_id = claim.model_id.removeprefix("job:")
    try:
        with database.transaction() as session:
            artifact, files = artifacts.list_files(session, claim.tenant_id, job_id)
    except NotFoundError:
        artifact = None
    if artifact is None:
        raise UserError(
            "model_not_found",
            f"There is no artifact of job {job_id}.",
            param="model.id",
            hint="Name a job of yours that has an artifact and was not deleted.",
        )
    for file in files:
        check()
        target = folder / "source" / "artifact" / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and _sha256(target) == file.sha256:
            continue  # an earlier attempt's copy
        target.unlink(missing_ok=True)
        storage.download(f"{artifact.prefix}/{file.path}", target)
        if _sha256(target) != file.sha256:
            raise InfrastructureError("artifact_damaged", f"The stored {file.path} of job {job_id} is damaged.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
