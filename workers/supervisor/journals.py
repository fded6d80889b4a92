"""Journals between attempts: what a stopped attempt finished waits here for the next one.

``{work_dir}/journals/{job_id}`` is the journal of a job that nobody runs. A worker that takes the job up renames it
into its own work folder, and back when that folder is removed.
"""

from __future__ import annotations

import logging
import shutil
from contextlib import suppress
from pathlib import Path

from app.attempts import service as attempts
from app.database import Database

logger = logging.getLogger(__name__)

_NAME = "journal"  # in a work folder
_KEPT = "journals"  # in the work directory


def take_journal(work_dir: Path, job_id: str, folder: Path) -> None:
    """Move what earlier attempts at the job left on this machine into ``folder``, an attempt's work folder."""
    with suppress(FileNotFoundError):
        (work_dir / _KEPT / job_id).rename(folder / _NAME)


def keep_journal(folder: Path) -> None:
    """Set the journal of a work folder aside for the next attempt; where one waits already, the longer of the two."""
    journal, kept = folder / _NAME, folder.parent / _KEPT / folder.name.partition(".")[0]
    if not journal.is_dir() or (kept.exists() and _length(kept) >= _length(journal)):
        return
    shutil.rmtree(kept, ignore_errors=True)
    try:
        kept.parent.mkdir(exist_ok=True)
        journal.rename(kept)
    except OSError as error:
        logger.warning("cannot keep the journal of %s, whose work will be repeated: %s", folder.name, error)


def forget_journals(work_dir: Path, database: Database) -> None:
    """Remove the journals of jobs that have ended, here or elsewhere. May raise what a database outage raises."""
    names = [path.name for path in (work_dir / _KEPT).glob("*")]
    if not names:
        return
    with database.transaction() as session:
        live = attempts.not_ended(session, names)
    for name in set(names) - live:
        shutil.rmtree(work_dir / _KEPT / name, ignore_errors=True)


def _length(journal: Path) -> int:
    return len(list(journal.glob("block-*.json")))
