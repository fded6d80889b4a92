"""Processes of a job: started each in a session of its own, and ended so that nothing of them is left.

A process outlives nothing: it dies with the thread that started it (parent-death signal) and at the end of its
standard input. So every process is started by one thread that lives as long as the worker.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from workers.memory import held_bytes

logger = logging.getLogger(__name__)

T = TypeVar("T")

_KEPT = frozenset({
    "PATH", "HOME", "LANG", "TZ", "TMPDIR", "PYTHONPATH", "LD_LIBRARY_PATH",
    "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES",
})  # fmt: skip
_KEPT_LIBRARIES = ("LC_", "CUDA_", "OMP_", "MKL_", "OPENBLAS_", "NUMBA_", "TORCH_", "PYTORCH_")
# What reaching a hub needs, tokens included: only the process that fetches sees it.
_KEPT_FOR_NETWORK = (
    "HF_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "SSL_CERT_",
    "REQUESTS_CA_",
    "CURL_CA_",
)

_STANDARD_ERROR = 2
_POLL_SECONDS = 0.02
_DEATH_SECONDS = 10  # after SIGKILL; only a process stuck in the kernel takes longer


class Spawner:
    """The one thread that starts processes."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawner")

    def call(self, start: Callable[[], T]) -> T:
        """Run ``start`` in that thread."""
        return self._executor.submit(start).result()

    def close(self) -> None:
        """End the thread, and with it every process that it started."""
        self._executor.shutdown()


@dataclass(frozen=True)
class Exit:
    """How a process ended."""

    code: int | None  # negative for a signal; null when it could not be ended
    peak_memory_bytes: int | None

    @property
    def signal(self) -> int | None:
        """The signal that ended it, if one did."""
        return -self.code if self.code is not None and self.code < 0 else None


class JobProcess:
    """One process and all that it starts."""

    def __init__(
        self, spawner: Spawner, module: str, *, environment: Mapping[str, str], log: Path | None, preload: bool = False
    ) -> None:
        """Start ``python -m module``; without ``log`` it writes to our standard error until it has an order."""
        self.events_fd, write_fd = os.pipe()
        command = [sys.executable, "-m", module, "--events-fd", str(write_fd), *(["--preload"] if preload else [])]
        try:
            output = log.open("ab") if log else None
            try:
                self._popen = spawner.call(
                    lambda: subprocess.Popen(
                        command,
                        stdin=subprocess.PIPE,
                        stdout=output or _STANDARD_ERROR,
                        stderr=output,
                        pass_fds=(write_fd,),
                        start_new_session=True,
                        env=dict(environment),
                    )
                )
            finally:
                if output:
                    output.close()
        except BaseException:
            os.close(self.events_fd)
            raise
        finally:
            os.close(write_fd)
        os.set_blocking(self.events_fd, False)
        self.pid = self._popen.pid  # and the id of its group and session
        self._ending = threading.Lock()
        self._exit: Exit | None = None

    def order(self, order: Mapping[str, Any]) -> None:
        """Tell it what to do. Raises BrokenPipeError when it is dead already."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(json.dumps(order).encode() + b"\n")
        self._popen.stdin.flush()  # and left open: its end is how the process learns that we died

    def exited(self) -> bool:
        """Whether it has ended. It is not reaped, so that its id, and its group's, stay taken."""
        return self._exit is not None or _waitable(self.pid)

    def suspend(self) -> None:
        """Stop the whole group where it is."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a suspended group go on."""
        self._signal(signal.SIGCONT)

    def memory_bytes(self) -> int:
        """Memory of the process and its descendants that nothing but their end gives back."""
        return sum(held_bytes(process.pid) for process in self._family())

    def end(self, grace_seconds: float = 0) -> Exit:
        """Leave nothing of the group alive; first ask, when there is grace. A second call changes nothing."""
        with self._ending:
            if self._exit is None:
                self._exit = self._end(grace_seconds)
            return self._exit

    def _end(self, grace_seconds: float) -> Exit:
        family = self._family()  # those that left the group are known only while their parent lives
        if grace_seconds:
            self._signal(signal.SIGTERM)
            self._signal(signal.SIGCONT)
            _wait_until(self.exited, grace_seconds)
            family += self._family()
        self._signal(signal.SIGKILL)
        for process in family:
            with suppress(psutil.Error):
                process.kill()
        died = _wait_until(lambda: _waitable(self.pid), _DEATH_SECONDS)
        if not died:
            logger.error("process %d does not die", self.pid)
            return Exit(None, None)
        if not _wait_until(lambda: not _group_members(self.pid), _DEATH_SECONDS):
            logger.error("processes of group %d do not die", self.pid)
        _, status, usage = os.wait4(self.pid, 0)
        self._popen.returncode = os.waitstatus_to_exitcode(status)
        if self._popen.stdin is not None:
            with suppress(OSError):
                self._popen.stdin.close()
        os.close(self.events_fd)
        return Exit(self._popen.returncode, usage.ru_maxrss * 1024)

    def _family(self) -> list[psutil.Process]:
        try:
            leader = psutil.Process(self.pid)
            return [leader, *leader.children(recursive=True)]
        except psutil.Error:
            return []

    def _signal(self, number: signal.Signals) -> None:
        # The leader is not reaped before the last signal is sent, so no other group can have its number.
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)


class Spare:
    """One warm interpreter that waits for an order: made ahead, used once."""

    def __init__(self, start: Callable[[], JobProcess]) -> None:
        self._start = start
        self._lock = threading.Lock()
        self._waiting: JobProcess | None = None
        self._closed = False

    def prepare(self) -> None:
        """See that one waits."""
        with self._lock:
            if self._waiting is not None and self._waiting.exited():
                logger.warning("the spare process ended by itself with %s", self._waiting.end())
                self._waiting = None
            if self._waiting is None and not self._closed:
                self._waiting = self._start()

    def take(self) -> JobProcess | None:
        """The one that waits, if it is alive."""
        with self._lock:
            taken, self._waiting = self._waiting, None
        if taken is not None and taken.exited():
            taken.end()
            return None
        return taken

    def close(self) -> None:
        """End the one that waits, and start no other."""
        with self._lock:
            self._closed = True
            taken, self._waiting = self._waiting, None
        if taken is not None:
            taken.end()


def scrubbed_environment(environment: Mapping[str, str], *, network: bool) -> dict[str, str]:
    """What a job's process may see of ``environment``: no secret of the service, and no token unless it fetches."""
    begins = _KEPT_LIBRARIES + (_KEPT_FOR_NETWORK if network else ())
    scrubbed = {name: value for name, value in environment.items() if name in _KEPT or name.upper().startswith(begins)}
    scrubbed["PYTHONFAULTHANDLER"] = "1"  # a segmentation fault leaves a traceback in the log
    # Threads that wait for each other by spinning take the cores from whoever computes: with one more busy process on
    # two cores, small products took five times as long.
    scrubbed.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not network:
        scrubbed["HF_HUB_OFFLINE"] = "1"
    return scrubbed


def _waitable(pid: int) -> bool:
    """Whether a child has ended and waits to be reaped."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _group_members(group: int) -> list[int]:
    """Ids of living processes of a group."""
    return [pid for pid in psutil.pids() if _is_member(pid, group)]


def _is_member(pid: int, group: int) -> bool:
    try:
        return os.getpgid(pid) == group and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.Error):
        return False


def _wait_until(condition: Callable[[], bool], timeout_seconds: float) -> bool:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True
