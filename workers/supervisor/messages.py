"""What a job's process says: JSON lines over a pipe, read without waiting and believed only when well-formed."""

from __future__ import annotations

import json
import math
import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from workers.errors import Blame, CrashError

MAX_LINE_BYTES = 1024 * 1024
_READ_BYTES = 64 * 1024


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class ProgressMessage(_Message):
    """How far the process is, within its phase."""

    event: Literal["progress"]
    fraction: Annotated[float, Field(ge=0, le=1)]
    stage: int | None = None
    step: Annotated[str, Field(max_length=500)] | None = None
    block: int | None = None
    num_blocks: int | None = None


class StageMessage(_Message):
    """A stage of the recipe began or ended."""

    event: Literal["stage"]
    index: Annotated[int, Field(ge=0)]
    status: Literal["running", "succeeded"]
    metrics: dict[str, Any] = {}


class ResolvedMessage(_Message):
    """The exact revision of the model."""

    event: Literal["resolved"]
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]


class WarningMessage(_Message):
    """Something that the user should know and that stops nothing."""

    event: Literal["warning"]
    code: Annotated[str, Field(max_length=100)]
    message: Annotated[str, Field(max_length=2_000)]
    param: str | None = None


class Violation(_Message):
    """A constraint that the result breaks."""

    name: str
    limit: float
    value: float | None


class DoneMessage(_Message):
    """The phase is complete and on the disk."""

    event: Literal["done"]
    peak_memory_bytes: int | None = None
    result: dict[str, Any] | None = None
    constraints_violated: list[Violation] = []


class ErrorMessage(_Message):
    """The phase failed, and the process knows why."""

    event: Literal["error"]
    code: Annotated[str, Field(max_length=100)]
    message: Annotated[str, Field(max_length=10_000)]
    param: str | None = None
    hint: str | None = None
    blame: Blame


Message = ProgressMessage | StageMessage | ResolvedMessage | WarningMessage | DoneMessage | ErrorMessage

_MESSAGE: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="event")])


class MessageReader:
    """Reads the messages that have arrived on a non-blocking pipe."""

    def __init__(self, events_fd: int) -> None:
        self._fd = events_fd
        self._buffer = bytearray()
        self.closed = False  # no writer is left

    def read(self) -> list[Message]:
        """Every complete message that waits; raises CrashError at one that is too long or not well-formed."""
        messages: list[Message] = []
        while not self.closed:
            try:
                data = os.read(self._fd, _READ_BYTES)
            except BlockingIOError:
                break
            self.closed = not data
            self._buffer += data
            messages += self._complete_lines()
        return messages

    def _complete_lines(self) -> list[Message]:
        *lines, rest = bytes(self._buffer).split(b"\n")
        self._buffer[:] = rest
        if any(len(line) > MAX_LINE_BYTES for line in (*lines, rest)):
            raise CrashError("invalid_message", f"The job's process sent a line of over {MAX_LINE_BYTES} bytes.")
        return [parse(line) for line in lines]


def parse(line: bytes) -> Message:
    """The message of one line. Raises CrashError ``invalid_message``."""
    try:
        return _MESSAGE.validate_python(loads(line))
    except (ValueError, ValidationError, RecursionError) as error:
        start = line[:200].decode("utf-8", "backslashreplace")
        reason = str(error).partition("\n")[0]
        raise CrashError(
            "invalid_message", f"The job's process sent a line that is no message ({reason}): {start!r}"
        ) from error


def loads(data: bytes) -> object:
    """JSON that PostgreSQL can store: NaN and infinities become null, NUL and lone surrogates are replaced."""
    return _storable(json.loads(data, parse_constant=lambda _: None, parse_float=_finite))


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def _storable(value: object) -> object:
    if isinstance(value, str):
        return value.replace("\x00", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_storable(item) for item in value]
    if isinstance(value, dict):
        return {_storable(key): _storable(item) for key, item in value.items()}
    return value
