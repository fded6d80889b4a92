"""One server process: its failures are told with its log, and strangers are left alone."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from app.embedded.account import Account
from app.embedded.errors import LocalServersError
from app.embedded.process import MAX_LOG_BYTES, ServerProcess, log_tail, stop_leftover


def start(tmp_path: Path, code: str) -> ServerProcess:
    return ServerProcess(
        "Server",
        [sys.executable, "-c", code],
        account=Account(),
        log=tmp_path / "server.log",
        stop_signal=signal.SIGTERM,
    )


def test_a_server_that_ends_at_once_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    server = start(tmp_path, "import sys; sys.exit('no disk left')")
    with pytest.raises(LocalServersError, match=r"ended with status 1(.|\n)*no disk left"):
        server.wait_until(lambda: False)


def test_a_server_that_does_not_listen_to_its_signal_is_ended_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.embedded.process.STOP_SECONDS", 0.2)
    ready = tmp_path / "ready"
    code = f"import signal, time; signal.signal(15, signal.SIG_IGN); open({str(ready)!r}, 'w'); time.sleep(600)"
    server = start(tmp_path, code)
    server.wait_until(ready.exists)
    server.stop()
    assert not server.running
    server.stop()


def test_a_long_log_is_set_aside(tmp_path: Path) -> None:
    with (tmp_path / "server.log").open("wb") as log:
        log.truncate(MAX_LOG_BYTES + 1)
    start(tmp_path, "print('new')")._process.wait()
    assert (tmp_path / "server.old.log").stat().st_size == MAX_LOG_BYTES + 1
    assert log_tail(tmp_path / "server.log") == "new"


def test_a_leftover_that_works_in_the_folder_is_ended(tmp_path: Path) -> None:
    leftover = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], cwd=tmp_path)
    pid_file = tmp_path / "server.pid"
    pid_file.write_text(f"{leftover.pid}\nmore\n")
    stop_leftover(pid_file, tmp_path, signal.SIGTERM)
    assert not psutil.pid_exists(leftover.pid)
    leftover.wait(5)
    assert not pid_file.exists()


@pytest.mark.parametrize("content", ["this process", "4194304", "no number", ""])
def test_a_pid_file_that_names_a_stranger_or_nobody_harms_nobody(tmp_path: Path, content: str) -> None:
    pid_file = tmp_path / "server.pid"
    pid_file.write_text(str(os.getpid()) if content == "this process" else content)
    stop_leftover(pid_file, tmp_path, signal.SIGTERM)
    assert not pid_file.exists()
