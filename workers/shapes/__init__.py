"""What the stages that change a model's shape make of its config: without torch, so that preflight asks the same.

One module a technique: whether a model can become what the stage wants, and the sizes that it has then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from workers.shapes.attention import config_of_a_window
from workers.shapes.depth import config_of_fewer_blocks
from workers.shapes.matrices import in_features
from workers.shapes.ranks import check_ranks
from workers.shapes.sharing import check_compact, config_of_shared_blocks
from workers.shapes.student import config_of_student
from workers.shapes.tying import config_of_one_matrix
from workers.shapes.vocabulary import config_of_fewer_tokens
from workers.shapes.width import config_of_smaller_widths
from workers.sources.facts import ModelFacts
from workers.techniques import (
    DepthPruning,
    LogitDistillation,
    LowRank,
    ShareLayers,
    SlidingWindow,
    Stage,
    StageOptions,
    TieEmbeddings,
    VocabularyPruning,
    WidthPruning,
    placed,
)

# Of a stage, where it is in the recipe, and the config before it: the config after it, as far as it is known before.
_RULES: Mapping[type[StageOptions], Callable[[Any, str, Mapping[str, Any]], dict[str, Any]]] = {
    DepthPruning: config_of_fewer_blocks,
    WidthPruning: config_of_smaller_widths,
    VocabularyPruning: config_of_fewer_tokens,
    TieEmbeddings: config_of_one_matrix,
    ShareLayers: config_of_shared_blocks,
    SlidingWindow: config_of_a_window,
    LogitDistillation: config_of_student,
}


def config_after(stages: Sequence[Stage], config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the model once all ``stages`` have changed its shape; others leave it as it is.

    Raises:
        UserError: the model cannot have that shape; ``param`` names the stage and its option.
    """
    config = dict(config)
    for param, stage in placed(stages):
        check_compact(stage, param, config)
        if isinstance(stage, LowRank):
            check_ranks(stage, param, config)
        if stage.reshapes:
            config = _RULES[type(stage)](stage, param, config)
    return config


def facts_after(stages: Sequence[Stage], facts: ModelFacts) -> ModelFacts:
    """What layers are compressed of: the facts with the config, and the columns, that ``stages`` leave.

    Raises:
        UserError: as :func:`config_after` says.
    """
    config = config_after(stages, facts.config)
    if not any(isinstance(stage, WidthPruning | LogitDistillation) and stage.reshapes for stage in stages):
        return replace(facts, config=config)
    return replace(facts, config=config, linear_in_features=in_features(config))
