"""Rows become wake-ups, dead leases go back, and a broker or database that is away is waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest
from sqlalchemy import update

from app import queue
from app.attempts import service as attempts
from app.database import Database
from app.dispatcher import MAX_WAKE_UPS, Dispatcher
from app.jobs.models import Job
from app.settings import Settings
from tests.jobs import abandon_jobs, insert_job, read_job, wait_until

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture
def quick(settings: Settings, database: Database) -> Settings:
    """Short leases, and neither jobs nor wake-ups of other tests."""
    abandon_jobs(database)
    quick = settings.model_copy(update={"lease_seconds": 0.5, "reap_seconds": 0.1, "dispatch_seconds": 0.05})
    queue.connect(quick)
    for name in ("cpu", "gpu"):
        with queue.celery.connection_for_write() as connection:
            connection.default_channel.client.delete(name)
    return quick


def lose_a_worker(database: Database) -> str:
    """A job whose worker died long ago."""
    job_id = insert_job(database, queue="lost")
    with database.transaction() as session:
        assert attempts.claim(session, "lost", "worker", 60) is not None
        session.execute(update(Job).where(Job.id == job_id).values(lease_expires_at=LONG_AGO))
    return job_id


@contextmanager
def running(dispatcher: Dispatcher) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=dispatcher.run, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_each_waiting_job_is_woken_for_once_and_never_more_than_a_few(quick: Settings, database: Database) -> None:
    dispatcher = Dispatcher(quick, database)
    insert_job(database, queue="gpu")
    for _ in range(MAX_WAKE_UPS + 3):
        insert_job(database)
    for _ in range(3):
        dispatcher.wake_workers()
        assert queue.num_waiting("gpu") == 1
        assert queue.num_waiting("cpu") == MAX_WAKE_UPS


def test_nothing_is_sent_where_nothing_waits(quick: Settings, database: Database) -> None:
    Dispatcher(quick, database).tick()
    assert queue.num_waiting("cpu") == 0


def test_a_lost_job_is_reaped_but_only_a_lease_after_the_start(quick: Settings, database: Database) -> None:
    job_id = lose_a_worker(database)
    started_at = time.monotonic()
    with running(Dispatcher(quick, database)):
        wait_until(lambda: read_job(database, job_id).status == "queued")
    assert time.monotonic() - started_at >= quick.lease_seconds


def test_a_database_outage_gives_workers_a_full_lease_to_beat_again(
    quick: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher = Dispatcher(quick, Database("postgresql://nobody@127.0.0.1:1/nowhere"))
    with running(dispatcher):
        time.sleep(quick.lease_seconds * 2)
        job_id = lose_a_worker(database)
        back_at = time.monotonic()
        monkeypatch.setattr(dispatcher, "_database", database)
        wait_until(lambda: read_job(database, job_id).status == "queued")
        assert time.monotonic() - back_at >= quick.lease_seconds - 2 * quick.dispatch_seconds


def test_a_pause_of_the_machine_gives_workers_a_full_lease(quick: Settings, database: Database) -> None:
    dispatcher = Dispatcher(quick, database)
    time.sleep(quick.lease_seconds)
    dispatcher.tick()
    job_id = lose_a_worker(database)
    time.sleep(quick.lease_seconds)
    dispatcher.tick()
    assert read_job(database, job_id).status == "running"


def test_reaping_goes_on_while_the_broker_is_down(quick: Settings, database: Database) -> None:
    job_id = lose_a_worker(database)
    insert_job(database)
    queue.connect(quick.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"}))
    started_at = time.monotonic()
    assert queue.wake("cpu") is False
    assert time.monotonic() - started_at < 2
    # After the wait above, which it would take for a pause of the machine.
    Dispatcher(quick.model_copy(update={"lease_seconds": 0.0}), database).tick()
    assert read_job(database, job_id).status == "queued"
