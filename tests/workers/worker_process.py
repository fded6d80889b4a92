"""A real Celery worker whose jobs' processes are tests.workers.fake_runner. Settings come from the environment."""

from __future__ import annotations

import sys

from app import queue
from workers import tasks

if __name__ == "__main__":
    tasks.RUNNER_MODULE = "tests.workers.fake_runner"
    queue.run_worker(sys.argv[1])
