from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil
import psycopg
import pytest
from psycopg import sql
from sqlalchemy import update
from sqlalchemy.engine import make_url

from app.artifacts import service as artifacts
from app.attempts import service as attempts
from app.attempts.service import Claim, Outcome
from app.database import Database
from app.jobs.models import Job
from app.local import LocalServers
from app.settings import Settings
from app.storage import Storage, open_storage
from tests.jobs import abandon_jobs, insert_job, read_attempts, read_events, read_job, wait_until
from workers.supervisor import Supervisor

pytestmark = pytest.mark.service

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture(autouse=True)
def _no_other_jobs(database: Database) -> None:
    abandon_jobs(database)


@pytest.fixture
def quick(settings: Settings, tmp_path: Path) -> Settings:
    """Short leases, in a work folder of the test's own."""
    return settings.model_copy(
        update={
            "work_dir": tmp_path / "work",
            "lease_seconds": 4.0,
            "heartbeat_seconds": 0.5,
            "status_poll_seconds": 0.1,
        }
    )


@pytest.fixture
def storage(settings: Settings) -> Storage:
    return open_storage(settings)


@pytest.fixture
def supervisor(quick: Settings, database: Database, storage: Storage) -> Iterator[Supervisor]:
    supervisor = new_supervisor(quick, database, storage)
    yield supervisor
    supervisor.close()
    wait_until(lambda: not psutil.Process().children(recursive=True) or _only_servers())


def _only_servers() -> bool:
    return not [p for p in psutil.Process().children(recursive=True) if "tests.workers.fake_runner" in _command(p)]


def _command(process: psutil.Process) -> list[str]:
    try:
        command: list[str] = process.cmdline()
    except psutil.Error:
        return []
    return command


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


def processes(settings: Settings) -> list[tuple[str, int, str]]:
    """Every process that ran: phase, id, spare or cold."""
    try:
        lines = (settings.work_dir / "processes.txt").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [(phase, int(pid), kind) for phase, pid, kind in (line.split() for line in lines)]


def alive(settings: Settings) -> list[int]:
    return [pid for _, pid, _ in processes(settings) if _lives(pid)]


def _lives(pid: int) -> bool:
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


def test_a_job_runs_its_phases_and_is_published(
    supervisor: Supervisor, quick: Settings, database: Database, storage: Storage
) -> None:
    job = claimed(database, quick, "normal")
    assert supervisor.run(job) == "succeeded"
    row = read_job(database, job.job_id)
    assert (row.status, row.result, row.revision) == ("succeeded", {"size_bytes": 2}, "ab" * 20)
    assert row.report == {"version": 1, "quality": None}
    assert row.stages[0]["status"] == "succeeded"
    assert row.stages[0]["metrics"] == {"sparsity": 0.5, "odd": None}
    assert [warning["code"] for warning in row.warnings] == ["group_size_fallback"]
    assert [event.type for event in read_events(database, job.job_id)] == [
        "job.queued",
        "job.running",
        "model.resolved",
        "stage.running",
        "stage.succeeded",
        "warning",
        "job.succeeded",
    ]
    assert read_attempts(database, job.job_id)[0].peak_memory_bytes == 2000
    with database.transaction() as session:
        artifact, files = artifacts.list_files(session, "default", job.job_id)
    assert artifact is not None
    assert artifact.fence == job.fence
    assert {file.path for file in files} == {"config.json", "manifest.json", "report.json", "seen.json"}
    assert b"".join(storage.open_range(f"{artifact.prefix}/config.json")) == b"{}"
    assert work_folders(quick) == []
    assert alive(quick) == []


def test_only_the_fetching_process_sees_the_hubs_token_and_none_sees_the_services_secrets(
    supervisor: Supervisor, quick: Settings, database: Database, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("ATTAR_DATABASE_URL", "postgresql://secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    job = claimed(database, quick, "normal")
    assert supervisor.run(job) == "succeeded"
    seen = json.loads(b"".join(storage.open_range(f"{artifacts.artifact_prefix(job.job_id, 1)}/seen.json")))
    assert seen["HF_TOKEN"] == "hf_secret"
    assert not {"ATTAR_DATABASE_URL", "AWS_SECRET_ACCESS_KEY"} & set(seen)


def test_later_phases_use_the_spare_once_each(supervisor: Supervisor, quick: Settings, database: Database) -> None:
    supervisor.start()
    assert supervisor.run(claimed(database, quick, "normal")) == "succeeded"
    assert [(phase, kind) for phase, _, kind in processes(quick)] == [
        ("fetch", "cold"),
        ("compress", "spare"),
        ("certify", "spare"),
    ]
    assert len({pid for _, pid, _ in processes(quick)}) == 3


def test_a_spare_that_was_killed_is_replaced(supervisor: Supervisor, quick: Settings, database: Database) -> None:
    supervisor.start()
    spares = wait_until(
        lambda: [child for child in psutil.Process().children() if "--preload" in _command(child)],
    )
    for spare in spares:
        spare.kill()
    wait_until(lambda: not any(_lives(spare.pid) for spare in spares))
    assert supervisor.run(claimed(database, quick, "normal")) == "succeeded"
    assert processes(quick)[1][2] == "cold"


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        ("killed", "process_killed"),
        ("orphaning", "process_killed"),
        ("silent", "process_ended"),
        ("garbage", "invalid_message"),
        ("unknown", "invalid_message"),
        ("endless-line", "invalid_message"),
        ("nul", "invalid_message"),
        ("link", "invalid_artifact"),
    ],
)
def test_a_process_that_dies_or_talks_nonsense_is_a_crash_and_is_tried_again(
    supervisor: Supervisor, quick: Settings, database: Database, behaviour: str, code: str
) -> None:
    job = claimed(database, quick, behaviour)
    assert supervisor.run(job) == "retried"
    row = read_job(database, job.job_id)
    assert (row.status, row.num_crashes) == ("queued", 1)
    attempt = read_attempts(database, job.job_id)[0]
    assert attempt.error is not None
    assert attempt.error["code"] == code
    if behaviour == "killed":
        assert attempt.exit_signal == 9
        assert "something went badly wrong" in attempt.error["log_tail"]
        assert "memory" in attempt.error["hint"]
    assert alive(quick) == []
    assert work_folders(quick) == []


