"""The database goes away while a job runs, and comes back, or does not."""

from __future__ import annotations

import time

import psutil
import psycopg
import pytest
from psycopg import sql
from sqlalchemy.engine import make_url

from app.database import Database
from app.local import LocalServers
from app.settings import Settings
from tests.jobs import read_job, wait_until
from tests.workers.supervisor.running import (
    Running,
    alive,
    claimed,
    processes,
    wait_for_compress,
)
from workers.supervisor import Supervisor

pytestmark = pytest.mark.service


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
