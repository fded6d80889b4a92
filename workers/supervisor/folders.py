"""Work folders: one an attempt, locked by its worker, so that what a dead worker left can be told and removed."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO, Self

from workers.supervisor.succession import hand_on, take_over

logger = logging.getLogger(__name__)


class WorkFolder:
    """The folder of one attempt, there while the block runs.

    The kernel gives the lock beside it back when the worker dies, however it dies and in whichever container.
    """

    def __init__(self, work_dir: Path, job_id: str, fence: int) -> None:
        self.path = work_dir / f"{job_id}.{fence}"
        self._job_id = job_id
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Self:
        """Lock and make it, with what earlier attempts fetched and finished."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(_lock_path(self.path))
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir()
        remove_orphans(self.path.parent, self._job_id)
        take_over(self.path.parent, self._job_id, self.path)
        for name in ("logs", "source"):
            (self.path / name).mkdir(exist_ok=True)
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove it; what is of use to the next attempt stays."""
        assert self._lock is not None
        _remove(self.path)
        self._lock.close()


def remove_orphans(work_dir: Path, job_id: str = "*") -> None:
    """Remove the folders that workers who are gone left, of one job or of all; what a successor can use is kept."""
    for lock_path in work_dir.glob(f"{job_id}.*.lock"):
        with suppress(FileNotFoundError), lock_path.open("rb+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            logger.info("removing what a dead worker left in %s", lock_path.stem)
            _remove(lock_path.with_suffix(""))


def _locked(path: Path) -> IO[bytes]:
    """Open and lock ``path``; anew when another worker took it for an orphan's and removed it in between."""
    while True:
        file = path.open("wb")
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def _lock_path(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")


def _remove(folder: Path) -> None:
    """Remove a folder and its lock; what a successor can use waits elsewhere.

    What cannot be removed is an orphan for the next start.
    """
    hand_on(folder)
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("cannot remove %s: %s", folder, error)
        return
    _lock_path(folder).unlink(missing_ok=True)


def tail(log: Path, num_bytes: int = 4096) -> str | None:
    """The end of a log, if it has any text."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - num_bytes))
            text = file.read().decode("utf-8", "replace").replace("\x00", "").strip()
    except FileNotFoundError:
        return None
    return text or None
