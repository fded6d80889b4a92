"""What the stages that change a model's shape make of its config: without torch, so that preflight asks the same.

One module a technique: whether a model can become what the stage wants, and the sizes that it has then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from workers.shapes.attention import config_of_a_window
from workers.shapes.depth import config_of_fewer_blocks
from workers.shapes.sharing import check_compact, config_of_shared_blocks
from workers.shapes.tying import config_of_one_matrix
from workers.shapes.vocabulary import config_of_fewer_tokens
from workers.shapes.width import config_of_smaller_widths, widths_of
from workers.sources.facts import ModelFacts
from workers.techniques import (
    DepthPruning,
    Iterate,
    ShareLayers,
    SlidingWindow,
    Stage,
    StructureOptions,
    TieEmbeddings,
    VocabularyPruning,
    WidthPruning,
)

# Of a stage, its index in the recipe and the config before it: the config after it, as far as it is known before.
_RULES: Mapping[type[StructureOptions], Callable[[Any, int, Mapping[str, Any]], dict[str, Any]]] = {
    DepthPruning: config_of_fewer_blocks,
    WidthPruning: config_of_smaller_widths,
    VocabularyPruning: config_of_fewer_tokens,
    TieEmbeddings: config_of_one_matrix,
    ShareLayers: config_of_shared_blocks,
    SlidingWindow: config_of_a_window,
}


def config_after(stages: Sequence[Stage], config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the model once all ``stages`` have changed its shape; others leave it as it is.

    Raises:
        UserError: the model cannot have that shape; ``param`` names the stage and its option.
    """
    config = dict(config)
    for index, stage in enumerate(stages):
        check_compact(stage, index, config)
        inner = stage.pruning if isinstance(stage, Iterate) else stage
        if isinstance(inner, StructureOptions):
            config = _RULES[type(inner)](inner, index, config)
    return config


def facts_after(stages: Sequence[Stage], facts: ModelFacts) -> ModelFacts:
    """What layers are compressed of: the facts with the config, and the columns, that ``stages`` leave.

    Raises:
        UserError: as :func:`config_after` says.
    """
    config = config_after(stages, facts.config)
    if not any(isinstance(stage, WidthPruning) for stage in stages):
        return replace(facts, config=config)
    return replace(facts, config=config, linear_in_features=widths_of(config).in_features)
