"""Limits of bytes that no result of a recipe can keep, as far as a model's headers tell."""

from __future__ import annotations

from app.jobs.schemas import JobSubmission
from workers.errors import UserError
from workers.recipe import Recipe
from workers.shapes.parameters import fewest_parameters
from workers.sources.facts import ModelFacts
from workers.techniques import MixedPrecision


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
    stage = recipe.quantization
    num_embeddings, num_others = fewest_parameters(recipe.stages, facts)
    num_parameters = num_embeddings + num_others
    if stage is None or not recipe.stores_codes:
        is_dense = recipe.cast is None and "quantization_config" not in facts.config and not recipe.early_stages
        return max(2 * num_parameters, facts.parameter_bytes if is_dense else 0)
    num_bits = stage.widths[0] if isinstance(stage, MixedPrecision) else stage.facts.num_bits
    kept = 0 if stage.embeddings else num_embeddings
    return 2 * kept + (num_parameters - kept) * num_bits // 8
