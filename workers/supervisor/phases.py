"""One phase of an attempt: a process that is given an order, heard, watched, and ended."""

from __future__ import annotations

import logging
import select
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from app.settings import Settings
from workers.errors import CrashError, JobError, UserError
from workers.supervisor.folders import tail
from workers.supervisor.lease import Lease
from workers.supervisor.messages import DoneMessage, ErrorMessage, Message, MessageReader
from workers.supervisor.processes import Exit, JobProcess

logger = logging.getLogger(__name__)

GRACE_SECONDS = 2.0  # between asking a process to end and ending it
_TICK_SECONDS = 0.1
_AFTER_DONE_SECONDS = 10.0  # for a process that has said its last word to end by itself
_MEMORY_SECONDS = 1.0


class Interrupted(Exception):  # noqa: N818 — nothing went wrong
    """The attempt ends before its work does."""

    def __init__(self, reason: Literal["lost", "cancelled", "stopped"]) -> None:
        super().__init__(reason)
        self.reason = reason


class Watch:
    """What may end an attempt from outside: its lease, its time, its worker."""

    def __init__(self, settings: Settings, lease: Lease, stopping: threading.Event, timeout_seconds: float) -> None:
        self._lease = lease
        self._stopping = stopping
        self._memory_limit_bytes = settings.memory_limit_bytes
        self._timeout_seconds = timeout_seconds
        self._deadline = time.monotonic() + timeout_seconds
        self._suspended_at: float | None = None
        self._memory_at = 0.0

    def check(self) -> None:
        """Raise what ends the attempt, if anything does."""
        if self._lease.failure is not None:
            raise self._lease.failure
        if self._lease.status == "lost":
            raise Interrupted("lost")
        if self._lease.status == "cancelling":
            raise Interrupted("cancelled")
        if self._stopping.is_set():
            raise Interrupted("stopped")

    def check_process(self, process: JobProcess) -> None:
        """The same, and what concerns the running process."""
        self.check()
        self._suspend_while_doubtful(process)
        now = time.monotonic()
        if self._suspended_at is None and now > self._deadline:
            raise UserError(
                "timeout",
                f"The job ran for more than {self._timeout_seconds:g} seconds.",
                param="timeout_seconds",
                hint="Allow more time, or ask for less work.",
            )
        if self._memory_limit_bytes is not None and now - self._memory_at > _MEMORY_SECONDS:
            self._memory_at = now
            _check_memory(process.memory_bytes(), self._memory_limit_bytes)

    def _suspend_while_doubtful(self, process: JobProcess) -> None:
        """Stand still while another worker may hold the job, and go on when a beat shows that none does."""
        if self._lease.doubtful and self._suspended_at is None:
            logger.warning("the lease is in doubt: suspending the job's process")
            self._suspended_at = time.monotonic()
            process.suspend()
        elif not self._lease.doubtful and self._suspended_at is not None:
            self._deadline += time.monotonic() - self._suspended_at
            self._suspended_at = None
            process.resume()


def _check_memory(used_bytes: int, limit_bytes: int) -> None:
    if used_bytes > limit_bytes:
        raise CrashError(
            "out_of_memory",
            f"The job's process used {used_bytes} bytes of memory; this worker allows {limit_bytes}.",
            hint="Use fewer or shorter calibration samples, a smaller evaluation.max_seq_length, or a worker with more "
            "memory.",
        )


class PhaseFailedError(Exception):
    """A phase failed; ``error`` says why, and the rest what is known of its process."""

    def __init__(self, error: JobError, ended: Exit, log_tail: str | None) -> None:
        super().__init__(error.message)
        self.error = error
        self.ended = ended
        self.log_tail = log_tail


def run_phase(
    process: JobProcess,
    order: Mapping[str, Any],
    *,
    log: Path,
    watch: Watch,
    hear: Callable[[Message], None],
) -> DoneMessage:
    """Have ``process`` do ``order``; when this returns or raises, nothing of it is left.

    Raises:
        PhaseFailedError: it reported an error, died, talked nonsense, or went past a limit.
        Interrupted: the attempt is over for another reason.
    """
    try:
        with suppress(BrokenPipeError):  # its exit code says more
            process.order(order)
        done = _listen(process, watch, hear)
        ended = process.end()
        if done is None:
            raise _death(str(order["phase"]), ended)
    except Interrupted as interruption:
        process.end(0 if interruption.reason == "lost" else GRACE_SECONDS)
        raise
    except JobError as error:
        raise PhaseFailedError(error, process.end(), tail(log)) from error
    finally:
        process.end()
    return done


def _listen(process: JobProcess, watch: Watch, hear: Callable[[Message], None]) -> DoneMessage | None:
    """Hear the process until it ends; None when it never said that it was done."""
    reader = MessageReader(process.events_fd)
    done: DoneMessage | None = None
    done_at = float("inf")
    while True:
        if reader.closed:
            time.sleep(_TICK_SECONDS / 5)
        else:
            select.select([process.events_fd], [], [], _TICK_SECONDS)
        exited = process.exited()  # asked before the last read, so that nothing is missed
        for message in reader.read():
            if isinstance(message, ErrorMessage):
                raise JobError.from_dict(message.model_dump())
            if isinstance(message, DoneMessage):
                done, done_at = message, time.monotonic()
            else:
                hear(message)
        if exited or time.monotonic() > done_at + _AFTER_DONE_SECONDS:
            return done
        watch.check_process(process)


def _death(phase: str, ended: Exit) -> CrashError:
    if ended.signal is None:
        return CrashError("process_ended", f"The {phase} process ended with code {ended.code} before it was done.")
    return CrashError(
        "process_killed",
        f"The {phase} process was killed by signal {ended.signal}.",
        hint="It probably ran out of memory: use fewer or shorter calibration samples, or a worker with more memory."
        if ended.signal == 9
        else None,
    )
