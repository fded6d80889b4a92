"""The early stages of a recipe, each of which leaves a model for the next: another shape, or other weights.

What is left for the engine's stream are the last stages, which compress layers while the artifact is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workers.engine.journal import Journal
from workers.engine.reshaping import reshape
from workers.engine.shaping import Shaping
from workers.engine.skeleton import Skeleton
from workers.recipe import Recipe
from workers.techniques import StructureOptions
from workers.texts import Texts

Progress = Callable[[int, str, int, int, float], None]  # stage, step, block, num_blocks, fraction of the stage


class Preparation:
    """Runs the early stages of one job, and gathers what the report says of them."""

    def __init__(
        self,
        recipe: Recipe,
        texts: Texts,
        journal: Journal,
        waiting_bytes: int,
        progress: Progress,
        finished: Callable[[int, dict[str, Any]], None],
    ) -> None:
        """What was decided is kept in ``journal``; ``finished`` hears of each stage with its metrics."""
        self.reports: list[dict[str, Any]] = []
        self._recipe = recipe
        self._texts = texts
        self._journal = journal
        self._waiting_bytes = waiting_bytes
        self._progress = progress
        self._finished = finished

    def run(self, skeleton: Skeleton) -> Skeleton:
        """The model as the early stages leave it.

        Raises:
            UserError: the model cannot become what a stage asks for.
        """
        for index, stage in enumerate(self._recipe.early_stages):
            skeleton, metrics = self._shape(skeleton, stage, index)
            self.reports.append(
                {
                    "technique": self._recipe.stages[index].technique,
                    "metrics": metrics,
                    "fallbacks": [],
                    "layers": {},
                }
            )
            self._finished(index, metrics)
        return skeleton

    def _shape(self, skeleton: Skeleton, stage: StructureOptions, index: int) -> tuple[Skeleton, dict[str, Any]]:
        def progress(step: str, block: int, num_blocks: int, fraction: float) -> None:
            self._progress(index, step, block, num_blocks, fraction)

        journal = self._journal.inner(stage_name(index))
        return reshape(Shaping(skeleton, index, self._texts, journal, self._waiting_bytes, progress), stage)


def stage_name(index: int) -> str:
    """Of the inner journal of an early stage."""
    return f"stage-{index:02d}"
