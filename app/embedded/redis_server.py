"""The embedded Redis: append-only, never evicting, on a loopback port behind a password.

It listens on TCP and not on a Unix socket because Celery and redis-py spell the URL of a socket differently, and one
setting has to serve both.
"""

from __future__ import annotations

import secrets
import signal
import socket
from pathlib import Path

import redis

from app.embedded.account import Account
from app.embedded.binaries import Binaries
from app.embedded.errors import LocalServersError
from app.embedded.process import ServerProcess, log_tail, stop_leftover

MAX_TRIES = 5


class EmbeddedRedis:
    """A Redis server that ends with this process."""

    def __init__(self, folder: Path, binaries: Binaries, account: Account, *, durable: bool) -> None:
        """Start the server of ``folder``, on another port when somebody takes the chosen one first."""
        data = folder / "redis"
        data.mkdir(mode=0o700, exist_ok=True)
        account.own(data)
        pid_file = data / "redis.pid"
        stop_leftover(pid_file, data, signal.SIGTERM)
        password = secrets.token_urlsafe(32)
        for last_try in (*[False] * (MAX_TRIES - 1), True):
            port = _free_port()
            configuration = data / "redis.conf"
            configuration.unlink(missing_ok=True)
            configuration.touch(mode=0o600)
            configuration.write_text(_configuration(data, pid_file, port, password, durable=durable))
            account.own(configuration)
            self.process = ServerProcess(
                "Redis",
                [binaries.redis_server, configuration],
                account=account,
                log=folder / "redis.log",
                stop_signal=signal.SIGTERM,
            )
            self.url = f"redis://:{password}@127.0.0.1:{port}/0"
            try:
                self.process.wait_until(self._answers)
            except BaseException as error:
                self.process.stop()
                port_taken = isinstance(error, LocalServersError) and "in use" in log_tail(self.process.log, 3)
                if port_taken and not last_try:
                    continue
                raise
            return

    def keep(self) -> None:
        """Start the server again, on its data, if it ended by itself."""
        self.process.keep(self._answers)

    def stop(self) -> None:
        """Shut the server down."""
        self.process.stop()

    def _answers(self) -> bool:
        try:
            with redis.Redis.from_url(self.url, socket_connect_timeout=5, socket_timeout=5) as client:
                return bool(client.ping())
        except redis.ConnectionError:  # includes one that is still loading its data
            return False


def _configuration(data: Path, pid_file: Path, port: int, password: str, *, durable: bool) -> str:
    lines = {
        "bind": "127.0.0.1",
        "port": port,
        "requirepass": password,
        "dir": _quoted(data),
        "pidfile": _quoted(pid_file),
        "appendonly": "yes" if durable else "no",
        "save": '""',
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    return "".join(f"{name} {value}\n" for name, value in lines.items())


def _quoted(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
