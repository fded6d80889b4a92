"""A supervisor with short leases, alone with its database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from app.database import Database
from app.settings import Settings
from app.storage import Storage, open_storage
from tests.jobs import abandon_jobs, wait_until
from tests.workers.supervisor.running import command_of, new_supervisor
from workers.supervisor import Supervisor


@pytest.fixture(autouse=True)
def _no_other_jobs(database: Database) -> None:
    abandon_jobs(database)


@pytest.fixture
def quick(settings: Settings, tmp_path: Path) -> Settings:
    """Short leases, in a work folder of the test's own."""
    return settings.model_copy(
        update={
            "work_dir": tmp_path / "work",
            "lease_seconds": 4.0,
            "heartbeat_seconds": 0.5,
            "status_poll_seconds": 0.1,
        }
    )


@pytest.fixture
def storage(settings: Settings) -> Storage:
    return open_storage(settings)


@pytest.fixture
def supervisor(quick: Settings, database: Database, storage: Storage) -> Iterator[Supervisor]:
    supervisor = new_supervisor(quick, database, storage)
    yield supervisor
    supervisor.close()
    wait_until(lambda: not psutil.Process().children(recursive=True) or _only_servers())


def _only_servers() -> bool:
    return not [p for p in psutil.Process().children(recursive=True) if "tests.workers.fake_runner" in command_of(p)]
