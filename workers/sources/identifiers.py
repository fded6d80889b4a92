"""Names that users send for models, revisions and files: parsed into one form, or refused."""

from __future__ import annotations

import re
from dataclasses import dataclass

from workers.errors import UserError

MAX_NAME_CHARACTERS = 500

_HUB_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?:{_HUB_PART}/)?{_HUB_PART}")
_JOB_ID = re.compile(r"job_[0-9A-HJKMNP-TV-Z]{26}")
_REVISION = re.compile(r"[A-Za-z0-9._/-]{1,200}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubId:
    """A repository on the hub: ``name`` or ``organization/name``."""

    name: str


@dataclass(frozen=True)
class FileId:
    """Something below a model root; ``parts`` are its folders and its last name."""

    parts: tuple[str, ...]

    @property
    def name(self) -> str:
        """The path as the user wrote it, without needless slashes."""
        return "/".join(self.parts)


@dataclass(frozen=True)
class JobId:
    """The artifact of an earlier job."""

    job_id: str


ModelId = HubId | FileId | JobId


def parse_model_id(value: str) -> ModelId:
    """``file:NAME``, ``job:ID`` or a hub id.

    Raises UserError ``invalid_model_id``.
    """
    try:
        kind, colon, name = value.partition(":")
        if not colon:
            return HubId(parse_hub_name(value))
        if kind == "file":
            return FileId(parse_file_name(name))
        if kind == "job":
            return JobId(_parse_job_id(name))
        raise ValueError(f"{kind[:40]!r} is no kind of model source")
    except ValueError as error:
        raise UserError(
            "invalid_model_id",
            f"Not a model id: {error}.",
            param="model.id",
            hint="Use a hub id such as HuggingFaceTB/SmolLM2-135M, file:NAME for a folder under the model roots, "
            "or job:ID for an earlier result.",
        ) from None


def parse_revision(value: str | None, model: ModelId) -> str | None:
    """A branch, tag or commit of a hub model; for other models None, or the digest that the content must have.

    Raises UserError ``invalid_revision``.
    """
    if value is None:
        return None
    problem = None
    if not _REVISION.fullmatch(value) or ".." in value or value.startswith(("/", "-")) or value.endswith("/"):
        problem = "letters, digits and ._/- are allowed, and no `..`"
    elif not isinstance(model, HubId):
        if value == "main":
            return None
        if not _COMMIT.fullmatch(value):
            problem = "only a hub model has branches and tags; leave the revision out"
    if problem is not None:
        raise UserError(
            "invalid_revision",
            f"Not a revision: {problem}.",
            param="model.revision",
            hint="Use a branch, a tag or a commit of 40 hex digits.",
        )
    return value


def parse_hub_name(value: str) -> str:
    """The hub's rules for ``[organization/]name``; raises ValueError."""
    if len(value) > 96 or not _HUB_ID.fullmatch(value) or "--" in value or ".." in value or value.endswith(".git"):
        raise ValueError("a hub id is [organization/]name of letters, digits, ., _ and -, 96 at most")
    return value


def parse_file_name(value: str) -> tuple[str, ...]:
    """The parts of a relative path that cannot leave its root; raises ValueError."""
    if not value or len(value) > MAX_NAME_CHARACTERS:
        raise ValueError(f"a file name has 1 to {MAX_NAME_CHARACTERS} characters")
    # isprintable is false for NUL, control characters, line separators, lone surrogates and bidi marks.
    if not value.isprintable() or "\\" in value:
        raise ValueError("a file name has no control or invisible characters and no backslash")
    if value.startswith("/"):
        raise ValueError("a file name is relative to a model root")
    parts = tuple(part for part in value.split("/") if part)
    if any(part.strip() in {".", ".."} for part in parts):
        raise ValueError("a file name has no . or .. in it")
    if any(len(part.encode()) > 255 for part in parts):
        raise ValueError("a part of the file name is longer than 255 bytes")
    return parts


def _parse_job_id(value: str) -> str:
    if not _JOB_ID.fullmatch(value):
        raise ValueError("job:ID needs the id of a job, such as job_01J…")
    return value