def test_a_users_mistake_fails_the_job_at_once(supervisor: Supervisor, quick: Settings, database: Database) -> None:
    job = claimed(database, quick, "wrong")
    assert supervisor.run(job) == "failed"
    assert read_job(database, job.job_id).error == {
        "code": "empty_dataset",
        "message": "No text.",
        "param": "recipe.calibration.dataset",
        "hint": None,
        "retryable": False,
    }
    assert alive(quick) == []


def test_a_breached_constraint_fails_the_job_and_keeps_the_artifact(
    supervisor: Supervisor, quick: Settings, database: Database
) -> None:
    job = claimed(database, quick, "violated")
    assert supervisor.run(job) == "failed"
    row = read_job(database, job.job_id)
    assert row.error is not None
    assert (row.error["code"], row.error["param"]) == ("constraint_violated", "constraints.max_size_bytes")
    with database.transaction() as session:
        assert artifacts.list_files(session, "default", job.job_id)[0] is not None


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


class _Outage:
    """The database refuses every connection, and has dropped those there were."""

    def __init__(self, servers: LocalServers, settings: Settings) -> None:
        self._admin = servers.database_url
        self._name = make_url(settings.required_database_url).database or ""

    def __enter__(self) -> None:
        self._set("false")
        with psycopg.connect(self._admin, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [self._name]
            )

    def __exit__(self, *exception: object) -> None:
        self._set("true")

    def _set(self, allowed: str) -> None:
        with psycopg.connect(self._admin, autocommit=True) as connection:
            connection.execute(
                sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}").format(sql.Identifier(self._name), sql.SQL(allowed))
            )


def test_a_short_database_outage_does_not_disturb_a_job(
    supervisor: Supervisor, quick: Settings, database: Database, servers: LocalServers
) -> None:
    job = claimed(database, quick, "slow")
    running = Running(supervisor, job)
    wait_for_compress(quick)
    with _Outage(servers, quick):
        time.sleep(1.5)
    assert running.end() == "succeeded"
    assert read_job(database, job.job_id).attempt == 1


def test_in_a_long_database_outage_the_processes_stand_still_and_go_on_after_it(
    supervisor: Supervisor, quick: Settings, database: Database, servers: LocalServers
) -> None:
    job = claimed(database, quick, "slow")
    running = Running(supervisor, job)
    wait_for_compress(quick)
    compress = psutil.Process(processes(quick)[1][1])
    with _Outage(servers, quick):
        wait_until(lambda: compress.status() == psutil.STATUS_STOPPED, 10)
        time.sleep(1)
        assert compress.status() == psutil.STATUS_STOPPED
    assert running.end() == "succeeded"
    assert read_job(database, job.job_id).attempt == 1


def test_the_end_of_a_job_waits_for_the_database(
    supervisor: Supervisor, quick: Settings, database: Database, servers: LocalServers
) -> None:
    job = claimed(database, quick, "slow")
    running = Running(supervisor, job)
    wait_for_compress(quick)
    wait_until(lambda: read_job(database, job.job_id).progress.get("fraction", 0) > 0.45)
    with _Outage(servers, quick):
        time.sleep(4.5)
        assert running.outcome is None
    assert running.end() == "succeeded"


def test_a_stopping_worker_does_not_wait_forever_for_the_database(
    supervisor: Supervisor, quick: Settings, database: Database, servers: LocalServers
) -> None:
    job = claimed(database, quick, "hang")
    running = Running(supervisor, job)
    wait_for_compress(quick)
    with _Outage(servers, quick):
        supervisor.stop()
        assert running.end(30) is None
    assert read_job(database, job.job_id).status == "running"  # until its lease runs out
    assert alive(quick) == []


def test_what_a_dead_worker_left_is_removed_at_the_next_start(
    supervisor: Supervisor, quick: Settings, database: Database
) -> None:
    dead = quick.work_dir / "job_dead.1"
    (dead / "source").mkdir(parents=True)
    dead.with_name("job_dead.1.lock").touch()
    job = claimed(database, quick, "hang")
    running = Running(supervisor, job)
    wait_for_compress(quick)
    supervisor.start()
    assert work_folders(quick) != []
    assert not dead.exists()
    assert not dead.with_name("job_dead.1.lock").exists()
    assert (quick.work_dir / f"{job.job_id}.1").exists()
    supervisor.stop()
    assert running.end() == "released"
    assert [path.name for path in quick.work_dir.iterdir()] == ["processes.txt"]


def test_the_supervisor_leaves_no_descriptor_open(supervisor: Supervisor, quick: Settings, database: Database) -> None:
    supervisor.run(claimed(database, quick, "normal"))
    before = num_descriptors()
    for behaviour in ("normal", "killed", "garbage", "normal"):
        supervisor.run(claimed(database, quick, behaviour))
    assert num_descriptors() <= before + 1
