"""What every command shares: the two consoles, JSON, and text that a terminal may show."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console

_FILE_WIDTH = 200  # of tables that go to a file or a pipe, where no terminal says how wide it is


def _console(*, stderr: bool) -> Console:
    made = Console(stderr=stderr, highlight=False, markup=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _FILE_WIDTH
    return made


console = _console(stderr=False)
errors = _console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Failed(Exception):  # noqa: N818 - the end of a command, told to its user
    """The command ends here with ``exit_code``."""

    def __init__(self, message: str, *, code: str, exit_code: int, hint: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.exit_code = exit_code
        self.hint = hint


def print_json(data: object, *, one_line: bool = False) -> None:
    """Write JSON, and nothing else, to standard output."""
    sys.stdout.write(json.dumps(data, indent=None if one_line else 2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def plain(text: object) -> str:
    """Text from elsewhere without the control characters that would move a terminal's cursor."""
    return "".join(character if character.isprintable() or character == "\n" else "�" for character in str(text))


def size(num_bytes: float | None) -> str:
    """Bytes for people: 138.4 MB."""
    if num_bytes is None:
        return "-"
    if num_bytes < 1000:
        return f"{num_bytes:.0f} B"
    value = float(num_bytes)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.95 or unit == "TB":
            return f"{value:.1f} {unit}"
    raise AssertionError


def duration(seconds: float | None) -> str:
    """Seconds for people: 3:07 or 1:02:45."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def number(value: float | None, digits: int = 3) -> str:
    """A number for people, or a dash."""
    return "-" if value is None else f"{value:,.{digits}f}"


def techniques_of(job: Mapping[str, Any]) -> str:
    """The techniques of a job's stages: ``magnitude + gptq W4A16``."""
    names = []
    for stage in job["recipe"]["stages"]:
        scheme = stage.get("scheme")
        names.append(f"{stage['technique']} {scheme}" if scheme else str(stage["technique"]))
    return " + ".join(names)
