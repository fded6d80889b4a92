"""How many parameters stages leave at least, as far as config and headers tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from workers.architectures import architecture_of
from workers.shapes import config_after
from workers.shapes.matrices import num_embedding_weights, num_stored_blocks, num_weights_of_blocks
from workers.sources.facts import ModelFacts
from workers.techniques import LogitDistillation, LowRank, Stage, TieEmbeddings, VocabularyPruning


def fewest_parameters(stages: Sequence[Stage], facts: ModelFacts) -> tuple[int, int]:
    """Values of the embedding, and of all else, that ``stages`` are sure to leave.

    Raises:
        UserError: as :func:`workers.shapes.config_after` says.
    """
    before, after = facts.config, config_after(stages, facts.config)
    techniques = set(map(type, stages))
    loses_tokens = VocabularyPruning in techniques  # how many stay, the text decides
    num_embeddings = 0 if loses_tokens else num_embedding_weights(after)
    if any(isinstance(stage, LogitDistillation) and stage.makes_new_type for stage in stages):
        return num_embeddings, num_weights_of_blocks(after)
    if LowRank in techniques:  # what is left of layers, their values decide
        return num_embeddings, 0
    architecture, matrix = architecture_of(before), num_embedding_weights(before)
    head = 0 if architecture.task == "classification" or architecture.is_tied(before) else matrix
    num_others = facts.num_parameters - matrix
    if loses_tokens:
        num_others -= head + (before["vocab_size"] if architecture.task == "masked" else 0)
    elif TieEmbeddings in techniques:
        num_others -= head
    return num_embeddings, int(num_others * _part_of_weights_left(before, after))


def _part_of_weights_left(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """Of the weights outside the embedding, at least: those of the blocks, or of what is as wide and high as channels.

    1 where no stage changes the shape.
    """
    of_blocks = num_weights_of_blocks(after) / num_weights_of_blocks(before)
    hidden_size = architecture_of(before).size("hidden_size")
    fewer_blocks = num_stored_blocks(after) / num_stored_blocks(before)
    return float(min(of_blocks, fewer_blocks * (after[hidden_size] / before[hidden_size]) ** 2))
