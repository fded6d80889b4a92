"""What an attempt does: its phases, its processes, how they fail, and what it leaves."""

from __future__ import annotations

import json

import psutil
import pytest

from app.artifacts import service as artifacts
from app.database import Database
from app.settings import Settings
from app.storage import Storage
from tests.jobs import read_attempts, read_events, read_job, wait_until
from tests.workers.supervisor.running import (
    Running,
    alive,
    claimed,
    command_of,
    lives,
    num_descriptors,
    processes,
    wait_for_compress,
    work_folders,
)
from workers.supervisor import Supervisor
from workers.supervisor.processes import scrubbed_environment

pytestmark = pytest.mark.service


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


def test_no_process_sees_what_only_begins_like_a_known_name() -> None:
    strangers = {"LANGCHAIN_API_KEY": "a", "NVIDIA_API_KEY": "b", "PATHWAY_TOKEN": "c", "AWS_SECRET_ACCESS_KEY": "d"}
    known = {"PATH": "/bin", "LANG": "C", "LC_ALL": "C", "CUDA_VISIBLE_DEVICES": "0", "NVIDIA_VISIBLE_DEVICES": "all"}
    for network in (False, True):
        seen = scrubbed_environment({**strangers, **known}, network=network)
        assert not set(strangers) & set(seen)
        assert set(known) <= set(seen)


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
        lambda: [child for child in psutil.Process().children() if "--preload" in command_of(child)],
    )
    for spare in spares:
        spare.kill()
    wait_until(lambda: not any(lives(spare.pid) for spare in spares))
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
