"""`attar serve`: one command that starts everything, keeps it running, and leaves nothing behind."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from app.client import ENDED, Client
from app.local import remove_servers
from tests.jobs import wait_until
from tests.models import write_tiny_llama

pytestmark = pytest.mark.service


class Serving:
    """A running `attar serve` and what it wrote to standard error."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, home: Path) -> None:
        self.process = process
        self._log = log
        self.home = home

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.output
            return "Attar is ready" in self.output

        wait_until(ready, 60)

    @property
    def credentials(self) -> dict[str, str]:
        kept: dict[str, str] = json.loads((self.home / "credentials.json").read_text())
        return kept

    def client(self) -> Client:
        return Client(self.credentials["url"], self.credentials["api_key"])

    def roles(self) -> dict[str, psutil.Process]:
        found = {}
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.Error):  # a zombie, or gone since
                if (command := child.cmdline())[1:3] == ["-m", "app.cli"]:
                    found[command[3]] = child
        return found

    def role(self, name: str) -> psutil.Process:
        return self.roles()[name]

    def has_another(self, before: psutil.Process, name: str) -> bool:
        now = self.roles().get(name)
        return now is not None and now.pid != before.pid


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    home = tmp_path / "home"
    yield home
    remove_servers(home)


@pytest.fixture
def serve(home: Path, tmp_path: Path) -> Iterator[Callable[..., Serving]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> Serving:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ATTAR_")}
        log = tmp_path / f"serve-{len(started)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "app.cli", "serve", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**environment, "ATTAR_HOME": str(home)},
            )
        started.append(process)
        return Serving(process, log, home)

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


@contextmanager
def nothing_left(serving: Serving) -> Iterator[None]:
    """Every process below ``serving`` is gone afterwards."""
    family = psutil.Process(serving.process.pid).children(recursive=True)
    assert len(family) >= 5
    yield
    wait_until(lambda: not any(member.is_running() for member in family), 40)


def test_ctrl_c_stops_everything_in_good_order(serve: Callable[..., Serving]) -> None:
    serving = serve("--port", "0")
    serving.wait_ready()
    with nothing_left(serving):
        serving.process.send_signal(signal.SIGINT)
        assert serving.process.wait(40) == 0
    assert serving.output.rstrip().endswith("Stopped")
    assert "Traceback" not in serving.output


def test_the_first_key_is_kept_over_restarts_and_made_anew_when_revoked(serve: Callable[..., Serving]) -> None:
    first = serve("--port", "0")
    first.wait_ready()
    with first.client() as client:
        assert client.jobs()["data"] == []
    kept = first.credentials
    with nothing_left(first):
        first.process.send_signal(signal.SIGHUP)
        assert first.process.wait(40) == 0

    second = serve("--port", "0")
    second.wait_ready()
    assert second.credentials["api_key"] == kept["api_key"]
    for key in json.loads(run(second, "keys", "list", "--json").stdout)["data"]:
        assert run(second, "keys", "revoke", key["id"]).returncode == 0
    with nothing_left(second):
        second.process.kill()

    third = serve("--port", "0")
    third.wait_ready()
    with third.client() as client:
        client.jobs()
    assert third.credentials["api_key"] != kept["api_key"]
    assert (third.home / "credentials.json").stat().st_mode & 0o077 == 0
    third.process.terminate()
    assert third.process.wait(40) == 0


def run(serving: Serving, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ATTAR_HOME": str(serving.home)}
    return subprocess.run(
        [sys.executable, "-m", "app.cli", *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_it_owns_its_home_and_keeps_its_roles_and_servers_running(serve: Callable[..., Serving]) -> None:
    serving = serve("--port", "0")
    serving.wait_ready()

    second = serve("--port", "0")
    assert second.process.wait(30) == 1
    assert f"already run by process {serving.process.pid}" in second.output

    for name in ("api", "dispatcher", "worker"):
        before = serving.role(name)
        before.kill()
        wait_until(partial(serving.has_another, before, name))
    assert serving.output.count("was ended by SIGKILL; starting it again") == 3
    with serving.client() as client:
        wait_until(client.ready)

    for child in psutil.Process(serving.process.pid).children():
        if child.name() in ("redis-server", "postgres"):
            child.kill()
    wait_until(lambda: serving.output.count("ended by itself; starting it again") == 2)
    (serving.home / "models").mkdir()
    write_tiny_llama(serving.home / "models" / "tiny")
    with serving.client() as client:
        wait_until(client.ready)
        # Dispatcher and worker find their servers again, too.
        job = client.submit({"model": {"id": "file:tiny"}, "recipe": "int8"})
        wait_until(lambda: client.job(job["id"])["status"] in ENDED, 60)
        assert client.job(job["id"])["status"] == "succeeded"
    with nothing_left(serving):
        serving.process.terminate()
        assert serving.process.wait(60) in (0, 130)


def test_a_taken_port_is_told_before_anything_starts(serve: Callable[..., Serving]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        serving = serve("--port", str(taken.getsockname()[1]))
        assert serving.process.wait(30) == 1
    assert re.search(r"cannot listen on 127\.0\.0\.1 port \d+: Address already in use", serving.output)
    assert "--port" in serving.output
    assert not serving.home.exists()
