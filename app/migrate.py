"""Bring the database's tables up to date. Safe to call from several processes at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import NullPool, create_engine, text

from app.database import psycopg_url

MIGRATIONS = Path(__file__).resolve().parent.parent / "migrations"

_LOCK = 4_707_172_871_001  # any number that nobody else takes in this database


def upgrade(database_url: str, revision: str = "head") -> None:
    """Run every migration up to ``revision``; does nothing where they have run."""
    with locked_config(database_url) as config:
        command.upgrade(config, revision)


def downgrade(database_url: str, revision: str) -> None:
    """Take back every migration above ``revision``; ``base`` takes back all of them."""
    with locked_config(database_url) as config:
        command.downgrade(config, revision)


@cache
def head() -> str | None:
    """The revision that this code expects."""
    return ScriptDirectory(str(MIGRATIONS)).get_current_head()


@contextmanager
def locked_config(database_url: str) -> Iterator[Config]:
    """An alembic configuration on one connection that holds the migrations' advisory lock."""
    engine = create_engine(psycopg_url(database_url), poolclass=NullPool)
    config = Config()
    # A `%` in the path would be read as the start of an interpolation.
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    try:
        with engine.connect() as connection:
            connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": _LOCK})
            connection.commit()  # the lock belongs to the session, not to this transaction
            config.attributes["connection"] = connection
            # Closing the connection gives the lock back, whatever happened in between.
            yield config
    finally:
        engine.dispose()
