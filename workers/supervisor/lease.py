"""The lease of a running attempt: one thread that beats, reads what is asked of the job, and writes its progress.

It alone talks to the database while a job's process runs, so that a database that hangs never keeps the supervisor
from its process.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

from sqlalchemy.orm import Session

from app.attempts import service as attempts
from app.attempts.service import Claim, JobEvent
from app.database import OUTAGES, Database
from app.settings import Settings

logger = logging.getLogger(__name__)

T = TypeVar("T")

_WRITE_SECONDS = 1.0  # progress is written at most this often, but for a phase that begins
_MARGIN = 0.9  # of the lease: past it, nobody may rely on the lease any more
_JOIN_SECONDS = 40  # a transaction on a cut network takes as long to fail
_RETRY_SECONDS = 1.0
_ATTEMPTS_WHILE_STOPPING = 5


class DatabaseStillDownError(Exception):
    """The worker has to stop and the database does not come back: the row is left to the reaper."""


@dataclass(frozen=True)
class Update:
    """What there is to write about an attempt."""

    progress: dict[str, Any]
    stages: list[dict[str, Any]]
    revision: str | None = None
    warnings: tuple[dict[str, Any], ...] = ()
    events: tuple[JobEvent, ...] = ()

    def after(self, earlier: Update | None) -> Update:
        """This update and what ``earlier`` had to say that it does not."""
        if earlier is None:
            return self
        return Update(
            self.progress,
            self.stages,
            self.revision or earlier.revision,
            earlier.warnings + self.warnings,
            earlier.events + self.events,
        )

    def write(self, session: Session, claim: Claim) -> attempts.HeldStatus | None:
        """Write it under the claim's fence."""
        return attempts.report_progress(
            session,
            claim.job_id,
            claim.fence,
            self.progress,
            self.stages,
            self.revision,
            self.warnings,
            self.events,
        )


class Lease:
    """The right to run one attempt, kept up while the block runs."""

    def __init__(self, settings: Settings, database: Database, claim: Claim) -> None:
        self._settings = settings
        self._database = database
        self._claim = claim
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._pending: Update | None = None
        self._confirmed_at = self._beat_at = clock()
        self._written_at = float("-inf")
        self._down = False
        self._thread = threading.Thread(target=self._run, name=f"lease-{claim.job_id}", daemon=True)
        self.status: Literal["running", "cancelling", "pausing", "lost"] = "running"
        self.failure: Exception | None = None  # a defect that ended the thread

    def __enter__(self) -> Self:
        """Begin to beat."""
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Beat no more."""
        self.stop()

    @property
    def doubtful(self) -> bool:
        """Whether no beat succeeded for so long that another worker may have been given the job."""
        return clock() - self._confirmed_at > self._settings.lease_seconds * _MARGIN

    def post(self, update: Update, *, at_once: bool = False) -> None:
        """Have ``update`` written with the next look at the job, or now."""
        with self._lock:
            self._pending = update.after(self._pending)
        if at_once:
            self._wake.set()

    def take_pending(self) -> Update | None:
        """What is not written yet."""
        with self._lock:
            update, self._pending = self._pending, None
        return update

    def stop(self) -> None:
        """End the thread; the lease stays as it is until it expires or the job is ended."""
        self._stop.set()
        self._wake.set()
        self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        pause_seconds = min(self._settings.status_poll_seconds, self._settings.heartbeat_seconds)
        while True:
            woken = self._wake.wait(pause_seconds)
            self._wake.clear()
            if self._stop.is_set():
                return
            try:
                status = self._talk(write_now=woken)
            except OUTAGES as error:
                if not self._down:
                    logger.warning("cannot reach the database: %s", first_line(error), extra=self._names())
                self._down = True
                continue
            except Exception as error:
                logger.exception("the lease's thread failed", extra=self._names())
                self.failure = error
                return
            self._down = False
            if status is None:
                self.status = "lost"
                return
            self.status = status

    def _talk(self, *, write_now: bool) -> attempts.HeldStatus | None:
        """One transaction: a beat when it is due, progress when there is some, else a look at the status."""
        claim, now = self._claim, clock()
        beat_due = now - self._beat_at >= self._settings.heartbeat_seconds or self._down
        update = self.take_pending() if write_now or now - self._written_at >= _WRITE_SECONDS else None
        try:
            with self._database.transaction() as session:
                status = None
                if beat_due:
                    status = attempts.beat(session, claim.job_id, claim.fence, self._settings.lease_seconds)
                if update is not None:
                    status = update.write(session, claim)
                if update is None and not beat_due:
                    status = attempts.held_status(session, claim.job_id, claim.fence)
        except OUTAGES:
            if update is not None:
                with self._lock:
                    self._pending = self._pending.after(update) if self._pending else update
            raise
        if beat_due and status is not None:
            self._confirmed_at = self._beat_at = now
        if update is not None:
            self._written_at = now
        return status

    def _names(self) -> dict[str, Any]:
        return {"job_id": self._claim.job_id, "fence": self._claim.fence}


def insist(database: Database, write: Callable[[Session], T], stopping: threading.Event) -> T:
    """Run ``write`` in a transaction, again and again while the database is down.

    A write that did commit before the connection broke runs twice; those of app.attempts.service allow it.
    Raises DatabaseStillDownError when the worker has to stop meanwhile.
    """
    num_tries = 0
    while True:
        num_tries += 1
        try:
            with database.transaction() as session:
                return write(session)
        except OUTAGES as error:
            if stopping.is_set() and num_tries >= _ATTEMPTS_WHILE_STOPPING:
                raise DatabaseStillDownError from error
            logger.warning("cannot reach the database, trying again: %s", first_line(error))
        time.sleep(_RETRY_SECONDS)


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return str(error).partition("\n")[0]


def clock() -> float:
    """Seconds that go on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
