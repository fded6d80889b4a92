"""Embedded servers: made once, kept, private, alone on their home, and gone with their parent."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from app.local import HomeInUseError, LocalServers, LocalServersError, remove_servers, running_servers, start_servers
from tests.jobs import wait_until

pytestmark = pytest.mark.service


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    remove_servers(tmp_path)


def server_pids(servers: LocalServers) -> list[int]:
    return [server.process.pid for server in servers._servers]


def test_it_is_postgresql_18_with_utf8_and_checksums(servers: LocalServers) -> None:
    names = ("server_encoding", "data_checksums", "listen_addresses", "timezone")
    with psycopg.connect(servers.database_url) as connection:
        assert connection.info.server_version // 10_000 == 18
        shown = [connection.execute(f"SHOW {name}").fetchone() for name in names]
    assert shown == [("UTF8",), ("on",), ("",), ("UTC",)]


def test_redis_keeps_wake_ups_and_evicts_none(home: Path) -> None:
    with start_servers(home) as servers, redis.Redis.from_url(servers.redis_url) as client:
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}


def test_a_second_start_finds_what_the_first_wrote(home: Path) -> None:
    with start_servers(home) as servers, psycopg.connect(servers.database_url) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS number")
    with start_servers(home) as servers, psycopg.connect(servers.database_url) as connection:
        assert connection.execute("SELECT number FROM kept").fetchone() == (7,)


def test_nobody_enters_without_the_password(servers: LocalServers) -> None:
    user, host = servers.database_url.partition("@")[::2]
    without = user.rpartition(":")[0] + "@" + host
    with pytest.raises(psycopg.OperationalError, match="no password supplied"):
        psycopg.connect(without)
    wrong = servers.redis_url.replace(":", ":x", 2).replace("redis:x", "redis:")
    with redis.Redis.from_url(wrong) as client, pytest.raises(redis.AuthenticationError):
        client.ping()


def test_no_secret_is_readable_by_others_or_shown_by_ps(home: Path) -> None:
    with start_servers(home) as servers:
        passwords = {url.split(":")[2].split("@")[0] for url in (servers.database_url, servers.redis_url)}
        for pid in server_pids(servers):
            command = " ".join(psutil.Process(pid).cmdline())
            assert not any(password in command for password in passwords)
        assert (home / "servers.json").stat().st_mode & 0o077 == 0


def test_a_home_has_one_owner_at_a_time(home: Path) -> None:
    with start_servers(home):
        with pytest.raises(HomeInUseError, match=f"process {os.getpid()}") as raised:
            start_servers(home)
        with pytest.raises(HomeInUseError):
            remove_servers(home)
        assert raised.value.hint is not None
    with start_servers(home):
        pass


def test_running_servers_are_found_by_home_and_forgotten_when_stopped(home: Path) -> None:
    assert running_servers(home) is None
    with start_servers(home) as servers:
        found = running_servers(home)
        assert found is not None
        assert (found.database_url, found.redis_url) == (servers.database_url, servers.redis_url)
    assert running_servers(home) is None


def test_servers_end_when_their_parent_is_killed_and_start_again_on_the_same_data(home: Path) -> None:
    script = f"""
        import json, sys, time
        from pathlib import Path
        import psycopg
        from app.local import start_servers
        servers = start_servers(Path({str(home)!r}))
        with psycopg.connect(servers.database_url) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 7 AS number")
        print(json.dumps([server.process.pid for server in servers._servers]), flush=True)
        time.sleep(600)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = json.loads(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert running_servers(home) is None, "a file that a killed process left is no running server"
    with start_servers(home) as servers, psycopg.connect(servers.database_url) as connection:
        assert connection.execute("SELECT number FROM kept").fetchone() == (7,)
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_servers_that_are_killed_are_started_again_on_their_data(home: Path) -> None:
    with start_servers(home) as servers:
        with psycopg.connect(servers.database_url) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 7 AS number")
        with redis.Redis.from_url(servers.redis_url) as broker:
            broker.set("kept", 8)
        before = server_pids(servers)
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(server.process.running for server in servers._servers))
        servers.keep()
        assert not set(before) & set(server_pids(servers))
        with psycopg.connect(servers.database_url) as connection:
            assert connection.execute("SELECT number FROM kept").fetchone() == (7,)
        with redis.Redis.from_url(servers.redis_url) as broker:
            assert broker.get("kept") == b"8"


def test_a_server_that_cannot_stay_is_given_up_by_name(home: Path) -> None:
    with start_servers(home, temporary=True) as servers:
        (folder,) = [
            Path(process.cwd()) for process in map(psutil.Process, server_pids(servers)) if "redis" in process.name()
        ]
        (folder / "redis.conf").write_text("no-such-setting yes")
        os.kill(server_pids(servers)[0], signal.SIGKILL)
        wait_until(lambda: not all(server.process.running for server in servers._servers))
        with pytest.raises(LocalServersError, match="Redis ends again and again"):
            servers.keep()


def test_temporary_servers_leave_no_data(home: Path) -> None:
    with start_servers(home, temporary=True) as servers:
        folder = servers._remove
        assert folder is not None
        assert folder.is_dir()
    assert not folder.exists()


def test_removed_servers_begin_anew(home: Path) -> None:
    with start_servers(home) as servers, psycopg.connect(servers.database_url) as connection:
        connection.execute("CREATE TABLE gone ()")
    remove_servers(home)
    with start_servers(home, temporary=True) as servers, psycopg.connect(servers.database_url) as connection:
        assert connection.execute("SELECT to_regclass('gone')").fetchone() == (None,)
