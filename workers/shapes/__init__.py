"""What the stages that change a model's shape make of its config: without torch, so that preflight asks the same.

One module a technique: whether a model can become what the stage wants, and the sizes that it has then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from workers.shapes.attention import config_of_a_window
from workers.shapes.depth import config_of_fewer_blocks
from workers.techniques import DepthPruning, SlidingWindow, Stage, StructureOptions

# Of a stage, its index in the recipe and the config before it: the config after it, as far as it is known before.
_RULES: Mapping[type[StructureOptions], Callable[[Any, int, Mapping[str, Any]], dict[str, Any]]] = {
    DepthPruning: config_of_fewer_blocks,
    SlidingWindow: config_of_a_window,
}


def config_after(stages: Sequence[Stage], config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the model once all ``stages`` have changed its shape; others leave it as it is.

    Raises:
        UserError: the model cannot have that shape; ``param`` names the stage and its option.
    """
    config = dict(config)
    for index, stage in enumerate(stages):
        if isinstance(stage, StructureOptions):
            config = _RULES[type(stage)](stage, index, config)
    return config
