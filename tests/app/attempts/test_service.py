"""The life of a lease: claimed once, kept by beats, ended once, taken away when it expires."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, select, update

from app.artifacts.models import Artifact
from app.artifacts.service import PublishedArtifact, PublishedFile
from app.attempts import service as attempts
from app.attempts.service import Claim, JobEvent
from app.database import Database
from app.errors import JobConflictError
from app.jobs.models import Job
from tests.jobs import abandon_jobs, insert_job, read_attempts, read_events, read_job
from workers.errors import CrashError, InfrastructureError, JobError, UserError

ARTIFACT = PublishedArtifact("artifacts/x/1", (PublishedFile("config.json", 2, "0" * 64),), 2)

CRASH = CrashError("process_killed", "The process was killed.")
OUTAGE = InfrastructureError("storage_unavailable", "The storage failed.")
MISTAKE = UserError("empty_dataset", "There is no text.", param="recipe.calibration.dataset")


@pytest.fixture(autouse=True)
def _no_other_jobs(database: Database) -> None:
    abandon_jobs(database)


def claim(database: Database, queue: str = "cpu", lease_seconds: float = 60) -> Claim | None:
    with database.transaction() as session:
        return attempts.claim(session, queue, "worker", lease_seconds)


def claimed(database: Database, lease_seconds: float = 60, **columns: object) -> Claim:
    insert_job(database, **columns)  # type: ignore[arg-type]
    found = claim(database, lease_seconds=lease_seconds)
    assert found is not None
    return found


def expire(database: Database, job_id: str) -> None:
    with database.transaction() as session:
        session.execute(
            update(Job).where(Job.id == job_id).values(lease_expires_at=func.now() - timedelta(milliseconds=1))
        )


def reap(database: Database) -> dict[str, str]:
    with database.transaction() as session:
        return {reaped.job_id: reaped.status for reaped in attempts.reap(session)}


def succeed(database: Database, job: Claim) -> attempts.Outcome:
    with database.transaction() as session:
        return attempts.finish(session, job, "succeeded", result={"size_bytes": 2}, report={}, published=ARTIFACT)


def fail(database: Database, job: Claim, error: JobError) -> attempts.Outcome:
    with database.transaction() as session:
        return attempts.fail_attempt(session, job, error)


def cancel(database: Database, job_id: str) -> str | None:
    with database.transaction() as session:
        return attempts.request_cancel(session, "default", job_id)


def has_artifact(database: Database, job_id: str) -> bool:
    with database.transaction() as session:
        return session.scalar(select(Artifact.id).where(Artifact.job_id == job_id)) is not None


def skip_delay(database: Database, job_id: str) -> None:
    with database.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(not_before=None))


def test_claims_take_the_highest_priority_first_and_then_the_oldest(database: Database) -> None:
    old, new = insert_job(database), insert_job(database)
    urgent = insert_job(database, priority=5)
    order = [found.job_id for _ in range(3) if (found := claim(database))]
    assert order == [urgent, old, new]
    assert claim(database) is None


def test_a_claim_starts_the_job_under_a_new_fence_and_a_lease(database: Database) -> None:
    job = claimed(database)
    row = read_job(database, job.job_id)
    assert (row.status, row.fence, row.attempt) == ("running", 1, 1)
    assert row.started_at is not None
    assert row.lease_expires_at is not None
    assert row.lease_expires_at > datetime.now(UTC)
    assert [stage["status"] for stage in row.stages] == ["pending", "pending"]
    assert [event.type for event in read_events(database, job.job_id)] == ["job.queued", "job.running"]
    assert [attempt.outcome for attempt in read_attempts(database, job.job_id)] == [None]


def test_a_claim_leaves_other_queues_and_delayed_jobs_alone(database: Database) -> None:
    insert_job(database, queue="gpu")
    insert_job(database, not_before=datetime.now(UTC) + timedelta(minutes=1))
    assert claim(database) is None


def test_many_workers_at_once_claim_every_job_exactly_once(database: Database) -> None:
    jobs = {insert_job(database) for _ in range(40)}

    def work(_: int) -> list[str]:
        mine = []
        while (found := claim(database)) is not None:
            mine.append(found.job_id)
        return mine

    with ThreadPoolExecutor(8) as pool:
        taken = [job_id for mine in pool.map(work, range(8)) for job_id in mine]
    assert sorted(taken) == sorted(jobs)


def test_a_beat_renews_the_lease_and_tells_the_status(database: Database) -> None:
    job = claimed(database, lease_seconds=1)
    before = read_job(database, job.job_id).lease_expires_at
    with database.transaction() as session:
        assert attempts.beat(session, job.job_id, job.fence, 60) == "running"
    after = read_job(database, job.job_id).lease_expires_at
    assert before is not None
    assert after is not None
    assert after > before + timedelta(seconds=30)
    cancel(database, job.job_id)
    with database.transaction() as session:
        assert attempts.beat(session, job.job_id, job.fence, 60) == "cancelling"


WRITES: dict[str, Callable[[Database, Claim], object]] = {
    "beat": lambda database, job: _in(database, lambda s: attempts.beat(s, job.job_id, job.fence, 60)),
    "progress": lambda database, job: _in(
        database,
        lambda s: attempts.report_progress(
            s, job.job_id, job.fence, {"fraction": 0.9}, [], "f" * 40, [{"code": "x"}], [JobEvent("warning", {})]
        ),
    ),
    "succeed": succeed,
    "fail": lambda database, job: fail(database, job, MISTAKE),
    "crash": lambda database, job: fail(database, job, CRASH),
    "release": lambda database, job: _in(database, lambda s: attempts.release(s, job)),
    "cancel": lambda database, job: _in(database, lambda s: attempts.finish(s, job, "cancelled")),
}


def _in(database: Database, write: Callable[..., object]) -> object:
    with database.transaction() as session:
        return write(session)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("taken_over", [False, True], ids=["queued", "taken over"])
def test_a_worker_that_lost_its_lease_changes_nothing(database: Database, write: str, taken_over: bool) -> None:
    zombie = claimed(database)
    expire(database, zombie.job_id)
    assert reap(database) == {zombie.job_id: "queued"}
    if taken_over:
        assert claim(database) is not None
    before = _everything(database, zombie.job_id)
    assert WRITES[write](database, zombie) in (None, "lost")
    assert _everything(database, zombie.job_id) == before
    assert not has_artifact(database, zombie.job_id)


def _everything(database: Database, job_id: str) -> list[object]:
    rows = [read_job(database, job_id), *read_attempts(database, job_id), *read_events(database, job_id)]
    return [{key: value for key, value in vars(row).items() if key != "_sa_instance_state"} for row in rows]


def test_success_publishes_and_ends_the_job(database: Database) -> None:
    job = claimed(database)
    assert succeed(database, job) == "succeeded"
    row = read_job(database, job.job_id)
    assert (row.status, row.result, row.error) == ("succeeded", {"size_bytes": 2}, None)
    assert row.progress["fraction"] == 1
    assert row.finished_at is not None
    assert row.lease_expires_at is None
    assert has_artifact(database, job.job_id)


def test_an_ending_that_is_repeated_after_a_lost_answer_gives_the_same_outcome(database: Database) -> None:
    job = claimed(database)
    assert succeed(database, job) == "succeeded"
    before = _everything(database, job.job_id)
    assert succeed(database, job) == "succeeded"
    assert fail(database, job, CRASH) == "succeeded"
    assert _everything(database, job.job_id) == before
    other = claimed(database)
    assert fail(database, other, CRASH) == "retried"
    assert fail(database, other, CRASH) == "retried"
    assert read_job(database, other.job_id).num_crashes == 1


def test_a_breached_constraint_fails_the_job_and_keeps_its_artifact(database: Database) -> None:
    job = claimed(database)
    error = {"code": "constraint_violated"}
    with database.transaction() as session:
        assert attempts.finish(session, job, "failed", report={}, error=error, published=ARTIFACT) == "failed"
    assert read_job(database, job.job_id).error == error
    assert has_artifact(database, job.job_id)


def test_a_job_that_is_being_cancelled_ends_cancelled_whatever_its_worker_wanted(database: Database) -> None:
    for end in (succeed, lambda d, j: fail(d, j, CRASH), lambda d, j: _in(d, lambda s: attempts.release(s, j))):
        job = claimed(database)
        assert cancel(database, job.job_id) == "cancelling"
        assert cancel(database, job.job_id) == "cancelling"
        assert end(database, job) == "cancelled"
        assert read_job(database, job.job_id).status == "cancelled"
        assert not has_artifact(database, job.job_id)


def test_cancel_and_success_at_the_same_moment_never_give_a_cancelled_job_with_an_artifact(database: Database) -> None:
    endings = []
    for _ in range(40):
        job = claimed(database)
        barrier = threading.Barrier(2)

        def late_cancel(job: Claim = job, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            with suppress(JobConflictError):
                cancel(database, job.job_id)

        canceller = threading.Thread(target=late_cancel)
        canceller.start()
        barrier.wait()
        outcome = succeed(database, job)
        canceller.join()
        row = read_job(database, job.job_id)
        assert row.status == outcome
        assert has_artifact(database, job.job_id) == (outcome == "succeeded")
        endings.append(outcome)
    assert set(endings) <= {"succeeded", "cancelled"}


def test_cancelling_a_waiting_job_ends_it_at_once(database: Database) -> None:
    job_id = insert_job(database)
    assert cancel(database, job_id) == "cancelled"
    assert claim(database) is None
    assert read_events(database, job_id)[-1].type == "job.cancelled"
    with pytest.raises(JobConflictError):
        cancel(database, job_id)


def test_cancelling_another_tenants_job_finds_nothing(database: Database) -> None:
    job_id = insert_job(database, tenant_id="other")
    assert cancel(database, job_id) is None
    assert read_job(database, job_id).status == "queued"


@pytest.mark.parametrize(("error", "num_retries"), [(OUTAGE, 5), (CRASH, 2), (MISTAKE, 0)])
def test_failures_are_retried_as_often_as_their_blame_allows(
    database: Database, error: JobError, num_retries: int
) -> None:
    job = claimed(database)
    for number in range(num_retries):
        assert fail(database, job, error) == "retried"
        row = read_job(database, job.job_id)
        assert row.status == "queued"
        assert row.not_before is not None
        delay = row.not_before - read_events(database, job.job_id)[-1].created_at
        assert delay == timedelta(seconds=2 ** (number + 1))
        skip_delay(database, job.job_id)
        job = claim(database) or pytest.fail("not claimable")
    assert fail(database, job, error) == "failed"
    row = read_job(database, job.job_id)
    assert row.error is not None
    assert (row.status, row.error["code"], row.error["retryable"]) == ("failed", error.code, error.blame != "user")
    assert [attempt.outcome for attempt in read_attempts(database, job.job_id)] == ["retried"] * num_retries + [
        "failed"
    ]


def test_crashes_and_outages_are_counted_apart(database: Database) -> None:
    job = claimed(database)
    for error in (CRASH, OUTAGE, CRASH, OUTAGE):
        assert fail(database, job, error) == "retried"
        skip_delay(database, job.job_id)
        job = claim(database) or pytest.fail("not claimable")
    assert fail(database, job, CRASH) == "failed"


def test_a_released_job_waits_again_and_no_failure_is_counted(database: Database) -> None:
    job = claimed(database)
    with database.transaction() as session:
        assert attempts.release(session, job) == "released"
    row = read_job(database, job.job_id)
    assert (row.status, row.num_crashes, row.num_infrastructure_failures) == ("queued", 0, 0)
    again = claim(database)
    assert again is not None
    assert (again.job_id, again.fence, again.attempt) == (job.job_id, 2, 2)


def test_the_reaper_takes_only_expired_leases(database: Database) -> None:
    alive, dead = claimed(database), claimed(database)
    expire(database, dead.job_id)
    assert reap(database) == {dead.job_id: "queued"}
    assert reap(database) == {}
    assert read_job(database, alive.job_id).status == "running"
    row = read_job(database, dead.job_id)
    assert (row.fence, row.num_infrastructure_failures) == (2, 1)
    assert read_attempts(database, dead.job_id)[0].outcome == "lost"
    assert [event.sequence for event in read_events(database, dead.job_id)] == [1, 2, 3]


@pytest.mark.parametrize(("status", "settled"), [("cancelling", "cancelled"), ("pausing", "paused")])
def test_the_reaper_settles_what_was_asked_of_a_lost_job(database: Database, status: str, settled: str) -> None:
    job = claimed(database)
    with database.transaction() as session:
        session.execute(update(Job).where(Job.id == job.job_id).values(status=status))
    expire(database, job.job_id)
    assert reap(database) == {job.job_id: settled}
    assert read_job(database, job.job_id).status == settled


def test_a_job_that_loses_a_sixth_worker_fails(database: Database) -> None:
    job = claimed(database, num_infrastructure_failures=5)
    expire(database, job.job_id)
    assert reap(database) == {job.job_id: "failed"}
    row = read_job(database, job.job_id)
    assert row.error is not None
    assert row.error["code"] == "worker_lost"
    assert row.finished_at is not None


def test_a_beat_and_the_reaper_at_the_same_moment_agree_on_who_has_the_job(database: Database) -> None:
    for _ in range(30):
        job = claimed(database)
        expire(database, job.job_id)
        with ThreadPoolExecutor(2) as pool:
            beating = pool.submit(WRITES["beat"], database, job)
            reaped = pool.submit(reap, database).result()
            beaten = beating.result()
        status = read_job(database, job.job_id).status
        # Beaten first and reaped, or reaped first: never both kept and taken.
        assert (status == "running") == (job.job_id not in reaped)
        if job.job_id not in reaped:
            assert beaten == "running"
            succeed(database, job)
        else:
            cancel(database, job.job_id)


def test_progress_shows_warnings_once_and_events_without_gaps(database: Database) -> None:
    job = claimed(database, warnings=[{"code": "old", "message": "", "param": None}])
    warning = {"code": "new", "message": "", "param": None}

    def report(index: int) -> None:
        with database.transaction() as session:
            attempts.report_progress(
                session,
                job.job_id,
                job.fence,
                {"fraction": index / 100},
                [],
                "a" * 40,
                [warning],
                [JobEvent("warning", warning)],
            )

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(report, random.sample(range(20), 20)))
    row = read_job(database, job.job_id)
    assert [item["code"] for item in row.warnings] == ["old", "new"]
    assert row.revision == "a" * 40
    assert [event.sequence for event in read_events(database, job.job_id)] == list(range(1, 23))


def test_only_jobs_that_can_be_claimed_are_counted(database: Database) -> None:
    insert_job(database, queue="counted")
    insert_job(database, queue="counted")
    insert_job(database, queue="counted", not_before=datetime.now(UTC) + timedelta(minutes=1))
    with database.transaction() as session:
        assert attempts.count_claimable(session)["counted"] == 2
