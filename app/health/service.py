"""Whether the parts that requests need do answer."""

from __future__ import annotations

import logging
from collections.abc import Callable

from redis import Redis, RedisError
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from app import migrate
from app.database import psycopg_url
from app.dependencies import Parts
from app.settings import SettingMissingError
from app.storage import StorageError

logger = logging.getLogger(__name__)

_SECONDS = 2


def failures(parts: Parts) -> dict[str, str]:
    """What is wrong, by part; empty when the service is ready."""
    checks: dict[str, Callable[[], str | None]] = {
        "database": lambda: _database(parts),
        "redis": lambda: _redis(parts),
        "storage": lambda: _storage(parts),
    }
    found = {}
    for name, check in checks.items():
        problem = check()
        if problem is not None:
            found[name] = problem
    return found


def _database(parts: Parts) -> str | None:
    # A connection of its own here too: connecting has a limit, and a server that stands still passes it.
    url, limit = psycopg_url(parts.settings.required_database_url), {"connect_timeout": _SECONDS}
    try:
        with create_engine(url, poolclass=NullPool, connect_args=limit).connect() as connection:
            revision = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
    except SQLAlchemyError as error:
        logger.warning("readiness: the database failed: %s", error)
        return "does not answer, or has no tables yet"
    if revision != migrate.head():
        return f"is at revision {revision}, not {migrate.head()}: run `attar migrate`"
    return None


def _redis(parts: Parts) -> str | None:
    try:
        # A connection of its own: a pool may hold one that was good a minute ago.
        with Redis.from_url(
            parts.settings.required_redis_url, socket_connect_timeout=_SECONDS, socket_timeout=_SECONDS
        ) as redis:
            redis.ping()
    except (RedisError, SettingMissingError) as error:
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
