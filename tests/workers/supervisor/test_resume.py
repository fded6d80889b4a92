"""A job of the real processes that are killed one after the other: nothing is fetched again, and the same bytes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from app.attempts import service as attempts
from app.attempts.service import Claim
from app.database import Database
from app.settings import Settings
from app.storage import Storage
from tests.jobs import insert_job, read_attempts, read_job, wait_until
from tests.models import write_tiny_llama
from tests.workers.attempts import TEXTS
from tests.workers.supervisor.running import Running, claim
from workers.supervisor import Supervisor

pytestmark = pytest.mark.service

NUM_BLOCKS = 4
RECIPE = {
    "version": 1,
    "stages": [
        {"technique": "wanda", "sparsity": 0.3},
        {"technique": "gptq", "scheme": "W4A16", "group_size": 32},
    ],
    "calibration": {"dataset": {"texts": TEXTS[:150]}, "num_samples": 16, "max_seq_length": 64},
    "evaluation": {"dataset": {"texts": TEXTS[150:]}, "num_tokens": 512, "max_seq_length": 128},
}


@pytest.fixture
def real(quick: Settings, database: Database, storage: Storage) -> Iterator[Supervisor]:
    supervisor = Supervisor(quick, database, storage, runner_module="workers.runner")
    yield supervisor
    supervisor.close()


def kill(settings: Settings, phase: str) -> None:
    """Kill the process that runs ``phase``, once it has taken over its log."""
    [log] = settings.work_dir.glob(f"job_*/logs/{phase}.log")

    def running() -> list[int]:
        children = psutil.Process().children(recursive=True)
        return [child.pid for child in children if any(file.path == str(log) for file in child.open_files())]

    [pid] = wait_until(running)
    os.kill(pid, signal.SIGKILL)


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("block-*.json"))


def is_due(database: Database, job_id: str) -> bool:
    with database.transaction() as session:
        return bool(attempts.count_claimable(session)) and read_job(database, job_id).status == "queued"


def next_claim(database: Database, settings: Settings, job_id: str) -> Claim:
    wait_until(partial(is_due, database, job_id), 60)
    return claim(database, settings)


def stored(settings: Settings, job_id: str) -> dict[str, bytes]:
    """The bytes that the recipe decides."""
    files = (settings.home / "storage" / "artifacts" / job_id).glob("*/*")
    return {
        path.name: path.read_bytes() for path in files if path.name not in {"report.json", "README.md", "manifest.json"}
    }


def test_killed_while_it_compresses_and_while_it_certifies_it_goes_on_each_time(
    real: Supervisor, quick: Settings, database: Database
) -> None:
    write_tiny_llama(quick.model_roots[0] / "deep", num_layers=NUM_BLOCKS)
    undisturbed = insert_job(database, model_id="file:deep", recipe=RECIPE)
    assert real.run(claim(database, quick)) == "succeeded"

    job_id = insert_job(database, model_id="file:deep", recipe=RECIPE)
    running = Running(real, claim(database, quick))
    wait_until(lambda: list(quick.work_dir.glob("job_*/journal/block-00000.json")), 60)
    kill(quick, "compress")
    assert running.end() == "retried"
    waiting, journal = quick.work_dir / "sources" / job_id, quick.work_dir / "journals" / job_id
    fetched_at = (waiting / "fetched.json").stat().st_mtime_ns
    num_finished = len(entries(journal))
    first_entry = (journal / "block-00000.json").stat().st_mtime_ns
    assert 1 <= num_finished < NUM_BLOCKS

    running = Running(real, next_claim(database, quick, job_id))
    wait_until(lambda: list(quick.work_dir.glob("job_*/logs/certify.log")), 60)
    kill(quick, "certify")
    assert running.end() == "retried"
    assert len(entries(journal)) == NUM_BLOCKS - 1
    assert (journal / "block-00000.json").stat().st_mtime_ns == first_entry
    assert (waiting / "fetched.json").stat().st_mtime_ns == fetched_at

    assert real.run(next_claim(database, quick, job_id)) == "succeeded"
    assert [attempt.outcome for attempt in read_attempts(database, job_id)] == ["retried", "retried", "succeeded"]
    row = read_job(database, job_id)
    assert row.report is not None
    assert row.report["environment"]["reproducible"]
    assert stored(quick, job_id) == stored(quick, undisturbed)
    assert list((quick.work_dir / "sources").iterdir()) == []
    assert list((quick.work_dir / "journals").iterdir()) == []


def test_a_source_is_of_its_job_alone_and_goes_with_it(real: Supervisor, quick: Settings, database: Database) -> None:
    write_tiny_llama(quick.model_roots[0] / "deeper", num_layers=NUM_BLOCKS)
    first = insert_job(database, model_id="file:deeper", recipe=RECIPE)
    running = Running(real, claim(database, quick))
    wait_until(lambda: list(quick.work_dir.glob("job_*/logs/compress.log")), 60)
    kill(quick, "compress")
    assert running.end() == "retried"
    second = insert_job(database, model_id="file:deeper", recipe=RECIPE, tenant_id="other")
    with database.transaction() as session:
        assert attempts.request_cancel(session, "default", first) == "cancelled"
    running = Running(real, claim(database, quick))
    [source] = wait_until(lambda: list(quick.work_dir.glob(f"{second}.*/source/fetched.json")))
    assert source.stat().st_mtime_ns > (quick.work_dir / "sources" / first / "fetched.json").stat().st_mtime_ns
    assert running.end(60) == "succeeded"
    assert list((quick.work_dir / "sources").iterdir()) == []
