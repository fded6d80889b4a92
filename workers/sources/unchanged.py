"""Whether the files of a model are still those that were checked: a local folder is linked to, not copied."""

from __future__ import annotations

import json
from pathlib import Path

from workers.errors import UserError


def file_states(folder: Path) -> dict[str, list[int]]:
    """Size in bytes and time of change in nanoseconds of every file, by name."""
    found = {path.name: path.stat() for path in sorted(folder.iterdir())}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def check_unchanged(source: Path) -> None:
    """Raise UserError ``model_changed`` where a file of ``{source}/model`` is not as fetch left it."""
    recorded = json.loads((source / "model.json").read_text(encoding="utf-8"))["fingerprint"]
    try:
        current = file_states(source / "model")
    except OSError:
        current = {}
    changed = sorted(name for name in recorded if recorded[name] != current.get(name))
    if changed:
        raise UserError(
            "model_changed",
            f"{changed[0]} was changed while the job ran.",
            param="model.id",
            hint="Leave the model's folder alone until the job has ended, then submit it again.",
        )
