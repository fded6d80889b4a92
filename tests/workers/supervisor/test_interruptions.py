"""What ends an attempt from outside: cancel, lost leases, limits, the worker's own end."""

from __future__ import annotations

import time

import pytest
from sqlalchemy import update

from app.artifacts import service as artifacts
from app.attempts import service as attempts
from app.database import Database
from app.jobs.models import Job
from app.settings import Settings
from app.storage import Storage
from tests.jobs import insert_job, read_attempts, read_job, wait_until
from tests.workers.supervisor.running import (
    LONG_AGO,
    Running,
    alive,
    claim,
    claimed,
    new_supervisor,
    processes,
    wait_for_compress,
    work_folders,
)
from workers.supervisor import Supervisor

pytestmark = pytest.mark.service


@pytest.mark.parametrize("behaviour", ["hang", "stubborn", "family"])
def test_cancel_stops_every_process_within_seconds(
    supervisor: Supervisor, quick: Settings, database: Database, behaviour: str
) -> None:
    job = claimed(database, quick, behaviour)
    running = Running(supervisor, job)
    wait_for_compress(quick, 4 if behaviour == "family" else 2)
    wait_until(lambda: read_job(database, job.job_id).progress.get("fraction", 0) > 0.05)
    asked_at = time.monotonic()
    with database.transaction() as session:
        attempts.request_cancel(session, "default", job.job_id)
    assert running.end() == "cancelled"
    assert time.monotonic() - asked_at < 5
    assert read_job(database, job.job_id).status == "cancelled"
    assert alive(quick) == []
    assert work_folders(quick) == []


def test_a_lost_lease_kills_the_processes_and_leaves_the_row_alone(
    supervisor: Supervisor, quick: Settings, database: Database
) -> None:
    job = claimed(database, quick, "stubborn")
    running = Running(supervisor, job)
    wait_for_compress(quick)
    with database.transaction() as session:
        session.execute(update(Job).where(Job.id == job.job_id).values(lease_expires_at=LONG_AGO))
        assert [reaped.job_id for reaped in attempts.reap(session)] == [job.job_id]
    successor = claim(database, quick)
    assert running.end() == "lost"
    row = read_job(database, job.job_id)
    assert (row.status, row.fence) == ("running", successor.fence)
    assert alive(quick) == []


def test_a_lease_is_kept_up_while_a_long_phase_runs(
    supervisor: Supervisor, quick: Settings, database: Database
) -> None:
    job = claimed(database, quick, "slow")
    running = Running(supervisor, job)
    fractions = []
    while len(processes(quick)) < 3:
        with database.transaction() as session:
            assert attempts.reap(session) == []
        fractions.append(read_job(database, job.job_id).progress.get("fraction", 0))
        time.sleep(0.2)
    assert running.end() == "succeeded"
    assert fractions == sorted(fractions)
    assert len(set(fractions)) > 3


def test_a_job_that_takes_too_long_fails(supervisor: Supervisor, quick: Settings, database: Database) -> None:
    job = claimed(database, quick, "hang", timeout_seconds=2)
    assert supervisor.run(job) == "failed"
    row = read_job(database, job.job_id)
    assert row.error is not None
    assert (row.error["code"], row.error["param"]) == ("timeout", "timeout_seconds")
    assert alive(quick) == []


def test_a_job_that_takes_too_much_memory_is_stopped(quick: Settings, database: Database, storage: Storage) -> None:
    limited = quick.model_copy(update={"memory_limit_bytes": 200 * 1024 * 1024})
    supervisor = new_supervisor(limited, database, storage)
    job = claimed(database, quick, "eats")
    assert supervisor.run(job) == "retried"
    attempt = read_attempts(database, job.job_id)[0]
    assert attempt.error is not None
    assert attempt.error["code"] == "out_of_memory"
    assert attempt.peak_memory_bytes is not None
    assert attempt.peak_memory_bytes > 200 * 1024 * 1024
    assert alive(quick) == []
    supervisor.close()


def test_a_process_that_is_done_and_does_not_end_is_ended(
    supervisor: Supervisor, quick: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.supervisor.phases._AFTER_DONE_SECONDS", 0.5)
    job = claimed(database, quick, "lingers")
    assert supervisor.run(job) == "succeeded"
    assert alive(quick) == []


def test_a_worker_that_stops_gives_its_job_back(supervisor: Supervisor, quick: Settings, database: Database) -> None:
    job = claimed(database, quick, "hang")
    running = Running(supervisor, job)
    wait_for_compress(quick)
    supervisor.stop()
    assert running.end() == "released"
    row = read_job(database, job.job_id)
    assert (row.status, row.num_infrastructure_failures, row.num_crashes) == ("queued", 0, 0)
    assert alive(quick) == []


def test_a_job_recompresses_an_earlier_result_of_its_tenant_only(
    supervisor: Supervisor, quick: Settings, database: Database, storage: Storage
) -> None:
    first = claimed(database, quick, "normal")
    assert supervisor.run(first) == "succeeded"
    insert_job(database, model_id=f"job:{first.job_id}")
    second = claim(database, quick)
    assert supervisor.run(second) == "succeeded"
    copied = b"".join(storage.open_range(f"{artifacts.artifact_prefix(second.job_id, 1)}/sources.txt"))
    assert copied.decode().split() == ["config.json", "manifest.json", "report.json", "seen.json"]
    insert_job(database, model_id=f"job:{first.job_id}", tenant_id="other")
    foreign = claim(database, quick)
    assert supervisor.run(foreign) == "failed"
    assert (read_job(database, foreign.job_id).error or {})["code"] == "model_not_found"


def test_files_that_a_lost_attempt_left_in_storage_are_removed_when_the_job_ends(
    supervisor: Supervisor, quick: Settings, database: Database, storage: Storage
) -> None:
    job = claimed(database, quick, "normal")
    storage.put_bytes(f"{artifacts.artifact_prefix(job.job_id, job.fence)}/config.json", b"half")
    with database.transaction() as session:
        session.execute(update(Job).where(Job.id == job.job_id).values(lease_expires_at=LONG_AGO))
        attempts.reap(session)
    again = claim(database, quick)
    assert supervisor.run(again) == "succeeded"
    left = sorted(path.name for path in (quick.home / "storage" / "artifacts" / job.job_id).iterdir())
    assert left == [str(again.fence)]
