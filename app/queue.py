"""The Celery instance. Its messages are wake-ups, never the truth: losing or repeating one changes nothing.

A task acknowledges before it works, keeps no result, and claims its job from the database.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from app.settings import Settings, get_settings

logger = logging.getLogger(__name__)

TASK_NAME = "attar.work"
# How long a queue counts as served after a worker of it was heard, and how often workers are.
_SEEN_SECONDS = 60
_ANNOUNCE_SECONDS = 15

# What a broker that is down, hangs or refuses raises.
BROKER_ERRORS = (OperationalError, RedisError, OSError)


def _configuration() -> dict[str, Any]:
    return {
        "broker_url": get_settings().redis_url,
        "broker_connection_retry_on_startup": True,
        # A request that wakes a worker must not wait for a broker that is down.
        "broker_transport_options": {
            "max_retries": 1,
            "interval_start": 0,
            "interval_step": 0.1,
            "interval_max": 0.1,
            "socket_connect_timeout": 2,
            "socket_timeout": 5,
            "socket_keepalive": True,
        },
        "task_acks_late": False,
        "task_ignore_result": True,
        "task_serializer": "json",
        "accept_content": ["json"],
        # A busy worker must leave wake-ups to idle ones.
        "worker_prefetch_multiplier": 1,
        "worker_disable_prefetch": True,
        # Nobody with access to the broker may revoke, terminate or reconfigure.
        "worker_enable_remote_control": False,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
    }


celery = Celery("attar", include=["workers.tasks"])
celery.add_defaults(_configuration)


def connect(settings: Settings) -> None:
    """Use the broker of ``settings`` rather than the environment's."""
    celery.conf.broker_url = settings.required_redis_url


def wake(queue: str) -> bool:
    """Tell one worker of ``queue`` that a job waits; False, and a line in the log, when the broker is down.

    The dispatcher tells again, so no caller has to care.
    """
    try:
        # A connection of its own: one from a pool may have died with the broker's last restart.
        with celery.connection_for_write() as connection:
            celery.send_task(
                TASK_NAME, args=[queue], queue=queue, connection=connection, retry=False, ignore_result=True
            )
    except BROKER_ERRORS as error:
        logger.warning("cannot reach the broker to wake queue %s: %s", queue, error)
        return False
    return True


def num_waiting(queue: str) -> int:
    """Wake-ups that no worker has taken yet. Raises one of BROKER_ERRORS."""
    with celery.connection_for_write() as connection:
        return int(connection.default_channel.client.llen(queue))


def worker_key(queue: str) -> str:
    """The key of Redis that is there while ``queue`` has a worker. No queue's own list is called so."""
    return f"attar.worker.{queue}"


def announce(queue: str) -> None:
    """Say that a worker of ``queue`` lives. Raises one of BROKER_ERRORS."""
    with celery.connection_for_write() as connection:
        connection.default_channel.client.set(worker_key(queue), "", ex=_SEEN_SECONDS)


def has_worker(queue: str) -> bool | None:
    """Whether a worker of ``queue`` has announced itself within a minute; None when the broker is down."""
    try:
        with celery.connection_for_write() as connection:
            return bool(connection.default_channel.client.exists(worker_key(queue)))
    except BROKER_ERRORS as error:
        logger.warning("cannot reach the broker to see whether queue %s has a worker: %s", queue, error)
        return None


def _keep_announcing(queue: str) -> None:
    while True:
        try:
            announce(queue)
        except BROKER_ERRORS as error:
            logger.debug("cannot announce a worker of queue %s: %s", queue, error)
        time.sleep(_ANNOUNCE_SECONDS)


def run_worker(queue: str) -> None:
    """Be a worker of ``queue`` until SIGTERM. The work itself happens in other processes, so one thread is enough."""
    threading.Thread(target=_keep_announcing, args=(queue,), name="announce", daemon=True).start()
    celery.worker_main(
        [
            "--quiet",
            "worker",
            "--pool=threads",
            "--concurrency=1",
            f"--queues={queue}",
            f"--hostname=attar-{uuid.uuid4().hex[:8]}@%h",
            f"--loglevel={get_settings().log_level}",
            "--without-gossip",
            "--without-mingle",
            "--without-heartbeat",
        ]
    )
