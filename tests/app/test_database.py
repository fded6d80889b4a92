"""The database as the API uses it: what a restart of PostgreSQL does to a reader, and what it does not."""

from __future__ import annotations

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from app.database import IDLE_TRANSACTION_SECONDS, Database
from app.local import LocalServers
from app.settings import Settings


def _break_connections(servers: LocalServers, settings: Settings) -> None:
    name = make_url(settings.required_database_url).database
    with psycopg.connect(servers.database_url, autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])


def test_a_poll_after_a_restart_of_the_database_is_answered(
    client: TestClient, auth: dict[str, str], servers: LocalServers, settings: Settings
) -> None:
    unknown = "/v1/jobs/job_01M80W7713Z0HZ9NTVBGXYXV3F"
    assert client.get(unknown, headers=auth).json()["code"] == "job_not_found"
    _break_connections(servers, settings)
    assert client.get(unknown, headers=auth).json()["code"] == "job_not_found"


def test_a_process_that_stands_still_in_a_transaction_keeps_no_row(database: Database) -> None:
    with database.transaction() as session:
        shown = session.execute(text("SHOW idle_in_transaction_session_timeout")).scalar_one()
    assert shown == f"{IDLE_TRANSACTION_SECONDS}s"


def test_a_read_that_the_database_refuses_is_asked_once(database: Database) -> None:
    asked = []

    def query(session: Session) -> None:
        asked.append(1)
        session.execute(text("SELECT * FROM nothing_of_that_name"))

    with pytest.raises(ProgrammingError):
        database.read(query)
    assert asked == [1]
