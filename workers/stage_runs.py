"""Which early stages are run together, and where in a recipe such a run is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from workers.techniques import LayerOptions, StageOptions

Report = dict[str, Any]  # of a stage: its technique, metrics, fallbacks and layers
Placed = tuple[str, StageOptions]  # a stage, and where it is in the recipe


@dataclass(frozen=True)
class Place:
    """Where a run of stages is, and who hears how far it is."""

    index: int  # of its first stage in the recipe, or of the stage that contains them
    progress: Callable[[str, int, int, float], None]  # step, block, number of blocks, fraction of the run
    name: str  # in a recipe no other run has it: chance is another in each
    span: tuple[float, float] = (0.0, 1.0)  # of the fall of the learning rate, which rounds share


def runs_of(stages: Sequence[Placed]) -> list[tuple[int, list[Placed]]]:
    """Neighbours that compress layers together, all others alone; each run with the index of its first stage."""

    def is_in_a_run(placed_stage: Placed) -> bool:
        _, stage = placed_stage
        return isinstance(stage, LayerOptions) and not stage.leaves_model

    runs = groupby(enumerate(stages), lambda each: -1 if is_in_a_run(each[1]) else each[0])
    found = [list(run) for _, run in runs]
    return [(run[0][0], [stage for _, stage in run]) for run in found]


def report_of(stage: StageOptions, metrics: dict[str, Any]) -> Report:
    """Of a stage that treats no layers one by one."""
    return {"technique": stage.technique, "metrics": metrics, "fallbacks": [], "layers": {}}
