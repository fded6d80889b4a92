"""Whether the files of a model are still those that were checked: a local folder is linked to, not copied."""

from __future__ import annotations

import json
from pathlib import Path

from workers.errors import UserError

FileStates = dict[str, list[int]]  # by name; lists, because they go through JSON


def file_state(path: Path) -> list[int]:
    """Size in bytes and time of change in nanoseconds."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def file_states(folder: Path) -> FileStates:
    """The state of every file of a folder."""
    return {path.name: file_state(path) for path in sorted(folder.iterdir())}


def check_same(recorded: FileStates, current: FileStates) -> None:
    """Raise UserError ``model_changed`` where a file of ``recorded`` is now another, or gone."""
    changed = sorted(name for name in recorded if recorded[name] != current.get(name))
    if changed:
        raise UserError(
            "model_changed",
            f"{changed[0]} was changed while the job ran.",
            param="model.id",
            hint="Leave the model's folder alone until the job has ended, then submit it again.",
        )


def check_unchanged(source: Path) -> None:
    """Raise UserError ``model_changed`` where a file of ``{source}/model`` is not as fetch left it."""
    recorded = json.loads((source / "model.json").read_text(encoding="utf-8"))["fingerprint"]
    try:
        current = file_states(source / "model")
    except OSError:
        current = {}
    check_same(recorded, current)
