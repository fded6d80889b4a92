"""The checkpoint of a model whose blocks have the same parameters, in groups."""

from __future__ import annotations

from typing import Any

from workers.architectures.compact import compact_of
from workers.engine.checkpoint import Checkpoint
from workers.engine.shaping import Shaping
from workers.shapes.sharing import config_of_shared_blocks
from workers.techniques import ShareLayers


def share_blocks(shaping: Shaping, stage: ShareLayers) -> tuple[Checkpoint, dict[str, Any]]:
    """The model's checkpoint with one set of parameters for each group, and what the report says of them.

    Raises:
        UserError: as :func:`config_of_shared_blocks` says.
    """
    skeleton, checkpoint = shaping.skeleton, shaping.skeleton.checkpoint
    config = config_of_shared_blocks(stage, shaping.param, checkpoint.config)
    groups = stage.groups_of(skeleton.num_blocks)
    sources = compact_of(config).sources
    gone = {name for block in sources for name in checkpoint.parameters(f"{block}.")}
    means = {}
    if stage.method == "mean":
        for first, *others in groups:
            prefix = f"{skeleton.block_name(first)}."
            for name in checkpoint.parameters(prefix):
                end = name.removeprefix(prefix)
                means[name] = [name, *(f"{skeleton.block_name(block)}.{end}" for block in others)]
    metrics = {"groups": groups, "num_stored_blocks": skeleton.num_blocks - len(sources)}
    return checkpoint.with_means(means, config).without(gone, config), metrics
