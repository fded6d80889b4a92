"""Migrations, up and down, give the tables that the models describe."""

from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from alembic import command

from app import migrate
from app.local import LocalServers
from app.settings import Settings


@pytest.fixture
def empty_url(servers: LocalServers, settings: Settings) -> str:
    with psycopg.connect(settings.required_database_url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return settings.required_database_url


def tables(url: str) -> set[str]:
    with psycopg.connect(url) as connection:
        rows = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        return {name for (name,) in rows}


def test_the_migrated_schema_is_what_the_models_say(empty_url: str) -> None:
    migrate.upgrade(empty_url)
    with migrate.locked_config(empty_url) as config:
        command.check(config)


def test_every_migration_can_be_taken_back_and_run_again(empty_url: str) -> None:
    migrate.upgrade(empty_url)
    everything = tables(empty_url)
    migrate.downgrade(empty_url, "base")
    assert tables(empty_url) == {"alembic_version"}
    migrate.upgrade(empty_url)
    assert tables(empty_url) == everything


def test_two_processes_may_migrate_at_once(empty_url: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(migrate.upgrade, empty_url) for _ in range(2)]:
            done.result()
    assert "jobs" in tables(empty_url)
