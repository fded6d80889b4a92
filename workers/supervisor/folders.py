"""Work folders: one an attempt, locked by its worker, so that what a dead worker left can be told and removed."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO, Self

logger = logging.getLogger(__name__)


class WorkFolder:
    """The folder of one attempt, there while the block runs.

    The kernel gives the lock beside it back when the worker dies, however it dies and in whichever container.
    """

    def __init__(self, work_dir: Path, job_id: str, fence: int) -> None:
        self.path = work_dir / f"{job_id}.{fence}"
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Self:
        """Lock and make it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(_lock_path(self.path))
        shutil.rmtree(self.path, ignore_errors=True)
        for name in ("logs", "source"):
            (self.path / name).mkdir(parents=True)
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove it."""
        assert self._lock is not None
        _remove(self.path)
        self._lock.close()


def remove_orphans(work_dir: Path) -> None:
    """Remove the folders of workers that are gone."""
    for lock_path in work_dir.glob("*.lock"):
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
    """Remove a folder and then its lock. What cannot be removed now is an orphan for the next start."""
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
