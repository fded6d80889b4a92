"""A job's process that speaks the protocol of workers.runner and does what the model's name says, without torch."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--events-fd", type=int, required=True)
    parser.add_argument("--preload", action="store_true")
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    line = sys.stdin.buffer.readline()
    if not line:
        return
    order = json.loads(line)
    threading.Thread(target=_die_at_end_of_input, daemon=True).start()
    work, phase = Path(order["work"]), order["phase"]
    log = os.open(work / "logs" / f"{phase}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    with (work.parent / "processes.txt").open("a") as file:
        file.write(f"{phase} {os.getpid()} {'spare' if options.preload else 'cold'}\n")

    def emit(**event: Any) -> None:
        os.write(options.events_fd, json.dumps(event).encode() + b"\n")

    request = json.loads((work / "request.json").read_text())
    behaviour = request["model"]["id"].removeprefix("fake/")
    if phase == "fetch":
        (work / "environment.json").write_text(json.dumps(dict(os.environ)))
        emit(event="resolved", revision="ab" * 20)
    if phase == "compress" and behaviour in BEHAVIOURS:
        BEHAVIOURS[behaviour](work, request, options.events_fd)
    if phase == "compress":
        emit(event="stage", index=0, status="running")
        emit(event="progress", fraction=0.5, stage=0, step="model.layers.1", block=2, num_blocks=4)
        emit(event="stage", index=0, status="succeeded", metrics={"sparsity": 0.5, "odd": float("nan")})
        emit(event="warning", code="group_size_fallback", message="Layer x\x00\ud800 fell back.", param=None)
    if phase != "certify":
        emit(event="done", peak_memory_bytes=1000)
        return
    artifact = work / "artifact"
    artifact.mkdir()
    (artifact / "config.json").write_text("{}")
    (artifact / "report.json").write_text('{"version": 1, "quality": NaN}')
    (artifact / "seen.json").write_text((work / "environment.json").read_text())
    if (work / "source" / "artifact").exists():
        (artifact / "sources.txt").write_text(
            " ".join(sorted(path.name for path in (work / "source" / "artifact").iterdir()))
        )
    if behaviour == "link":
        (artifact / "secret").symlink_to("/etc/hostname")
    violated = [{"name": "max_size_bytes", "limit": 1, "value": 2}] if behaviour == "violated" else []
    emit(event="done", peak_memory_bytes=2000, result={"size_bytes": 2}, constraints_violated=violated)
    if behaviour == "lingers":
        time.sleep(600)


def _die_at_end_of_input() -> None:
    while os.read(0, 4096):
        continue
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _hang(_work: Path, _request: dict[str, Any], events_fd: int) -> None:
    os.write(events_fd, b'{"event": "progress", "fraction": 0.1}\n')
    time.sleep(600)


def _stubborn(work: Path, request: dict[str, Any], events_fd: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _hang(work, request, events_fd)


def _family(work: Path, request: dict[str, Any], events_fd: int) -> None:
    """Children of the group, and one that left it."""
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
    children = [
        subprocess.Popen([sys.executable, "-c", stubborn], start_new_session=leaves, pass_fds=(events_fd,))
        for leaves in (False, True)
    ]
    with (work.parent / "processes.txt").open("a") as file:
        for child in children:
            file.write(f"child {child.pid} cold\n")
    _hang(work, request, events_fd)


def _orphaning(work: Path, request: dict[str, Any], events_fd: int) -> None:
    """Dies and leaves a child that holds the pipe."""
    child = subprocess.Popen(["sleep", "600"], pass_fds=(events_fd,))
    with (work.parent / "processes.txt").open("a") as file:
        file.write(f"child {child.pid} cold\n")
    _kill_oneself(work, request, events_fd)


def _kill_oneself(_work: Path, _request: dict[str, Any], _events_fd: int) -> None:
    os.write(2, b"something went badly wrong\n")
    os.kill(os.getpid(), signal.SIGKILL)


def _finish_a_block(work: Path) -> int:
    """Add to the journal; how many blocks it had before."""
    folder = work / "journal"
    folder.mkdir(exist_ok=True)
    num_blocks = len(list(folder.iterdir()))
    (folder / f"block-{num_blocks:05d}.json").write_text("{}")
    return num_blocks


def _die_before_the_third_block(work: Path, request: dict[str, Any], events_fd: int) -> None:
    if _finish_a_block(work) < 2:
        _kill_oneself(work, request, events_fd)


def _hang_after_a_block(work: Path, request: dict[str, Any], events_fd: int) -> None:
    _finish_a_block(work)
    _hang(work, request, events_fd)


def _once(behave: Callable[[Path, dict[str, Any], int], None]) -> Callable[[Path, dict[str, Any], int], None]:
    def behave_once(work: Path, request: dict[str, Any], events_fd: int) -> None:
        if request["attempt"] == 1:
            behave(work, request, events_fd)

    return behave_once


def _say(text: bytes) -> Callable[[Path, dict[str, Any], int], None]:
    def say(_work: Path, _request: dict[str, Any], events_fd: int) -> None:
        with os.fdopen(os.dup(events_fd), "wb") as pipe:
            pipe.write(text)
        time.sleep(600)

    return say


def _exit(_work: Path, _request: dict[str, Any], _events_fd: int) -> None:
    os._exit(0)


def _eat(_work: Path, _request: dict[str, Any], _events_fd: int) -> None:
    eaten = bytearray(os.urandom(1024)) * (300 * 1024)
    time.sleep(600)
    del eaten


def _slow(_work: Path, _request: dict[str, Any], events_fd: int) -> None:
    for index in range(1, 121):
        os.write(events_fd, json.dumps({"event": "progress", "fraction": index / 120, "stage": 0}).encode() + b"\n")
        time.sleep(0.05)


BEHAVIOURS: dict[str, Callable[[Path, dict[str, Any], int], None]] = {
    "hang": _hang,
    "stubborn": _stubborn,
    "family": _family,
    "orphaning": _orphaning,
    "killed": _kill_oneself,
    "killed-once": _once(_kill_oneself),
    "hang-once": _once(_hang),
    "journal": _die_before_the_third_block,
    "journal-hang": _hang_after_a_block,
    "garbage": _say(b"this is not JSON\n"),
    "unknown": _say(b'{"event": "promise"}\n'),
    "endless-line": _say(b'{"event": "' + b"x" * 2_000_000),
    "nul": _say(b"\x00\xff\xfe\n"),
    "silent": _exit,
    "eats": _eat,
    "slow": _slow,
    "wrong": _say(
        b'{"event": "error", "code": "empty_dataset", "message": "No text.", "param": "recipe.calibration.dataset",'
        b' "hint": null, "blame": "user"}\n'
    ),
}

if __name__ == "__main__":
    main()
