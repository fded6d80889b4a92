"""The sizes of a model's blocks, and whether it can have those that a stage leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workers.architectures import Architecture, architecture_of
from workers.errors import UserError
from workers.techniques import WidthPruning
from workers.techniques.options import OptionError


@dataclass(frozen=True)
class Widths:
    """What the layers of every block of a model have as rows and columns."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    @property
    def queries_a_group(self) -> int:
        """How many query heads read one key-value head."""
        return self.num_attention_heads // self.num_key_value_heads


def widths_of(config: Mapping[str, Any]) -> Widths:
    """The sizes that a ``config.json`` gives a model, those that it leaves out too."""
    architecture = architecture_of(config)

    def size(name: str) -> Any:
        return config.get(architecture.size(name), architecture.default_sizes.get(name))

    hidden_size, num_heads = int(size("hidden_size")), int(size("num_attention_heads"))
    head_dim = size("head_dim") if architecture.has_head_dim else None
    return Widths(
        hidden_size,
        int(size("intermediate_size") or 4 * hidden_size),
        num_heads,
        int(size("num_key_value_heads") or num_heads),
        int(head_dim or hidden_size // num_heads),
    )


def config_of_smaller_widths(stage: WidthPruning, param: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the sizes that the stage, at ``param``, leaves.

    Raises:
        UserError: ``invalid_value``; ``unsupported_architecture`` for blocks without heads and an FFN; or
            ``invalid_config`` where heads do not divide the sizes that the model has.
    """
    architecture = architecture_of(config)
    if architecture.is_recurrent:
        raise UserError(
            "unsupported_architecture",
            f"A {architecture.model_type} has no attention heads and no FFN to leave a part of out.",
            param=f"{param}.technique",
            hint="Use depth_pruning, or distil into a student of another shape.",
        )
    before = widths_of(config)
    is_bound = binds_heads(architecture, config)
    if before.num_attention_heads % before.num_key_value_heads or (
        is_bound and before.num_attention_heads * before.head_dim != before.hidden_size
    ):
        raise UserError(
            "invalid_config",
            f"The model's {before.num_attention_heads} heads do not divide into those that share keys and values, or "
            "do not divide its hidden size.",
            param="model.id",
            hint="Compare config.json with the one that the checkpoint was saved with.",
        )
    try:
        after = _widths_left(stage, architecture, config, before)
    except OptionError as error:
        raise UserError("invalid_value", f"{error}.", param=f"{param}.{error.option}") from error
    changed = {**config}
    for name in ("hidden_size", "num_attention_heads"):
        own_name, size = architecture.size(name), getattr(after, name)
        changed |= {key: size for key in (own_name, name) if key == own_name or key in config}
    embedding = architecture.size("embedding_size")
    if config[embedding] == before.hidden_size:
        changed[embedding] = after.hidden_size
    # What config.json leaves to a rule is written where the rule would say something else now.
    for name in ("intermediate_size", "num_key_value_heads", "head_dim"):
        own_name, size = architecture.size(name), getattr(after, name)
        if own_name in config or getattr(widths_of(changed), name) != size:
            changed[own_name] = size
    return changed


def _widths_left(stage: WidthPruning, architecture: Architecture, config: Mapping[str, Any], before: Widths) -> Widths:
    """The sizes after the stage; OptionError where the model, or its config.json, cannot have them."""
    neurons = stage.size_left(stage.intermediate_option, before.intermediate_size, stage.multiple_of)
    groups = stage.size_left(stage.heads_option, before.num_key_value_heads, 1)
    num_heads = groups * before.queries_a_group
    if binds_heads(architecture, config):
        hidden_size = _bound_hidden_size(stage, architecture, before, num_heads)
    else:
        divisor = num_heads if architecture.hidden_is_multiple_of_heads else 1
        step = math.lcm(stage.multiple_of, divisor)
        hidden_size = stage.size_left(stage.hidden_option, before.hidden_size, step)
        option = stage.hidden_option or stage.heads_option
        if option is not None and hidden_size % divisor:
            raise OptionError(
                option,
                f"must be another: of a {architecture.model_type}, hidden_size has to be a multiple of the number of "
                f"heads, and {hidden_size} is none of {num_heads}",
            )
    embedding_size = config[architecture.size("embedding_size")]
    if embedding_size != before.hidden_size and hidden_size == embedding_size and stage.hidden_option is not None:
        raise OptionError(
            stage.hidden_option,
            f"must not leave {embedding_size}, the columns of the embedding: the model has a layer between the two, "
            "which it would lose",
        )
    return Widths(hidden_size, neurons, num_heads, groups, before.head_dim)


def _bound_hidden_size(stage: WidthPruning, architecture: Architecture, before: Widths, num_heads: int) -> int:
    """The hidden size of a model whose heads are as wide as it divides by their number: heads and channels go together.

    Raises:
        OptionError: that is not what the stage asks for.
    """
    step = math.lcm(stage.multiple_of, before.head_dim)
    hidden_size = stage.size_left(stage.hidden_option, before.hidden_size, step)
    if hidden_size == num_heads * before.head_dim:
        return hidden_size
    reason = (
        f"config.json of this {architecture.model_type} has no size of heads, which is hidden_size / "
        f"{architecture.size('num_attention_heads')}: {before.head_dim}"
    )
    if stage.hidden_option is None:
        assert stage.heads_option is not None  # with all heads and channels it has what it had
        raise OptionError(
            stage.heads_option,
            f"must come with hidden_size: {num_heads * before.head_dim}, which {num_heads} heads have together; "
            f"{reason}",
        )
    if stage.heads_option is None:
        fewer = max(1, before.num_key_value_heads // 2)
        together = f"{fewer} and hidden_size: {fewer * before.queries_a_group * before.head_dim}"
        remedy = f"come with fewer heads, for example num_key_value_heads: {together}"
        raise OptionError(
            stage.hidden_option,
            f"must {'be left out' if before.num_key_value_heads == 1 else remedy}; {reason}",
        )
    raise OptionError(
        stage.hidden_option,
        f"must leave {num_heads * before.head_dim} channels, which {num_heads} heads have together, and not "
        f"{hidden_size}; {reason}",
    )


def binds_heads(architecture: Architecture, config: Mapping[str, Any]) -> bool:
    """Whether a head is as wide as ``hidden_size`` divided by the number of heads, whatever else config.json says."""
    if not architecture.has_head_dim:
        return True
    rules = [config.get("rope_scaling"), config.get("rope_parameters")]
    has_factors = any(isinstance(rule, Mapping) and {"short_factor", "long_factor"} & rule.keys() for rule in rules)
    return architecture.factors_bind_heads and has_factors
