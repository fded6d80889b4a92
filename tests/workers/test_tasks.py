"""Real workers on real servers: wake-ups, kills, stops and freezes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from app import dispatcher, queue
from app.attempts import service as attempts
from app.database import Database
from app.settings import Settings
from tests.jobs import abandon_jobs, insert_job, read_attempts, read_job, wait_until

pytestmark = pytest.mark.service


@pytest.fixture(autouse=True)
def _no_other_jobs(database: Database) -> None:
    abandon_jobs(database)


@pytest.fixture
def quick(settings: Settings, tmp_path: Path) -> Settings:
    """Short leases, in a work folder of the test's own."""
    quick = settings.model_copy(
        update={
            "work_dir": tmp_path / "work",
            "lease_seconds": 3.0,
            "heartbeat_seconds": 0.5,
            "status_poll_seconds": 0.1,
            "dispatch_seconds": 0.1,
            "reap_seconds": 0.2,
        }
    )
    queue.connect(quick)
    return quick


@contextmanager
def worker(settings: Settings, log: Path, name: str = "cpu") -> Iterator[psutil.Process]:
    """A worker process, killed in the end if it still runs."""
    environment = {
        **os.environ,
        "ATTAR_DATABASE_URL": settings.required_database_url,
        "ATTAR_REDIS_URL": settings.required_redis_url,
        "ATTAR_HOME": str(settings.home),
        "ATTAR_WORK_DIR": str(settings.work_dir),
        "ATTAR_LEASE_SECONDS": str(settings.lease_seconds),
        "ATTAR_HEARTBEAT_SECONDS": str(settings.heartbeat_seconds),
        "ATTAR_STATUS_POLL_SECONDS": str(settings.status_poll_seconds),
    }
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.workers.worker_process", name], env=environment, stdout=file, stderr=file
        )
    try:
        yield psutil.Process(process.pid)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()


@contextmanager
def dispatching(settings: Settings) -> Iterator[None]:
    """A running dispatcher."""
    stop = threading.Event()
    thread = threading.Thread(target=dispatcher.run, args=(settings, stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def job_processes(settings: Settings, phase: str = "") -> list[int]:
    try:
        lines = (settings.work_dir / "processes.txt").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [int(line.split()[1]) for line in lines if line.startswith(phase)]


def wait_for_status(database: Database, job_id: str, status: str, timeout_seconds: float = 30) -> None:
    wait_until(lambda: read_job(database, job_id).status == status, timeout_seconds)


def test_a_worker_does_what_waits_and_is_woken_by_redis(quick: Settings, database: Database, tmp_path: Path) -> None:
    with worker(quick, tmp_path / "worker.log"):
        early = [insert_job(database) for _ in range(3)]
        assert queue.wake("cpu")
        for job_id in early:
            wait_for_status(database, job_id, "succeeded")
        late = insert_job(database)
        assert queue.wake("cpu")
        wait_for_status(database, late, "succeeded")


def test_a_worker_says_that_its_queue_has_one(quick: Settings, tmp_path: Path) -> None:
    assert queue.has_worker("announced") is False
    with worker(quick, tmp_path / "worker.log", "announced"):
        wait_until(lambda: queue.has_worker("announced"))
    assert queue.has_worker("silent") is False


def test_a_wake_up_without_a_job_does_nothing(quick: Settings, database: Database, tmp_path: Path) -> None:
    with worker(quick, tmp_path / "worker.log"):
        for _ in range(5):
            assert queue.wake("cpu")
        wait_until(lambda: queue.num_waiting("cpu") == 0)
        job_id = insert_job(database)
        assert queue.wake("cpu")
        wait_for_status(database, job_id, "succeeded")
        assert len(read_attempts(database, job_id)) == 1


def test_a_killed_worker_takes_its_processes_with_it_and_its_job_runs_elsewhere(
    quick: Settings, database: Database, tmp_path: Path
) -> None:
    job_id = insert_job(database, model_id="fake/hang-once")
    with dispatching(quick):
        with worker(quick, tmp_path / "first.log") as first:
            [compress] = wait_until(lambda: job_processes(quick, "compress"))
            first.send_signal(signal.SIGKILL)
            wait_until(lambda: not psutil.pid_exists(compress), 5)
            assert read_job(database, job_id).status == "running"
        with worker(quick, tmp_path / "second.log"):
            wait_for_status(database, job_id, "succeeded")
            wait_until(lambda: [path.name for path in quick.work_dir.iterdir()] == ["processes.txt"])
    assert [attempt.outcome for attempt in read_attempts(database, job_id)] == ["lost", "succeeded"]


def test_a_worker_that_froze_and_woke_again_loses_to_its_successor(
    quick: Settings, database: Database, tmp_path: Path
) -> None:
    job_id = insert_job(database, model_id="fake/hang-once")
    with dispatching(quick), worker(quick, tmp_path / "first.log") as first:
        [compress] = wait_until(lambda: job_processes(quick, "compress"))
        first.suspend()
        with worker(quick, tmp_path / "second.log"):
            wait_for_status(database, job_id, "succeeded")
        first.resume()
        wait_until(lambda: not psutil.pid_exists(compress), 10)
    assert [attempt.outcome for attempt in read_attempts(database, job_id)] == ["lost", "succeeded"]
    assert read_job(database, job_id).status == "succeeded"


def test_a_killed_process_of_a_job_is_noticed_and_the_job_tried_again(
    quick: Settings, database: Database, tmp_path: Path
) -> None:
    job_id = insert_job(database, model_id="fake/hang-once")
    with dispatching(quick), worker(quick, tmp_path / "worker.log"):
        [compress] = wait_until(lambda: job_processes(quick, "compress"))
        os.kill(compress, signal.SIGKILL)
        wait_for_status(database, job_id, "succeeded")
    assert [attempt.outcome for attempt in read_attempts(database, job_id)] == ["retried", "succeeded"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_worker_gives_its_job_back_and_leaves_nothing(
    quick: Settings, database: Database, tmp_path: Path, number: signal.Signals
) -> None:
    job_id = insert_job(database, model_id="fake/stubborn")
    with worker(quick, tmp_path / "worker.log") as process:
        wait_until(process.children, 15)
        wait_until(lambda: queue.wake("cpu") and job_processes(quick, "compress"))
        children = process.children(recursive=True)
        assert len(children) >= 1
        asked_at = time.monotonic()
        process.send_signal(number)
        process.wait(15)
        assert time.monotonic() - asked_at < 12
        assert not [child for child in children if child.is_running()]
    row = read_job(database, job_id)
    assert (row.status, row.num_infrastructure_failures) == ("queued", 0)
    assert [attempt.outcome for attempt in read_attempts(database, job_id)] == ["released"]
    assert [path.name for path in quick.work_dir.iterdir()] == ["processes.txt"]


def test_a_running_job_is_cancelled_within_seconds(quick: Settings, database: Database, tmp_path: Path) -> None:
    job_id = insert_job(database, model_id="fake/stubborn")
    with dispatching(quick), worker(quick, tmp_path / "worker.log"):
        wait_until(lambda: job_processes(quick, "compress"))
        with database.transaction() as session:
            assert attempts.request_cancel(session, "default", job_id) == "cancelling"
        wait_for_status(database, job_id, "cancelled", 5)
        after = insert_job(database)
        wait_for_status(database, after, "succeeded")


def test_a_worker_never_imports_torch() -> None:
    code = "import workers.tasks, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
