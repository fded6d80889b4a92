"""The embedded PostgreSQL: a cluster made once, on a Unix socket, behind a password."""

from __future__ import annotations

import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import psycopg
from psycopg import sql

from app.embedded.account import Account
from app.embedded.binaries import Binaries
from app.embedded.errors import LocalServersError
from app.embedded.process import ServerProcess, stop_leftover

USER = DATABASE = "attar"
PORT = 5432  # only the last part of the socket's name: nothing listens on the network
MAX_SOCKET_PATH_BYTES = 107
MAJOR_VERSION = "18"


class EmbeddedPostgres:
    """A PostgreSQL server that ends with this process."""

    def __init__(self, folder: Path, binaries: Binaries, account: Account, *, durable: bool) -> None:
        """Start the server of ``folder``, made on the first call; not durable means fast, and lost with the power."""
        self._folder = folder
        self._binaries = binaries
        self._account = account
        data = folder / "postgres"
        password_file = folder / "postgres.password"
        if not data.is_dir():
            self._initialize(data, password_file, durable=durable)
        version = (data / "PG_VERSION").read_text().strip()
        if version != MAJOR_VERSION:
            raise LocalServersError(
                f"{data} was made by PostgreSQL {version}; this is {MAJOR_VERSION}",
                hint="move that folder away, or run its PostgreSQL yourself and set ATTAR_DATABASE_URL",
            )
        stop_leftover(data / "postmaster.pid", data, signal.SIGINT)
        self._socket_folder = self._make_socket_folder()
        settings = {
            "listen_addresses": "",
            "port": str(PORT),
            "unix_socket_directories": str(self._socket_folder),
            "unix_socket_permissions": "0700",
            "timezone": "UTC",
            "fsync": "on" if durable else "off",
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self.process = ServerProcess(
            "PostgreSQL",
            [binaries.postgres, "-D", data, *options],
            account=account,
            log=folder / "postgres.log",
            stop_signal=signal.SIGINT,  # PostgreSQL's fast shutdown: ends sessions, writes a checkpoint
        )
        password = password_file.read_text()
        self.url = self._url(password, DATABASE)
        self._answers = self._make_answers(password)
        try:
            self.process.wait_until(self._answers)
        except BaseException:
            self.stop()
            raise

    def keep(self) -> None:
        """Start the server again, on its data, if it ended by itself."""
        self.process.keep(self._answers)

    def stop(self) -> None:
        """Shut the server down and remove its socket's folder."""
        self.process.stop()
        shutil.rmtree(self._socket_folder, ignore_errors=True)

    def _initialize(self, data: Path, password_file: Path, *, durable: bool) -> None:
        password = secrets.token_urlsafe(32)
        partial = data.with_name(data.name + ".partial")  # a killed initdb leaves nothing that looks complete
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
        self._account.own(partial)
        with tempfile.NamedTemporaryFile("w", dir=self._folder) as handed_over:
            handed_over.write(password)
            handed_over.flush()
            self._account.own(Path(handed_over.name))
            command: list[str | Path] = [
                self._binaries.initdb,
                f"--pgdata={partial}",
                f"--username={USER}",
                f"--pwfile={handed_over.name}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--locale-provider=builtin",
                "--locale=C.UTF-8",
                "--lc-collate=C",
                "--lc-ctype=C",
                "--lc-messages=C",
                "--lc-monetary=C",
                "--lc-numeric=C",
                "--lc-time=C",
            ]
            if not durable:
                command.append("--no-sync")
            result = subprocess.run(
                command, capture_output=True, text=True, cwd="/", check=False, **self._account.as_user()
            )
        if result.returncode != 0:
            shutil.rmtree(partial, ignore_errors=True)
            raise LocalServersError(f"PostgreSQL could not make its data folder: {result.stderr.strip()}")
        password_file.touch(mode=0o600)
        password_file.write_text(password)
        partial.rename(data)

    def _make_socket_folder(self) -> Path:
        """A private folder for the socket, near the data where its path is short enough for a Unix socket."""
        folder = self._folder / "run"
        if len(str(folder / f".s.PGSQL.{PORT}.lock").encode()) > MAX_SOCKET_PATH_BYTES:
            folder = Path(tempfile.mkdtemp(prefix="attar-", dir="/tmp"))  # short; private, with a random name
        else:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
        self._account.own(folder)
        return folder

    def _url(self, password: str, database: str) -> str:
        return f"postgresql://{USER}:{password}@/{database}?host={quote(str(self._socket_folder))}&port={PORT}"

    def _make_answers(self, password: str) -> Callable[[], bool]:
        maintenance = self._url(password, "postgres")

        def answers() -> bool:
            try:
                with psycopg.connect(maintenance, autocommit=True, connect_timeout=5) as connection:
                    found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone()
                    if found is None:
                        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
            except psycopg.OperationalError as error:
                if "password authentication failed" in str(error):
                    raise LocalServersError(
                        f"the password in {self._folder / 'postgres.password'} is not the one of its database"
                    ) from None
                return False
            return True

        return answers
