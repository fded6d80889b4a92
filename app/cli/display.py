"""How far a job is: a live line in a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from app.cli.output import duration, plain

_LINE_EVERY_SECONDS = 15.0
_LINE_EVERY_FRACTION = 0.1


class JobDisplay:
    """Shows one job until it is closed."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Progress | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Progress(
                SpinnerColumn(),
                BarColumn(bar_width=30),
                TextColumn("{task.percentage:>3.0f} %"),
                TextColumn("{task.description}", markup=False),
                console=console,
                transient=True,
            )
            self._task = self._live.add_task("", total=1.0)
        self._last_text = ""
        self._last_key: tuple[object, ...] = ()
        self._last_time = 0.0
        self._last_fraction = 0.0

    def __enter__(self) -> Self:
        """The display, started."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the live line."""
        if self._live is not None:
            self._live.stop()

    def show(self, job: Mapping[str, Any]) -> None:
        """Show the job as it is now."""
        text, fraction = describe(job), float(job["progress"].get("fraction") or 0.0)
        if self._live is not None:
            self._live.update(self._task, completed=fraction, description=text)
            return
        now = time.monotonic()
        key = (job["status"], job["attempt"], job["progress"].get("stage"))
        moved = fraction - self._last_fraction >= _LINE_EVERY_FRACTION
        if key == self._last_key and not moved and now - self._last_time < _LINE_EVERY_SECONDS:
            return
        line = f"{100 * fraction:3.0f} %  {text}"
        if line != self._last_text:  # a job that waits for an hour fills no log
            self._console.print(line, soft_wrap=True)
            self._last_text, self._last_key, self._last_time, self._last_fraction = line, key, now, fraction


def describe(job: Mapping[str, Any]) -> str:
    """Where a job is, in one line: ``running · gptq, block 12 of 30 · 1:24 left``."""
    progress = job["progress"]
    parts = [str(job["status"])]
    if job["status"] == "queued":
        position = progress.get("queue_position")
        if position:
            parts.append(f"number {position} in queue {job['queue']}")
    elif job["status"] in ("running", "pausing", "cancelling"):
        parts.append(_step(job))
        if progress.get("eta_seconds") is not None:
            parts.append(f"{duration(progress['eta_seconds'])} left")
    if job["attempt"] > 1:
        parts.append(f"attempt {job['attempt']}")
    return plain(" · ".join(part for part in parts if part))


def _step(job: Mapping[str, Any]) -> str:
    progress, names = job["progress"], []
    stage, step = progress.get("stage"), str(progress.get("step") or "")
    if step.startswith("certify"):  # of the result, not of a stage
        return step.replace(".", ": ", 1).replace("_", " ")
    if stage is not None and stage < len(job["stages"]):
        name = job["stages"][stage]["technique"]
        num_stages = len(job["stages"])
        names.append(f"stage {stage + 1} of {num_stages}: {name}" if num_stages > 1 else name)
    if step.startswith("plan."):  # a pass of its own over all blocks, before the first is compressed
        names.append("planning")
    if progress.get("block") is not None and progress.get("num_blocks"):
        # A training counts its steps there, those that are done.
        unit, done = ("step", progress["block"]) if step == "train" else ("block", progress["block"] + 1)
        names.append(f"{unit} {done} of {progress['num_blocks']}")
    elif step:
        names.append(step)
    return ", ".join(names)
