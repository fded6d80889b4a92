"""The stages that give the model another shape, which they decide before anything is written.

What they leave is not a new checkpoint on disk but the same files read in another way: what follows reads it as it
would read any checkpoint, and writes the artifact from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from workers.architectures import architecture_of
from workers.engine.attention import narrow_attention
from workers.engine.checkpoint import Checkpoint
from workers.engine.depth import leave_out_blocks
from workers.engine.shaping import Shaping
from workers.engine.sharing import share_blocks
from workers.engine.skeleton import Skeleton
from workers.engine.tying import tie_embeddings
from workers.engine.vocabulary import leave_out_tokens
from workers.engine.width import leave_out_units
from workers.techniques import (
    DepthPruning,
    ShareLayers,
    SlidingWindow,
    StructureOptions,
    TieEmbeddings,
    VocabularyPruning,
    WidthPruning,
)

# What each technique does: from the model as it is to the checkpoint of its new shape, and metrics for the report.
_CHANGES: Mapping[type[StructureOptions], Callable[[Shaping, Any], tuple[Checkpoint, dict[str, Any]]]] = {
    DepthPruning: leave_out_blocks,
    WidthPruning: leave_out_units,
    VocabularyPruning: leave_out_tokens,
    TieEmbeddings: tie_embeddings,
    ShareLayers: share_blocks,
    SlidingWindow: narrow_attention,
}


def reshape(shaping: Shaping, stage: StructureOptions) -> tuple[Skeleton, dict[str, Any]]:
    """The model as the stage leaves it, and what the report says of the stage.

    Raises:
        UserError: the model cannot have the shape that is asked for.
    """
    before = shaping.skeleton
    checkpoint, metrics = _CHANGES[type(stage)](shaping, stage)
    after = Skeleton(checkpoint, architecture_of(checkpoint.config), before.device)
    counts = {"num_parameters": after.num_parameters, "original_num_parameters": before.num_parameters}
    return after, counts | metrics
