"""Whether the parts that requests need do answer."""

from __future__ import annotations

import logging
from collections.abc import Callable

from kombu.exceptions import LimitExceeded
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from app import migrate, queue
from app.database import Database
from app.dependencies import Parts
from app.storage import StorageError

logger = logging.getLogger(__name__)


def failures(parts: Parts) -> dict[str, str]:
    """What is wrong, by part; empty when the service is ready."""
    checks: dict[str, Callable[[], str | None]] = {
        "database": lambda: _database(parts.database),
        "redis": lambda: _redis(parts),
        "storage": lambda: _storage(parts),
    }
    found = {}
    for name, check in checks.items():
        problem = check()
        if problem is not None:
            found[name] = problem
    return found


def _database(database: Database) -> str | None:
    try:
        with database.transaction() as session:
            revision = session.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
    except SQLAlchemyError as error:
        logger.warning("readiness: the database failed: %s", error)
        return "does not answer, or has no tables yet"
    if revision != migrate.head():
        return f"is at revision {revision}, not {migrate.head()}: run `attar migrate`"
    return None


def _redis(parts: Parts) -> str | None:
    try:
        queue.num_waiting(parts.settings.queue)
    except (*queue.BROKER_ERRORS, LimitExceeded) as error:
        logger.warning("readiness: redis failed: %s", error)
        return "does not answer"
    return None


def _storage(parts: Parts) -> str | None:
    try:
        parts.storage.check()
    except StorageError as error:
        logger.warning("readiness: storage failed: %s", error)
        return "cannot be used"
    return None
