"""Whether a model can do without the blocks that a stage leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.architectures import architecture_of
from workers.errors import UserError
from workers.shapes.attention import has_kinds, kinds_of, windows_of
from workers.techniques import DepthPruning
from workers.techniques.options import OptionError


def config_of_fewer_blocks(stage: DepthPruning, param: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with as many blocks as the stage, at ``param``, leaves.

    Raises:
        UserError: ``invalid_value``, ``unsupported_task`` or ``unsupported_architecture``.
    """
    architecture = architecture_of(config)
    of_task = {"causal": "perplexity", "classification": "divergence"}.get(architecture.task)
    if stage.method in ("perplexity", "divergence") and stage.method != of_task:
        needed = "a causal language model" if stage.method == "perplexity" else "a classifier"
        raise UserError(
            "unsupported_task",
            f"The model is not {needed}, which {stage.method} is measured of.",
            param=f"{param}.method",
            hint=f"Use {f'{of_task}, ' if of_task else ''}block_influence, or list the blocks.",
        )
    if config.get("scale_attn_by_inverse_layer_idx"):
        raise UserError(
            "unsupported_architecture",
            "The model scales attention by the number of its block (scale_attn_by_inverse_layer_idx): no block can "
            "take another's place.",
            param=f"{param}.technique",
            hint="Use a technique that keeps all blocks.",
        )
    num_blocks = int(config[architecture.size("num_hidden_layers")])
    try:
        stage.check(num_blocks)
    except OptionError as error:
        raise UserError("invalid_value", f"{error}.", param=f"{param}.{error.option}") from error
    left = num_blocks - stage.num_removed(num_blocks)
    own_name = architecture.size("num_hidden_layers")
    names = [name for name in (own_name, "num_hidden_layers") if name == own_name or name in config]
    sizes: dict[str, Any] = dict.fromkeys(names, left)
    if has_kinds(config):
        kinds = kinds_of(windows_of(config))
        # Else it is measured later which blocks go: until then there are more kinds than blocks.
        gone = set(stage.blocks or ()) if len(kinds) == num_blocks else set()
        sizes["layer_types"] = [kind for block, kind in enumerate(kinds) if block not in gone]
    return {**config, **sizes}
