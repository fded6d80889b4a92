"""How many parameters stages leave at least, as far as config and headers tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from workers.architectures import architecture_of
from workers.shapes import config_after
from workers.shapes.width import widths_of
from workers.sources.facts import ModelFacts
from workers.techniques import Stage, TieEmbeddings, VocabularyPruning


def fewest_parameters(stages: Sequence[Stage], facts: ModelFacts) -> tuple[int, int]:
    """Values of the embedding, and of all else, that ``stages`` are sure to leave.

    Raises:
        UserError: as :func:`workers.shapes.config_after` says.
    """
    after = config_after(stages, facts.config)
    num_embeddings, num_others = _parts_left(stages, facts, after)
    return num_embeddings, int(num_others * _part_of_weights_left(facts.config, after))


def _num_embedding_weights(config: Mapping[str, Any]) -> int:
    """Of the token embedding."""
    return int(config["vocab_size"] * config[architecture_of(config).size("embedding_size")])


def _parts_left(stages: Sequence[Stage], facts: ModelFacts, after: Mapping[str, Any]) -> tuple[int, int]:
    """Values of the embedding, and of all else with every block, that stages are sure to leave; ``after`` them."""
    before = facts.config
    architecture, matrix = architecture_of(before), _num_embedding_weights(before)
    head = 0 if architecture.task == "classification" or architecture.is_tied(before) else matrix
    num_others = facts.num_parameters - matrix
    techniques = set(map(type, stages))
    if VocabularyPruning in techniques:  # how many tokens stay, the text decides
        bias = before["vocab_size"] if architecture.task == "masked" else 0
        return 0, num_others - head - bias
    return _num_embedding_weights(after), num_others - (head if TieEmbeddings in techniques else 0)


def _part_of_weights_left(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """Of the weights outside the embedding, at least: those of the blocks, or of what is as wide and high as channels.

    1 where no stage changes the shape.
    """
    architecture = architecture_of(before)
    num_blocks, widths = architecture.size("num_hidden_layers"), (widths_of(before), widths_of(after))
    in_block = widths[1].num_block_weights(architecture) / widths[0].num_block_weights(architecture)
    channels = (widths[1].hidden_size / widths[0].hidden_size) ** 2
    return float(after[num_blocks] / before[num_blocks] * min(in_block, channels))
