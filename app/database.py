"""The database: engine, session and transaction; one naming convention for every constraint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from sqlalchemy import Engine, MetaData, create_engine, event
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker

NAMING_CONVENTION = {
    "ix": "ix_%(column_0_N_label)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

# Our transactions hold nothing but statements, so one that idles belongs to a process that stands still.
IDLE_TRANSACTION_SECONDS = 5

# What a database that is down, restarts or answers too late raises: the same transaction may succeed later.
OUTAGES = (OperationalError, InterfaceError, PoolTimeoutError)


class Base(DeclarativeBase):
    """Base of every table."""

    metadata = MetaData(naming_convention=NAMING_CONVENTION)


T = TypeVar("T")


class Database:
    """Engines and their sessions; made once a process and passed to whoever needs it."""

    def __init__(self, url: str, *, pool_size: int = 10) -> None:
        self.engine = _engine(url, pool_size, pool_pre_ping=True)
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)
        # Everybody polls, and each round trip costs a millisecond while the cores compute: no ping, no transaction.
        self._reading_engine = _engine(url, pool_size, isolation_level="AUTOCOMMIT")
        self._reading_sessions = sessionmaker(self._reading_engine, expire_on_commit=False, autoflush=False)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """A session that commits when the block ends and rolls back when it raises."""
        with self._sessions.begin() as session:
            yield session

    def read(self, query: Callable[[Session], T]) -> T:
        """The answer to ``query``, which only reads; asked again where its connection was dead."""
        try:
            return self._read(query)
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
            return self._read(query)

    def _read(self, query: Callable[[Session], T]) -> T:
        with self._reading_sessions() as session:
            return query(session)

    def dispose(self) -> None:
        """Close every pooled connection."""
        self.engine.dispose()
        self._reading_engine.dispose()


def _engine(url: str, pool_size: int, **options: Any) -> Engine:
    engine = create_engine(
        psycopg_url(url),
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_recycle=1800,
        # Without these a cut network cable would hold a caller for many minutes.
        connect_args={"connect_timeout": 5, "tcp_user_timeout": 30_000},
        **options,
    )
    event.listen(engine, "connect", _limit_idle_transactions)
    return engine


def _limit_idle_transactions(connection: Any, _record: object) -> None:
    """A process that freezes inside a transaction must not keep its rows from the reaper and its successor."""
    before, connection.autocommit = connection.autocommit, True
    connection.execute(f"SET idle_in_transaction_session_timeout = '{IDLE_TRANSACTION_SECONDS}s'")
    connection.autocommit = before


def psycopg_url(url: str) -> str:
    """The URL with the driver named: ``postgresql://`` means psycopg 3 here."""
    for scheme in ("postgresql://", "postgres://"):
        if url.startswith(scheme):
            return "postgresql+psycopg://" + url.removeprefix(scheme)
    return url
