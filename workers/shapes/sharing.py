"""Whether blocks of a model can have the same parameters, and which stages a model of compact layers can go through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.architectures import architecture_of
from workers.architectures.compact import Compact, compact_of
from workers.errors import UserError
from workers.shapes.attention import has_kinds, kinds_of, windows_of
from workers.techniques import (
    DepthPruning,
    LayerOptions,
    LogitDistillation,
    LowRank,
    QuantizationAwareFineTuning,
    ShareLayers,
    StageOptions,
    WidthPruning,
)
from workers.techniques.options import OptionError


def config_of_shared_blocks(stage: ShareLayers, param: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the model whose blocks share as the stage, at ``param``, says.

    Raises:
        UserError: ``invalid_value``, or ``unsupported_architecture`` where blocks of one group would do different
            things with the same parameters.
    """
    architecture = architecture_of(config)
    try:
        groups = stage.groups_of(int(config[architecture.size("num_hidden_layers")]))
    except OptionError as error:
        raise UserError("invalid_value", f"{error}.", param=f"{param}.{error.option}") from error
    if config.get("scale_attn_by_inverse_layer_idx"):
        raise UserError(
            "unsupported_architecture",
            "The model scales attention by the number of its block (scale_attn_by_inverse_layer_idx): no block can "
            "have another's parameters.",
            param=f"{param}.technique",
            hint="Leave share_layers out.",
        )
    kinds = kinds_of(windows_of(config)) if has_kinds(config) else []
    for group in groups if kinds else []:
        if len({kinds[block] for block in group}) > 1:
            raise UserError(
                "unsupported_architecture",
                f"Blocks {group} see different parts of the text ({', '.join(kinds[block] for block in group)}), with "
                "positions of their own: their parameters mean different things.",
                param=f"{param}.{'groups' if stage.groups is not None else 'group_size'}",
                hint="List in groups blocks of one kind, as layer_types in config.json names them.",
            )
    blocks = architecture.blocks
    sources = {f"{blocks}.{block}": f"{blocks}.{group[0]}" for group in groups for block in group[1:]}
    return {**config, **Compact(sources=sources).to_config()}


def check_compact(stage: StageOptions, param: str, config: Mapping[str, Any]) -> None:
    """Refuse a stage, at ``param``, that a model of this config, with factors or shared blocks, cannot go through.

    Raises UserError ``stages_conflict`` or ``unsupported_architecture``.
    """
    compact = compact_of(config)
    if isinstance(stage, LowRank) and architecture_of(config).is_recurrent:
        raise UserError(
            "unsupported_architecture",
            f"transformers computes with the weights of a {config['model_type']} itself, and not with its layers: none "
            "can be two factors.",
            param=f"{param}.technique",
            hint="Use depth_pruning or quantization, or distil into a student of another shape.",
        )
    cuts = isinstance(stage, DepthPruning | WidthPruning | ShareLayers | LowRank)
    cuts = cuts or (isinstance(stage, LogitDistillation) and stage.reshapes and not stage.makes_new_type)
    problem = None
    if compact and cuts:
        what = "factors of low rank" if compact.ranks else "shared parameters"
        problem = f"blocks with {what} cannot be cut, shared or factored any more"
    elif compact.sources and isinstance(stage, LayerOptions) and (stage.needs or stage.plan_share):
        problem = "shared parameters have several inputs, and it fits them to the calibration text of one"
    elif compact.sources and isinstance(stage, QuantizationAwareFineTuning):
        problem = "it would round shared parameters once for each block"
    if problem is not None:
        raise UserError(
            "stages_conflict",
            f"{stage.technique} is not for this model: {problem}.",
            param=f"{param}.technique",
            hint="Use techniques that need no calibration, such as round_to_nearest, dynamic_int8 or magnitude."
            if compact.sources and isinstance(stage, LayerOptions | QuantizationAwareFineTuning)
            else "Begin with a model whose blocks are plain, or leave the stage out.",
        )
