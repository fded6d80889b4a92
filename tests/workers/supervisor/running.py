"""A supervisor on real processes that behave as they are told (tests.workers.fake_runner)."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from pathlib import Path

import psutil

from app.attempts import service as attempts
from app.attempts.service import Claim, Outcome
from app.database import Database
from app.settings import Settings
from app.storage import Storage
from tests.jobs import insert_job, wait_until
from workers.supervisor import Supervisor

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


def new_supervisor(settings: Settings, database: Database, storage: Storage) -> Supervisor:
    return Supervisor(settings, database, storage, runner_module="tests.workers.fake_runner")


def claimed(database: Database, settings: Settings, behaviour: str, **columns: object) -> Claim:
    insert_job(database, model_id=f"fake/{behaviour}", **columns)  # type: ignore[arg-type]
    return claim(database, settings)


def claim(database: Database, settings: Settings) -> Claim:
    with database.transaction() as session:
        found = attempts.claim(session, "cpu", "worker", settings.lease_seconds)
    assert found is not None
    return found


class Running:
    """An attempt in a thread of its own, as in a worker."""

    def __init__(self, supervisor: Supervisor, claim: Claim) -> None:
        self.outcome: Outcome | None = None
        self._thread = threading.Thread(target=self._run, args=(supervisor, claim))
        self._thread.start()

    def _run(self, supervisor: Supervisor, claim: Claim) -> None:
        self.outcome = supervisor.run(claim)

    def end(self, timeout_seconds: float = 20) -> Outcome | None:
        self._thread.join(timeout_seconds)
        assert not self._thread.is_alive(), "the attempt did not end"
        return self.outcome


def command_of(process: psutil.Process) -> list[str]:
    """Its command line; empty when it is gone."""
    try:
        command: list[str] = process.cmdline()
    except psutil.Error:
        return []
    return command


def processes(settings: Settings) -> list[tuple[str, int, str]]:
    """Every process that ran: phase, id, spare or cold."""
    try:
        lines = (settings.work_dir / "processes.txt").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [(phase, int(pid), kind) for phase, pid, kind in (line.split() for line in lines)]


def alive(settings: Settings) -> list[int]:
    return [pid for _, pid, _ in processes(settings) if lives(pid)]


def lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_for_compress(settings: Settings, num_processes: int = 2) -> None:
    wait_until(lambda: len(processes(settings)) >= num_processes and processes(settings)[1][0] == "compress")


def num_descriptors() -> int:
    return int(psutil.Process().num_fds())


def work_folders(settings: Settings) -> list[Path]:
    return [path for path in settings.work_dir.iterdir() if path.name.startswith("job_")]
