"""Every role in one foreground command: servers, migrations, API, dispatcher and workers, stopped together."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from app import local, migrate
from app.client import Client
from app.credentials import Credentials, ensure_credentials
from app.database import Database
from app.embedded.process import end_with_parent, log_tail
from app.settings import Settings

logger = logging.getLogger(__name__)

READY_SECONDS = 60.0
STOP_SECONDS = 30.0
# A role that ends this often in a minute will not get better by starting it again.
MAX_RESTARTS_PER_MINUTE = 5

Say = Callable[[str], None]


class ServeError(RuntimeError):
    """The service cannot start or go on; ``hint`` says what would help."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class StopRequested(BaseException):
    """SIGINT, SIGTERM or SIGHUP arrived."""


@contextmanager
def stop_signals() -> Iterator[None]:
    """Turn the first signal that asks for the end into StopRequested; later ones wait for the end they asked for."""
    asked = threading.Event()

    def ask(_number: int, _frame: FrameType | None) -> None:
        if not asked.is_set():
            asked.set()
            raise StopRequested

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Role:
    """One process of the service, started again when it ends by itself."""

    name: str
    arguments: list[str]
    environment: dict[str, str]
    log: Path | None = None
    pass_fds: tuple[int, ...] = ()
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _starts: list[float] = field(default_factory=list, init=False)

    def start(self) -> None:
        """Start the process. It gets SIGTERM when this one dies."""
        self._starts.append(time.monotonic())
        with ExitStack() as stack:
            output = stack.enter_context(self.log.open("ab")) if self.log else None
            self._process = subprocess.Popen(
                [sys.executable, "-m", "app.cli", *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment,
                pass_fds=self.pass_fds,
                start_new_session=True,  # Ctrl-C reaches us, and we stop the roles in order
                preexec_fn=end_with_parent(signal.SIGTERM),  # noqa: PLW1509 - started from the main thread only
            )

    def keep(self) -> None:
        """Start the process again if it has ended; raise when that does not help."""
        if self._process is None or self._process.poll() is None:
            return
        ended = _ending(self._process.returncode)
        recent = [start for start in self._starts if time.monotonic() - start < 60]
        if len(recent) > MAX_RESTARTS_PER_MINUTE:
            tail = f"; its log {self.log} ends with:\n{log_tail(self.log)}" if self.log else "; its log is above"
            raise ServeError(f"the {self.name} {ended} {len(recent)} times in a minute{tail}")
        logger.warning("the %s %s; starting it again", self.name, ended)
        self.start()

    def ask_to_stop(self) -> None:
        """Send SIGTERM."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def wait_stopped(self, deadline: float) -> None:
        """Wait until it has ended; after ``deadline`` kill whatever is left of it."""
        if self._process is None:
            return
        try:
            self._process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            logger.warning("the %s did not stop within %d s; killing it", self.name, STOP_SECONDS)
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _ending(returncode: int) -> str:
    if returncode < 0:
        return f"was ended by {signal.Signals(-returncode).name}"
    return f"ended with status {returncode}"


class Service:
    """A running service of this process."""

    def __init__(
        self, url: str, credentials: Credentials, roles: list[Role], servers: local.LocalServers | None
    ) -> None:
        self.url = url
        self.credentials = credentials
        self._roles = roles
        self._servers = servers

    def check(self) -> None:
        """Start again what ended; raise ServeError or LocalServersError when that does not help. Call it often."""
        if self._servers is not None:
            self._servers.keep()
        for role in self._roles:
            role.keep()


@contextmanager
def running_service(
    settings: Settings, *, num_workers: int = 1, log_folder: Path | None = None, say: Say = lambda _: None
) -> Iterator[Service]:
    """Start everything, yield when it answers, stop everything. Call it from the main thread.

    With ``log_folder`` every role writes a log of its own there, else all write to standard error.

    Raises:
        ServeError, local.LocalServersError: it cannot start; both have a ``hint``.
    """
    with ExitStack() as stack:
        listener = stack.enter_context(_listen(settings.host, settings.port))
        address, port = listener.getsockname()[:2]
        servers = _start_servers(settings, stack, say)
        database_url = settings.database_url or (servers.database_url if servers else "")
        redis_url = settings.redis_url or (servers.redis_url if servers else "")
        migrate.upgrade(database_url)
        say("Database migrated")
        url = f"http://{_reachable_host(address)}:{port}"
        database = Database(database_url, pool_size=1)
        try:
            credentials = ensure_credentials(settings.home, database, url)
        finally:
            database.dispose()

        if log_folder is not None:
            log_folder.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "ATTAR_HOME": str(settings.home),
            "ATTAR_DATABASE_URL": database_url,
            "ATTAR_REDIS_URL": redis_url,
            "PYTHONUNBUFFERED": "1",
        }

        def role(name: str, *arguments: str, pass_fds: tuple[int, ...] = ()) -> Role:
            log = log_folder / f"{name.replace(' ', '-')}.log" if log_folder else None
            return Role(name, list(arguments), environment, log, pass_fds)

        fd = listener.fileno()
        roles = [role("API", "api", "--fd", str(fd), pass_fds=(fd,)), role("dispatcher", "dispatcher")]
        roles += [role(f"worker {number + 1}", "worker") for number in range(num_workers)]
        service = Service(url, credentials, roles, servers)
        stack.callback(_stop, roles)
        for each in roles:
            each.start()
        _wait_ready(service)
        say(f"API, dispatcher and {num_workers} worker{'s' if num_workers != 1 else ''} started: {url}")
        try:
            yield service
        except StopRequested:
            say("Stopping")
            raise


def _start_servers(settings: Settings, stack: ExitStack, say: Say) -> local.LocalServers | None:
    if settings.database_url and settings.redis_url:
        return None
    servers = local.start_servers(settings.home)
    stack.callback(servers.stop)
    say("PostgreSQL 18 and Redis started")
    return servers


@contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """The API's socket, taken before anything starts, and kept while the API is started again."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ServeError(
            f"cannot listen on {host} port {port}: {_reason(error)}",
            hint="choose another with --port, or stop what listens there",
        ) from error
    with listener:
        yield listener


def _reason(error: OSError) -> str:
    """What the system says, without what the library adds; unknown host names have an errno of their own."""
    if error.errno is None or isinstance(error, socket.gaierror):
        return str(error.strerror or error)
    return os.strerror(error.errno)


def _reachable_host(address: str) -> str:
    """An address of this machine to connect to, where ``address`` may mean all of them."""
    if address == "0.0.0.0":  # noqa: S104 - compared, not bound
        return "127.0.0.1"
    if address == "::":
        return "[::1]"
    return f"[{address}]" if ":" in address else address


def _wait_ready(service: Service) -> None:
    deadline = time.monotonic() + READY_SECONDS
    with Client(service.url) as client:
        while not client.ready():
            service.check()
            if time.monotonic() > deadline:
                raise ServeError("the API does not become ready", hint=f"see {service.url}/readyz for what is missing")
            time.sleep(0.1)


def _stop(roles: list[Role]) -> None:
    for role in roles:
        role.ask_to_stop()
    deadline = time.monotonic() + STOP_SECONDS
    for role in roles:
        role.wait_stopped(deadline)
