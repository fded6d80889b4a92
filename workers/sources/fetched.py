"""Whether what an earlier attempt at a job fetched is all there, unchanged, and what the job still asks for."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from workers.disk import flush
from workers.sources.unchanged import FileStates, file_state

MARKER = "fetched.json"  # in {work}/source, written last


def mark_complete(source: Path, request: dict[str, Any]) -> None:
    """Say that ``source`` holds everything that ``request`` asks for. Flushed first: a power cut may come."""
    for path in _files(source):
        if not path.is_symlink():
            flush(path)
    temporary = source / f".{MARKER}.tmp"
    marker = {"asked": _asked(request), "revision": request["model"].get("revision"), "files": _states(source)}
    temporary.write_text(json.dumps(marker), encoding="utf-8")
    flush(temporary)
    temporary.rename(source / MARKER)
    flush(source)


def is_complete(source: Path, request: dict[str, Any]) -> bool:
    """Whether ``source`` was marked complete for the same request, and every file is as it was then.

    A revision that the earlier attempt resolved, and that this one therefore asks for, is the same request.
    """
    try:
        marker = json.loads((source / MARKER).read_bytes())
        resolved = json.loads((source / "model.json").read_bytes())["revision"]
        return (
            marker["asked"] == _asked(request)
            and request["model"].get("revision") in (marker["revision"], resolved)
            and marker["files"] == _states(source)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def unmark(source: Path) -> None:
    """Say that ``source`` is about to change."""
    (source / MARKER).unlink(missing_ok=True)


def _asked(request: dict[str, Any]) -> dict[str, Any]:
    """What decides the files, but for the revision. Another version of ours may divide texts differently."""
    return {
        "attar": version("attar"),
        "model": request["model"]["id"],
        "model_roots": request["model_roots"],
        "recipe": request["recipe"],
    }


def _files(source: Path) -> list[Path]:
    paths = (Path(folder) / name for folder, _, names in os.walk(source) for name in names)
    return sorted(path for path in paths if path.name not in (MARKER, f".{MARKER}.tmp"))


def _states(source: Path) -> FileStates:
    """Of every file below ``source``, those that links lead to included."""
    return {str(path.relative_to(source)): file_state(path) for path in _files(source)}
