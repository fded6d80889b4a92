"""What an attempt finished is there for the next one, and for nobody else."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

from app.attempts import service as attempts
from app.database import Database
from app.settings import Settings
from app.storage import Storage
from tests.jobs import read_job, wait_until
from tests.workers.supervisor.running import Running, claim, claimed, new_supervisor
from workers.supervisor import Supervisor
from workers.supervisor.folders import WorkFolder

pytestmark = pytest.mark.service


def journals(settings: Settings) -> dict[str, int]:
    """Journals that wait, with their numbers of blocks."""
    return {path.name: len(list(path.iterdir())) for path in (settings.work_dir / "journals").glob("*")}


def wait_for_block(settings: Settings) -> None:
    wait_until(lambda: list(settings.work_dir.glob("job_*/journal/block-*.json")))


def test_a_killed_process_loses_no_finished_block(supervisor: Supervisor, quick: Settings, database: Database) -> None:
    job = claimed(database, quick, "journal")
    for num_blocks in (1, 2):
        assert supervisor.run(job) == "retried"
        assert journals(quick) == {job.job_id: num_blocks}
        wait_until(partial(_is_due, database, job.job_id))
        job = claim(database, quick)
    assert supervisor.run(job) == "succeeded"
    assert journals(quick) == {}


def _is_due(database: Database, job_id: str) -> bool:
    with database.transaction() as session:
        return bool(attempts.count_claimable(session)) and read_job(database, job_id).status == "queued"


def test_a_worker_that_stops_leaves_its_journal_to_the_next(
    supervisor: Supervisor, quick: Settings, database: Database, storage: Storage
) -> None:
    running = Running(supervisor, claimed(database, quick, "journal-hang"))
    wait_for_block(quick)
    supervisor.stop()
    assert running.end() == "released"
    another = new_supervisor(quick, database, storage)
    job = claim(database, quick)
    running = Running(another, job)
    wait_until(lambda: list(quick.work_dir.glob("job_*/journal/block-00001.json")))
    with database.transaction() as session:
        attempts.request_cancel(session, job.tenant_id, job.job_id)
    assert running.end() == "cancelled"
    another.close()
    assert journals(quick) == {}


def test_the_journal_of_a_dead_worker_is_taken_up(supervisor: Supervisor, quick: Settings, database: Database) -> None:
    job = claimed(database, quick, "journal")
    dead = quick.work_dir / f"{job.job_id}.0"
    (dead / "journal").mkdir(parents=True)
    for number in range(2):
        (dead / "journal" / f"block-{number:05d}.json").write_text("{}")
    Path(f"{dead}.lock").touch()
    assert supervisor.run(job) == "succeeded"
    assert not dead.exists()


@pytest.mark.parametrize("is_marked", [True, False])
def test_a_source_is_handed_on_only_if_it_is_complete(is_marked: bool, tmp_path: Path) -> None:
    with WorkFolder(tmp_path, "job_1", 1) as first:
        (first.path / "source" / "model").mkdir()
        if is_marked:
            (first.path / "source" / "fetched.json").write_text("{}")
    assert (tmp_path / "sources" / "job_1").exists() == is_marked
    with WorkFolder(tmp_path, "job_2", 1) as other:
        assert list((other.path / "source").iterdir()) == []
    with WorkFolder(tmp_path, "job_1", 2) as second:
        assert (second.path / "source" / "fetched.json").exists() == is_marked
        assert (second.path / "logs").is_dir()
        assert not (tmp_path / "sources" / "job_1").exists()


@pytest.mark.parametrize("names", [["plan.json"], ["plan.json", "block-00000.json"], ["block-00000.json"]])
def test_a_journal_is_handed_on_from_its_plan_on(names: list[str], tmp_path: Path) -> None:
    with WorkFolder(tmp_path, "job_1", 1) as first:
        (first.path / "journal").mkdir()
        for name in names:
            (first.path / "journal" / name).write_text("{}")
    with WorkFolder(tmp_path, "job_1", 2) as second:
        assert sorted(path.name for path in (second.path / "journal").iterdir()) == sorted(names)
    with WorkFolder(tmp_path, "job_2", 1) as other:
        assert not (other.path / "journal").exists()


def test_a_part_of_a_plan_is_handed_on_unless_a_whole_one_waits(tmp_path: Path) -> None:
    def journal_of(fence: int, *names: str) -> list[str]:
        """What attempt ``fence`` finds; it leaves ``names`` in its place."""
        with WorkFolder(tmp_path, "job_1", fence) as folder:
            journal = folder.path / "journal"
            found = [str(path.relative_to(journal)) for path in journal.rglob("*.json")]
            shutil.rmtree(journal, ignore_errors=True)
            for name in names:
                (journal / name).parent.mkdir(parents=True, exist_ok=True)
                (journal / name).write_text("{}")
        return found

    steps = [f"planning/sensitivity/block-0000{index}.json" for index in range(3)]
    assert journal_of(1, steps[0]) == []
    assert journal_of(2, "plan.json") == steps[:1]
    # An attempt that outlived its lease comes back later than its successor.
    waiting = tmp_path / "journals" / "job_1"
    with WorkFolder(tmp_path, "job_1", 3) as late:
        (late.path / "journal").rename(waiting)
        for name in steps:
            (late.path / "journal" / name).parent.mkdir(parents=True, exist_ok=True)
            (late.path / "journal" / name).write_text("{}")
    assert journal_of(4) == ["plan.json"]


def test_journals_of_jobs_that_ended_elsewhere_are_removed(
    supervisor: Supervisor, quick: Settings, database: Database
) -> None:
    running = Running(supervisor, claimed(database, quick, "journal-hang"))
    wait_for_block(quick)
    for waits_in in ("journals", "sources"):
        (quick.work_dir / waits_in / "job_of_nobody").mkdir(parents=True)
    supervisor.stop()
    assert running.end() == "released"
    assert len(journals(quick)) == 1
    assert list((quick.work_dir / "sources").iterdir()) == []
