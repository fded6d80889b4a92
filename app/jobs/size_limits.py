"""Limits of bytes that no result of a recipe can keep, as far as a model's headers tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.jobs.schemas import JobSubmission
from workers.architectures import architecture_of
from workers.architectures.compact import compact_of
from workers.errors import UserError
from workers.recipe import Recipe
from workers.shapes import config_after
from workers.shapes.width import widths_of
from workers.sources.facts import ModelFacts
from workers.techniques import LowRank, MixedPrecision, TieEmbeddings, VocabularyPruning


def check_budget(recipe: Recipe, facts: ModelFacts) -> None:
    """Refuse a limit that the model's parameters exceed even at the fewest bits there are to choose from.

    Raises UserError ``budget_too_small``.
    """
    for index, stage in enumerate(recipe.stages):
        if not isinstance(stage, MixedPrecision) or stage.max_size_bytes is None:
            continue
        least = _least_bytes(recipe, facts)
        if stage.max_size_bytes < least:
            raise UserError(
                "budget_too_small",
                f"{facts.num_parameters:,} parameters, their layers at {stage.widths[0]} bits, have {least:,} bytes.",
                param=f"recipe.stages[{index}].max_size_bytes",
                hint=f"Allow more than {least:,} bytes: scales, and all that is no linear layer, come on top.",
            )


def check_size(submission: JobSubmission, facts: ModelFacts) -> None:
    """Refuse a limit that the recipe's result exceeds whatever its values are, as far as headers tell.

    The compress process, which knows every layer, holds it against the exact size before it computes anything.
    Raises UserError ``constraint_impossible``.
    """
    limit, recipe = submission.constraints.max_size_bytes, submission.recipe
    if limit is None or recipe.stores_bitmasks:
        return
    least = _least_bytes(recipe, facts)
    if limit < least:
        raise UserError(
            "constraint_impossible",
            f"The recipe's result has at least {least:,} bytes and {limit:,} are allowed.",
            param="constraints.max_size_bytes",
            hint=f"Allow more than {least:,} bytes, or choose fewer bits.",
        )


def _least_bytes(recipe: Recipe, facts: ModelFacts) -> int:
    """What the result has at least: codes of every weight, without scales, and embeddings of two bytes a value.

    Values that are stored in full keep the source's type, of two bytes or more.
    """
    stage, config = recipe.quantization, config_after(recipe.stages, facts.config)
    num_embeddings, num_others = _parts_left(recipe, facts, config)
    num_parameters = num_embeddings + int(num_others * _part_of_weights_left(facts.config, config))
    if stage is None or not recipe.stores_codes:
        is_dense = recipe.cast is None and "quantization_config" not in facts.config and not recipe.early_stages
        return max(2 * num_parameters, facts.parameter_bytes if is_dense else 0)
    num_bits = stage.widths[0] if isinstance(stage, MixedPrecision) else stage.facts.num_bits
    kept = 0 if stage.embeddings else num_embeddings
    return 2 * kept + (num_parameters - kept) * num_bits // 8


def _num_embedding_weights(config: Mapping[str, Any]) -> int:
    """Of the token embedding."""
    return int(config["vocab_size"] * config[architecture_of(config).size("embedding_size")])


def _parts_left(recipe: Recipe, facts: ModelFacts, after: Mapping[str, Any]) -> tuple[int, int]:
    """Values of the embedding, and of all else with every block, that stages are sure to leave; ``after`` them."""
    before, techniques = facts.config, set(map(type, recipe.stages))
    architecture, matrix = architecture_of(before), _num_embedding_weights(before)
    if LowRank in techniques:  # what is left of layers, their values decide
        return (_num_embedding_weights(after) if VocabularyPruning not in techniques else 0), 0
    head = 0 if architecture.task == "classification" or architecture.is_tied(before) else matrix
    num_others = facts.num_parameters - matrix
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
    num_stored = [config[num_blocks] - len(compact_of(config).sources) for config in (before, after)]
    return float(num_stored[1] / num_stored[0] * min(in_block, channels))
