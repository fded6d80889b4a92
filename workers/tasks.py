"""The Celery task: claim, hand to the supervisor, and again while jobs wait. Never imports torch."""

from __future__ import annotations

import logging
import os
import socket

from celery import signals

from app.attempts import service as attempts
from app.attempts.service import Claim
from app.database import OUTAGES, Database
from app.logs import configure_logging
from app.queue import TASK_NAME, celery
from app.settings import Settings, get_settings
from app.storage import open_storage
from workers.supervisor import Supervisor

logger = logging.getLogger(__name__)

RUNNER_MODULE = "workers.runner"  # main of a job's processes


class Worker:
    """What one worker process keeps between tasks."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._database = Database(settings.required_database_url, pool_size=2)
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self.supervisor = Supervisor(settings, self._database, open_storage(settings), runner_module=RUNNER_MODULE)

    def work(self, queue: str) -> None:
        """Do the jobs of ``queue`` one after the other until none waits. A broker that is down stops nobody here."""
        while not self.supervisor.stopping.is_set():
            try:
                claim = self._claim(queue)
            except OUTAGES as error:
                # The dispatcher wakes us again once the database is back.
                logger.warning("cannot claim: %s", str(error).partition("\n")[0])
                return
            if claim is None:
                return
            self.supervisor.run(claim)

    def close(self) -> None:
        """End what waits."""
        self.supervisor.close()
        self._database.dispose()

    def _claim(self, queue: str) -> Claim | None:
        with self._database.transaction() as session:
            return attempts.claim(session, queue, self._name, self._settings.lease_seconds)


_workers: list[Worker] = []  # the one of this process, once Celery has begun to be a worker


def work(queue: str) -> None:
    """Do what waits in ``queue``."""
    for worker in _workers:
        worker.work(queue)


def _set_up_logging(**_: object) -> None:
    configure_logging(get_settings(), "worker")


def _start(**_: object) -> None:
    worker = Worker(get_settings())
    _workers.append(worker)
    worker.supervisor.start()


def _stop(**_: object) -> None:
    """On the first SIGTERM or SIGINT: Celery then waits until the task has ended."""
    for worker in _workers:
        worker.supervisor.stop()


def _close(**_: object) -> None:
    while _workers:
        _workers.pop().close()


celery.task(name=TASK_NAME)(work)
signals.setup_logging.connect(_set_up_logging)
signals.worker_init.connect(_start)
signals.worker_shutting_down.connect(_stop)
signals.worker_shutdown.connect(_close)
