"""Why a job can fail, told so that the service knows whom to blame and whether to try again.

JobError                     code, message, param, hint
├── UserError                the request or the model is wrong: never retried
├── InfrastructureError      network, storage, a lost process: retried up to five times
└── CrashError               the work itself died or ran out of memory: retried twice
"""

from __future__ import annotations

import errno
import os
from typing import Any, ClassVar, Literal, Self

Blame = Literal["user", "infrastructure", "crash"]


class JobError(Exception):
    """A failure with a stable ``code``; ``param`` is a path such as ``recipe.stages[0].group_size``."""

    blame: ClassVar[Blame]

    def __init__(self, code: str, message: str, *, param: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.hint = hint

    def to_dict(self) -> dict[str, Any]:
        """The form that travels over the pipe from a job's process to its supervisor."""
        return {
            "code": self.code,
            "message": self.message,
            "param": self.param,
            "hint": self.hint,
            "blame": self.blame,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> JobError:
        """The inverse of :meth:`to_dict`."""
        kind = {"user": UserError, "infrastructure": InfrastructureError, "crash": CrashError}[data["blame"]]
        return kind(data["code"], data["message"], param=data.get("param"), hint=data.get("hint"))

    def at(self, param: str) -> Self:
        """The same error, naming the field ``param`` if it names none yet."""
        self.param = self.param or param
        return self


class UserError(JobError):
    """The user has to change something; trying again would fail again."""

    blame = "user"


class InfrastructureError(JobError):
    """Something around the job failed; trying again may succeed."""

    blame = "infrastructure"


class CrashError(JobError):
    """The job's own process died, ran out of memory or hit a defect of ours."""

    blame = "crash"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a library says, in one of its ways, that there was no memory for it."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether there was no room for a file, or no quota."""
    if isinstance(error, OSError):
        return error.errno in {errno.ENOSPC, errno.EDQUOT}
    # Libraries and storages put the system's words into errors of their own.
    return os.strerror(errno.ENOSPC).lower() in str(error).lower()


def as_job_error(error: BaseException) -> JobError:
    """What an error of any kind means for the job that it ended."""
    if isinstance(error, JobError):
        return error
    if is_out_of_memory(error):
        reason = (str(error).strip().splitlines() or ["no memory was left"])[0][:300]
        hint = "Use a worker, or a device, with more memory."
        return CrashError("out_of_memory", f"The job's process ran out of memory: {reason}", hint=hint)
    if is_disk_full(error):
        return InfrastructureError("disk_full", "The worker's disk is full.", hint="Free space on the worker.")
    return CrashError("internal_error", f"{type(error).__name__}: {error}"[:2000])


def model_unusable(error: Exception) -> UserError:
    """The model's own code failed on text that its tokenizer made."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return UserError(
        "model_unusable",
        f"transformers cannot run the model: {type(error).__name__}: {reason}",
        param="model.id",
        hint="Try model.generate on it; its config.json, generation_config.json or tokenizer may be another model's.",
    )
