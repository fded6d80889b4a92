"""One server process: started so that it ends with its parent, watched, stopped in order."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from app.embedded.account import Account
from app.embedded.errors import LocalServersError

START_SECONDS = 60.0
STOP_SECONDS = 20.0
MAX_LOG_BYTES = 10 * 1024 * 1024
# A server that ends this often in a minute will not get better by starting it again.
MAX_RESTARTS_PER_MINUTE = 5

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
logger = logging.getLogger(__name__)


class ServerProcess:
    """A running server that belongs to this process."""

    def __init__(
        self,
        name: str,
        command: list[str | os.PathLike[str]],
        *,
        account: Account,
        log: Path,
        stop_signal: signal.Signals,
    ) -> None:
        self.name = name
        self.log = log
        self._command = command
        self._account = account
        self._stop_signal = stop_signal
        self._restarts: list[float] = []
        if log.exists() and log.stat().st_size > MAX_LOG_BYTES:
            log.replace(log.with_suffix(".old.log"))
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as output:
            self.log.chmod(0o600)
            return subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                env=_environment(),
                start_new_session=True,  # Ctrl-C reaches us, and we stop the servers last
                # The one hook that runs after the change of user, which would clear the wish that it makes.
                preexec_fn=end_with_parent(self._stop_signal),  # noqa: PLW1509
                **self._account.as_user(),
            )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def wait_until(self, answers: Callable[[], bool]) -> None:
        """Return when ``answers()``; raise when the process ends first or takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            ended = not self.running
            if not ended and answers():
                return
            if ended or time.monotonic() > deadline:
                reason = f"ended with status {self._process.returncode}" if ended else "does not answer"
                raise LocalServersError(f"{self.name} {reason}; its log {self.log} ends with:\n{log_tail(self.log)}")
            time.sleep(0.02)

    def keep(self, answers: Callable[[], bool]) -> None:
        """Start it again if it ended by itself, and return when ``answers()``; raise when that does not help."""
        while not self.running:
            now = time.monotonic()
            self._restarts = [begin for begin in self._restarts if now - begin < 60] + [now]
            if len(self._restarts) > MAX_RESTARTS_PER_MINUTE:
                raise LocalServersError(f"{self.name} ends again and again; see {self.log}")
            logger.warning("%s ended by itself; starting it again", self.name)
            self._process = self._start()
            try:
                self.wait_until(answers)
            except LocalServersError:
                if self.running:
                    raise
                time.sleep(1)  # what the killed one left may still be ending: PostgreSQL waits for its shared memory

    def stop(self) -> None:
        """Ask it to end in good order, insist after a while, return when it has ended."""
        for number, seconds in ((self._stop_signal, STOP_SECONDS), (signal.SIGQUIT, 5.0), (signal.SIGKILL, None)):
            if not self.running:
                return
            self._process.send_signal(number)
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue


def stop_leftover(pid_file: Path, folder: Path, stop_signal: signal.Signals) -> None:
    """End a server that outlived a killed parent, and remove its pid file, which may name a stranger by now.

    A leftover is recognized by working in ``folder``, where no other program works.
    """
    try:
        pid = int(pid_file.read_text().split()[0])
    except FileNotFoundError:
        return
    except (ValueError, IndexError):  # cut short by a crash: it names nobody
        pid_file.unlink()
        return
    try:
        process = psutil.Process(pid)
        if Path(process.cwd()) == folder.resolve():
            process.send_signal(stop_signal)
            try:
                process.wait(STOP_SECONDS)
            except psutil.TimeoutExpired:
                process.kill()
                process.wait(5)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        logger.debug("process %d is gone or a stranger's: ours run under an account that we may look at", pid)
    pid_file.unlink(missing_ok=True)


def log_tail(log: Path, num_lines: int = 15) -> str:
    """The last lines of a server's log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-num_lines:])
    except OSError as error:
        return f"(unreadable: {error})"


def end_with_parent(stop_signal: signal.Signals) -> Callable[[], None]:
    """What a child does before it becomes another program: ask the kernel for a signal when its parent dies.

    The kernel counts the thread that started it as the parent: start it from one that lives on.
    """
    parent = os.getpid()

    def ask() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(stop_signal), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return ask


def _environment() -> dict[str, str]:
    # A user's PG… variables configure clients; here they would change the server.
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}
