"""What a worker keeps from one attempt to the next: its stop flag and one warm interpreter."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from app.attempts.service import Claim, Outcome
from app.database import OUTAGES, Database
from app.settings import Settings
from app.storage import Storage
from workers.supervisor.attempt import Attempt
from workers.supervisor.folders import remove_orphans
from workers.supervisor.lease import DatabaseStillDownError
from workers.supervisor.processes import JobProcess, Spare, Spawner, scrubbed_environment
from workers.supervisor.succession import forget_ended

logger = logging.getLogger(__name__)


class Supervisor:
    """Runs attempts, one at a time. ``runner_module`` is the main of their processes."""

    def __init__(self, settings: Settings, database: Database, storage: Storage, *, runner_module: str) -> None:
        self._settings = settings
        self._database = database
        self._storage = storage
        self._module = runner_module
        self._spawner = Spawner()
        self._spare = Spare(lambda: self._start(network=False, log=None, preload=True))
        self.stopping = threading.Event()

    def start(self) -> None:
        """Remove what dead workers left, and warm up."""
        remove_orphans(self._settings.work_dir)
        self._forget_ended()
        self.prepare()

    def run(self, claim: Claim) -> Outcome | None:
        """Try a claimed job; how that ended, or None when the database could not be told.

        Then the lease expires and the reaper puts the job back.
        """
        names = {"job_id": claim.job_id, "fence": claim.fence}
        logger.info("attempt %d begins", claim.attempt, extra=names)
        try:
            outcome = Attempt(self._settings, self._database, self._storage, claim, self.stopping).run(self)
        except DatabaseStillDownError:
            logger.exception("the end of the attempt could not be recorded", extra=names)
            return None
        logger.info("attempt %d ended: %s", claim.attempt, outcome, extra=names)
        self._forget_ended()
        if not self.stopping.is_set():
            self.prepare()
        return outcome

    def stop(self) -> None:
        """Have the running attempt give its job back and end. Safe to call from a signal handler."""
        self.stopping.set()

    def close(self) -> None:
        """End what waits."""
        self.stopping.set()
        self._spare.close()
        self._spawner.close()

    def obtain(self, phase: str, log: Path) -> JobProcess:
        """A process for ``phase``: fetching needs the network, and no torch; the others take the spare if it lives."""
        if phase == "fetch":
            return self._start(network=True, log=log)
        return self._spare.take() or self._start(network=False, log=log)

    def prepare(self) -> None:
        """See that a spare waits. A worker that cannot have one still works, more slowly."""
        try:
            self._spare.prepare()
        except OSError:
            logger.exception("cannot start a spare process")

    def _forget_ended(self) -> None:
        try:
            forget_ended(self._settings.work_dir, self._database)
        except OUTAGES:
            logger.warning("cannot reach the database: what waits for ended jobs stays until the next attempt")

    def _start(self, *, network: bool, log: Path | None, preload: bool = False) -> JobProcess:
        environment = scrubbed_environment(os.environ, network=network)
        return JobProcess(self._spawner, self._module, environment=environment, log=log, preload=preload)
