"""The dispatcher: wakes workers for waiting rows, and takes jobs away from workers that no longer beat.

Any number may run at once. It keeps nothing but clocks, so that killing it loses nothing.
"""

from __future__ import annotations

import logging
import threading
import time

from sqlalchemy.exc import ProgrammingError

from app import queue
from app.attempts import service as attempts
from app.database import OUTAGES, Database
from app.settings import Settings

logger = logging.getLogger(__name__)

MAX_WAKE_UPS = 4  # waiting in one queue: enough for workers to come up, too few to flood the broker


def run(settings: Settings, stop: threading.Event) -> None:
    """Dispatch until ``stop`` is set."""
    queue.connect(settings)
    database = Database(settings.required_database_url, pool_size=1)
    try:
        Dispatcher(settings, database).run(stop)
    finally:
        database.dispose()


class Dispatcher:
    """One loop over the rows."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database
        self._last_tick = _clock()
        self._reap_at = 0.0
        self._grant_a_lease("start")

    def run(self, stop: threading.Event) -> None:
        """Tick until ``stop`` is set, whatever is down meanwhile."""
        while not stop.is_set():
            try:
                self.tick()
            except OUTAGES as error:
                self._grant_a_lease("a database outage")
                logger.warning("cannot reach the database: %s", str(error).partition("\n")[0])
            except ProgrammingError as error:
                logger.warning("is the database migrated? run `attar migrate`: %s", str(error).partition("\n")[0])
            except Exception:
                logger.exception("dispatching failed; going on")
            stop.wait(self._settings.dispatch_seconds)

    def tick(self) -> None:
        """Wake workers once, and reap when it is time to."""
        now = _clock()
        if now - self._last_tick > self._settings.lease_seconds / 2 + self._settings.dispatch_seconds:
            # The machine slept, and the workers beside us did too.
            self._grant_a_lease("a pause of this process")
        self._last_tick = now
        self.wake_workers()
        if now >= self._reap_at:
            self.reap()
            self._reap_at = now + self._settings.reap_seconds

    def wake_workers(self) -> None:
        """Send at most one wake-up for each job that can be claimed, and a few a queue."""
        with self._database.transaction() as session:
            num_claimable = attempts.count_claimable(session)
        for name, num_jobs in num_claimable.items():
            try:
                num_missing = min(num_jobs, MAX_WAKE_UPS) - queue.num_waiting(name)
            except queue.BROKER_ERRORS as error:
                logger.warning("cannot reach the broker: %s", error)
                return
            for _ in range(num_missing):
                queue.wake(name)

    def reap(self) -> None:
        """Take back every job whose lease has run out."""
        with self._database.transaction() as session:
            reaped = attempts.reap(session)
        for job in reaped:
            logger.warning("its worker was lost; now %s", job.status, extra={"job_id": job.job_id, "fence": job.fence})

    def _grant_a_lease(self, reason: str) -> None:
        """Reap nothing for one full lease, so that workers can beat again first."""
        logger.info("reaping begins a lease after %s", reason)
        self._reap_at = _clock() + self._settings.lease_seconds


def _clock() -> float:
    """Seconds that go on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
