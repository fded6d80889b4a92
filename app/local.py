"""PostgreSQL and Redis for one machine, under one home folder, without Docker and without a system service."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from app.embedded.account import SYSTEM_FOLDER, Account, servers_account
from app.embedded.binaries import find_binaries
from app.embedded.errors import HomeInUseError, LocalServersError
from app.embedded.postgres import EmbeddedPostgres
from app.embedded.redis_server import EmbeddedRedis
from app.files import write_private

__all__ = [
    "HomeInUseError",
    "LocalServers",
    "LocalServersError",
    "ServerUrls",
    "remove_servers",
    "running_servers",
    "start_servers",
]


@dataclass(frozen=True)
class ServerUrls:
    """Where running embedded servers answer."""

    database_url: str
    redis_url: str


class LocalServers:
    """Running embedded servers; they end with :meth:`stop`, or with this process, however it ends."""

    def __init__(
        self, postgres: EmbeddedPostgres, redis: EmbeddedRedis, home: Path, lock: IO[str], remove: Path | None
    ) -> None:
        self.database_url = postgres.url
        self.redis_url = redis.url
        self._servers = (redis, postgres)
        self._announcement = home / "servers.json"
        self._lock = lock
        self._remove = remove

    def keep(self) -> None:
        """Start again what ended by itself; raise LocalServersError when that does not help."""
        for server in self._servers:
            server.keep()

    def stop(self) -> None:
        """Stop both in good order. A second call does nothing."""
        self._announcement.unlink(missing_ok=True)
        for server in self._servers:
            server.stop()
        if self._remove is not None:
            shutil.rmtree(self._remove, ignore_errors=True)
        self._lock.close()

    def __enter__(self) -> Self:
        """The servers themselves."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop them."""
        self.stop()


def start_servers(home: Path, *, temporary: bool = False) -> LocalServers:
    """Start PostgreSQL 18 and Redis on the data that belongs to ``home``, made on the first call.

    Call it from a thread that lives as long as the servers should, such as the main one. ``temporary`` servers (tests)
    do not wait for the disk, and remove their data when stopped.

    Raises:
        HomeInUseError: another process runs the servers of this home.
        LocalServersError: they cannot run here; its ``hint`` says what to do.
    """
    home = home.absolute()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = _lock(home)
    try:
        account = servers_account()
        folder = _data_folder(home, account)
        binaries = find_binaries(account)
        postgres = EmbeddedPostgres(folder, binaries, account, durable=not temporary)
        try:
            redis = EmbeddedRedis(folder, binaries, account, durable=not temporary)
        except BaseException:
            postgres.stop()
            raise
    except BaseException:
        lock.close()
        raise
    servers = LocalServers(postgres, redis, home, lock, folder if temporary else None)
    write_private(home / "servers.json", json.dumps({"database_url": postgres.url, "redis_url": redis.url}))
    return servers


def remove_servers(home: Path) -> None:
    """Delete the servers' data of ``home``: every job and key that they hold. Raises HomeInUseError while they run."""
    if not (home / "servers.lock").exists():
        return
    with _lock(home.absolute()):
        name_file = home / "servers.name"
        if name_file.exists():
            shutil.rmtree(SYSTEM_FOLDER / name_file.read_text().strip(), ignore_errors=True)
            name_file.unlink()
        shutil.rmtree(home / "servers", ignore_errors=True)


def running_servers(home: Path) -> ServerUrls | None:
    """The servers that another process runs for ``home``; None where none runs."""
    try:
        urls = json.loads((home / "servers.json").read_text())
        with (home / "servers.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return ServerUrls(urls["database_url"], urls["redis_url"])
    except (FileNotFoundError, ValueError):
        return None
    return None  # nobody holds the lock: the file was left by a killed process


def _lock(home: Path) -> IO[str]:
    """Take the home for this process; the kernel gives it back when the process ends, however it ends."""
    lock = (home / "servers.lock").open("a+")
    for last_try in (False, False, True):  # someone who only asks whether servers run holds it for a moment
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if last_try:
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
                lock.close()
                raise HomeInUseError(
                    f"the servers of {home} are already run by process {holder}",
                    hint="stop that one first, or set ATTAR_HOME to another folder",
                ) from None
            time.sleep(0.1)
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _data_folder(home: Path, account: Account) -> Path:
    """Where the servers' data lies: under home, or beside the other data of the dedicated account.

    There the folder has a random name that home keeps, so that a home made anew never finds an old database.
    """
    if account.shared_folder is None:
        folder = home / "servers"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder
    name_file = home / "servers.name"
    if not name_file.exists():
        write_private(name_file, secrets.token_hex(8))
    folder = account.shared_folder / name_file.read_text().strip()
    folder.mkdir(mode=0o711, exist_ok=True)
    return folder
