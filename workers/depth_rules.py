"""Whether a model can do without the blocks that a stage leaves out: from its config alone, so that both sides ask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.architectures import architecture_of
from workers.errors import UserError
from workers.techniques import DepthPruning
from workers.techniques.options import OptionError


def check_depth(stage: DepthPruning, index: int, config: Mapping[str, Any], num_blocks: int) -> None:
    """Refuse a stage, ``index`` in its recipe, for a model that has ``num_blocks`` by then.

    Raises UserError ``invalid_value``, ``unsupported_task`` or ``unsupported_architecture``.
    """
    if stage.method == "perplexity" and architecture_of(config).task != "causal":
        raise UserError(
            "unsupported_task",
            "The model is no causal language model and has no perplexity to choose blocks by.",
            param=f"recipe.stages[{index}].method",
            hint="Use block_influence, or list the blocks.",
        )
    if config.get("scale_attn_by_inverse_layer_idx"):
        raise UserError(
            "unsupported_architecture",
            "The model scales attention by the number of its block (scale_attn_by_inverse_layer_idx): no block can "
            "take another's place.",
            param=f"recipe.stages[{index}].technique",
            hint="Use a technique that keeps all blocks.",
        )
    try:
        stage.check(num_blocks)
    except OptionError as error:
        raise UserError("invalid_value", f"{error}.", param=f"recipe.stages[{index}].{error.option}") from error
