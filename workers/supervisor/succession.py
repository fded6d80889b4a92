"""From one attempt to the next: what a stopped attempt fetched and finished waits here for its successor.

``{work_dir}/sources/{job_id}`` and ``{work_dir}/journals/{job_id}`` are those of a job that nobody runs. A worker that
takes the job up renames them into its own work folder, and back when that folder is removed.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from app.attempts import service as attempts
from app.database import Database
from workers.sources.fetched import MARKER

logger = logging.getLogger(__name__)

# Of an entry, and by how many bits one in a folder is worth less.
_WORTH, _WORTH_OF_FOLDER = 1 << 80, 20
# In a work folder, and while it waits in the work directory.
_WAITS_IN = {"journal": "journals", "source": "sources"}


def take_over(work_dir: Path, job_id: str, folder: Path) -> None:
    """Move what earlier attempts at the job left on this machine into ``folder``, an attempt's work folder."""
    for name, waits_in in _WAITS_IN.items():
        with suppress(FileNotFoundError):
            (work_dir / waits_in / job_id).rename(folder / name)


def hand_on(folder: Path) -> None:
    """Set aside what of a work folder the next attempt can use; where something waits already, what is worth more."""
    _set_aside(folder, "journal", _num_steps)
    _set_aside(folder, "source", _is_marked)


def forget_ended(work_dir: Path, database: Database) -> None:
    """Remove what waits for jobs that have ended, here or elsewhere. May raise what a database outage raises."""
    waiting = [path for waits_in in _WAITS_IN.values() for path in (work_dir / waits_in).glob("*")]
    if not waiting:
        return
    with database.transaction() as session:
        live = attempts.not_ended(session, sorted({path.name for path in waiting}))
    for path in waiting:
        if path.name not in live:
            shutil.rmtree(path, ignore_errors=True)


def _set_aside(folder: Path, name: str, worth: Callable[[Path], int]) -> None:
    left, waiting = folder / name, folder.parent / _WAITS_IN[name] / folder.name.partition(".")[0]
    if not left.is_dir() or worth(left) <= (worth(waiting) if waiting.exists() else 0):
        return
    shutil.rmtree(waiting, ignore_errors=True)
    try:
        waiting.parent.mkdir(exist_ok=True)
        left.rename(waiting)
    except OSError as error:
        logger.warning("cannot keep the %s of %s: its work will be repeated: %s", name, folder.name, error)


def _num_steps(journal: Path) -> int:
    """What is done: finished blocks and decisions, each of which outweighs all that was measured for it in folders.

    Those are removed with it.
    """
    entries = [path.relative_to(journal) for path in journal.rglob("*.json") if not path.name.startswith("identity")]
    return sum(_WORTH >> _WORTH_OF_FOLDER * (len(path.parts) - 1) for path in entries)


def _is_marked(source: Path) -> int:
    """Half of a model is worth nothing."""
    return int((source / MARKER).exists())
