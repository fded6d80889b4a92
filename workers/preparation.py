"""The early stages of a recipe, each of which leaves a model for the next: another shape, or other weights.

What is left for the engine's stream are the last stages, which compress layers while the artifact is written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from workers.engine.journal import Journal
from workers.engine.reshaping import reshape
from workers.engine.shaping import Shaping
from workers.engine.skeleton import Skeleton
from workers.recipe import Recipe
from workers.techniques import StructureOptions, TrainingOptions
from workers.texts import Texts
from workers.training.model import opened_again
from workers.training.stage import TrainingStage, checkpoint_of

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
        measured: Callable[[int, dict[str, Any]], None],
        finished: Callable[[int, dict[str, Any]], None],
    ) -> None:
        """What was decided is kept in ``journal``.

        ``measured`` hears of what a stage that trains measures on its way, ``finished`` of each stage with its metrics.
        """
        self.reports: list[dict[str, Any]] = []
        self._recipe = recipe
        self._texts = texts
        self._journal = journal
        self._waiting_bytes = waiting_bytes
        self._progress = progress
        self._measured = measured
        self._finished = finished

    def run(self, skeleton: Skeleton) -> Skeleton:
        """The model as the early stages leave it.

        Raises:
            UserError: the model cannot become what a stage asks for.
        """
        teacher = skeleton
        for index, stage in enumerate(self._recipe.early_stages):
            journal = self._journal.inner(stage_name(index))
            if isinstance(stage, StructureOptions):
                skeleton, metrics = reshape(self._shaping(skeleton, index, journal), stage)
            else:
                assert isinstance(stage, TrainingOptions)
                is_whole = skeleton is teacher
                skeleton, metrics = self._train(skeleton, teacher, stage, index, journal)
                # What learned its task before anything was taken from it is what the student learns from.
                teacher = skeleton if is_whole else teacher
            self.reports.append({"technique": stage.technique, "metrics": metrics, "fallbacks": [], "layers": {}})
            self._finished(index, metrics)
        return skeleton

    def _shaping(self, skeleton: Skeleton, index: int, journal: Journal) -> Shaping:
        return Shaping(skeleton, index, self._texts, journal, self._waiting_bytes, partial(self._progress, index))

    def _train(
        self, skeleton: Skeleton, teacher: Skeleton, stage: TrainingOptions, index: int, journal: Journal
    ) -> tuple[Skeleton, dict[str, Any]]:
        training = TrainingStage(
            stage,
            index,
            self._recipe,
            _fresh(skeleton),
            _fresh(teacher),
            self._texts,
            journal,
            partial(self._progress, index),
            partial(self._measured, index),
        )
        metrics = training.run()
        return opened_again(checkpoint_of(journal), skeleton), metrics


def _fresh(skeleton: Skeleton) -> Skeleton:
    """The same model, empty: a training fills it and does not empty it again."""
    return Skeleton(skeleton.checkpoint, skeleton.architecture, skeleton.device)


def stage_name(index: int) -> str:
    """Of the inner journal of an early stage."""
    return f"stage-{index:02d}"
