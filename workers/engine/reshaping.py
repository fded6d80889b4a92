"""The first stages of a recipe: they give the model another shape, and decide that before anything is written.

What they leave is not a new checkpoint on disk but the same files read in another way: the stream that follows writes
the artifact from it, with or without compressing layers on the way.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from workers.engine.depth import Cut, choose_blocks, without_blocks
from workers.engine.journal import Journal
from workers.engine.skeleton import Skeleton
from workers.recipe import Recipe
from workers.techniques import DepthPruning

Progress = Callable[[int, str, int, int, float], None]  # stage, step, block, num_blocks, fraction of the stage


def reshape(
    skeleton: Skeleton,
    recipe: Recipe,
    calibration: Sequence[Tensor],
    journal: Journal,
    waiting_bytes: int,
    progress: Progress,
    finished: Callable[[int, dict[str, Any]], None],
) -> tuple[Skeleton, list[dict[str, Any]]]:
    """The model as the stages that change its shape leave it, and the metrics of each of them.

    ``calibration`` holds samples × tokens for each length of samples. What was measured is kept in ``journal``;
    ``finished`` hears of each stage with its metrics.

    Raises:
        UserError: the model cannot lose what is asked for.
    """
    metrics: list[dict[str, Any]] = []
    for index, stage in enumerate(recipe.structure_stages):
        assert isinstance(stage, DepthPruning)
        before, name = skeleton, f"shape-{index}"

        def said(step: str, block: int, num_blocks: int, fraction: float, index: int = index) -> None:
            progress(index, step, block, num_blocks, fraction)

        def measured(index: int = index, stage: DepthPruning = stage, name: str = name) -> dict[str, Any]:
            steps = journal.inner(name)
            return asdict(choose_blocks(before, stage, index, calibration, steps, waiting_bytes, said))  # noqa: B023

        cut = Cut(**journal.once(name, measured))
        shutil.rmtree(journal.folder / name, ignore_errors=True)
        checkpoint = without_blocks(before.checkpoint, before, cut.kept())
        skeleton = Skeleton(checkpoint, before.architecture, before.device)
        metrics.append(
            {
                "num_blocks": skeleton.num_blocks,
                "original_num_blocks": before.num_blocks,
                "num_parameters": skeleton.num_parameters,
                "original_num_parameters": before.num_parameters,
                "removed_blocks": cut.removed,
                "scores": cut.scores,
                "losses": cut.losses,
            }
        )
        finished(index, metrics[-1])
    return skeleton, metrics
