"""Which tokens the blocks of a model see, by its config, and whether they can be made to see fewer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workers.architectures import architecture_of
from workers.errors import UserError
from workers.techniques import SlidingWindow
from workers.techniques.options import OptionError

_LOCAL = "sliding_attention"
_FULL = "full_attention"
# Llama's, and what Mistral has no place for. Its code heeds `pretraining_tp` no more, nor did it ever change a result.
_BIASES = ("attention_bias", "mlp_bias")
_NOT_OF_MISTRAL = (*_BIASES, "pretraining_tp", "layer_types")


@dataclass(frozen=True)
class _Attention:
    """How config.json of a model type says what its blocks see, and means it where it is silent: as transformers do."""

    window: int | None = None  # where config.json has no `sliding_window`
    switch: str | None = None  # what has to be true there for `sliding_window` to count
    # Which blocks have the window, where `layer_types` does not say it; None for a type that has one for all blocks.
    local_blocks: Callable[[Mapping[str, Any], int], list[bool]] | None = None
    are_kinds_fixed: bool = False  # the two kinds of blocks have rotary positions of their own
    becomes_mistral: bool = False  # no block of this type has a window, but Mistral is the same model with one


def _local_from_max_window_layers(config: Mapping[str, Any], num_blocks: int) -> list[bool]:
    first = _number(config, "max_window_layers", 28, least=0)
    return [index >= first for index in range(num_blocks)]


def _local_by_pattern(config: Mapping[str, Any], num_blocks: int) -> list[bool]:
    period = _number(config, "sliding_window_pattern", 6, least=1)
    return [(index + 1) % period != 0 for index in range(num_blocks)]


_QWEN = _Attention(window=4_096, switch="use_sliding_window", local_blocks=_local_from_max_window_layers)
_ATTENTION: Mapping[str, _Attention] = {
    "llama": _Attention(becomes_mistral=True),
    "mistral": _Attention(window=4_096),
    "phi3": _Attention(),
    "qwen2": _QWEN,
    "qwen3": _QWEN,
    "gemma3_text": _Attention(window=4_096, local_blocks=_local_by_pattern, are_kinds_fixed=True),
}


def windows_of(config: Mapping[str, Any]) -> list[int | None]:
    """How many tokens, itself among them, a token sees in each block; None where that is all before it.

    Of a config whose ``layer_types`` are of another number of blocks, as before it is known which of them stay, there
    is one entry for each of those. Types of models that know no window are not asked for.

    Raises:
        UserError: ``invalid_config``.
    """
    how, num_blocks = _ATTENTION[str(config["model_type"])], int(config["num_hidden_layers"])
    if how.becomes_mistral or (how.switch is not None and not config.get(how.switch)):
        return [None] * num_blocks
    window: int | None = config.get("sliding_window", how.window)
    if how.local_blocks is None:
        return [window] * num_blocks
    kinds = config.get("layer_types")
    if kinds is None:
        are_local = how.local_blocks(config, num_blocks)
    elif isinstance(kinds, list):
        are_local = [kind == _LOCAL for kind in kinds]
    else:
        raise _invalid("layer_types")
    return [window if is_local else None for is_local in are_local]


def has_kinds(config: Mapping[str, Any]) -> bool:
    """Whether some blocks of a model may have a window while others have none."""
    how = _ATTENTION.get(str(config.get("model_type")))
    return how is not None and how.local_blocks is not None


def kinds_of(windows: Sequence[int | None]) -> list[str]:
    """What ``layer_types`` of config.json calls blocks of these windows."""
    return [_FULL if window is None else _LOCAL for window in windows]


def config_of_a_window(stage: SlidingWindow, param: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config whose blocks see as little as the stage, at ``param``, lets them.

    Raises:
        UserError: ``invalid_value``, ``unsupported_architecture`` or ``invalid_config``.
    """
    architecture = architecture_of(config)
    how = _ATTENTION.get(architecture.model_type)
    _check_supported(how, param, config)
    assert how is not None
    before, num_blocks = windows_of(config), int(config["num_hidden_layers"])
    is_known = len(before) == num_blocks
    try:
        full = _full_blocks(stage, how, before, is_known=is_known)
        after = [None if block in full else stage.window for block in range(len(before))]
        _check_narrower(stage.window, before, after, architecture.max_positions(config))
    except OptionError as error:
        raise UserError("invalid_value", f"{error}.", param=f"{param}.{error.option}") from error
    if how.becomes_mistral:
        return _as_mistral(config, stage.window)
    if how.switch is None:
        return {**config, "sliding_window": stage.window}
    # Loaders that heed no `layer_types` go by the first block that has a window.
    said = {"layer_types": kinds_of(after), "max_window_layers": after.index(stage.window)}
    return {**config, how.switch: True, "sliding_window": stage.window, **said}


def _check_supported(how: _Attention | None, param: str, config: Mapping[str, Any]) -> None:
    """Raise UserError ``unsupported_architecture`` for a model that cannot say that it has a window."""
    model_type = config.get("model_type")
    if how is None:
        problem = f"transformers knows no sliding window for models of type {model_type}"
    elif how.becomes_mistral and (biases := [name for name in _BIASES if config.get(name)]):
        problem = f"its linear layers have biases ({biases[0]}), and Mistral, which it would become, has none"
    elif model_type == "mistral" and config.get("layer_types") is not None:
        problem = "config.json has layer_types, with which transformers opens it as another type (ministral)"
    elif config.get("use_bidirectional_attention"):
        problem = "it looks ahead as well as back (use_bidirectional_attention)"
    else:
        return
    raise UserError(
        "unsupported_architecture",
        f"The model cannot be given a window: {problem}.",
        param=f"{param}.technique",
        hint="Types of models that can: " + ", ".join(sorted(_ATTENTION)) + ".",
    )


def _full_blocks(
    stage: SlidingWindow, how: _Attention, before: Sequence[int | None], *, is_known: bool
) -> Sequence[int]:
    """The blocks that go on seeing everything; OptionError where they cannot, or none is left to see less."""
    full_now = [block for block, window in enumerate(before) if window is None]
    chosen = stage.full_blocks
    if chosen and how.local_blocks is None:
        raise OptionError("full_blocks", "must be left out: models of this type have one window for all blocks")
    if how.are_kinds_fixed:
        if len(full_now) == len(before):
            raise OptionError("technique", "must be another: no block of the model has a window that could be smaller")
        if is_known and chosen is not None and sorted(chosen) != full_now:
            raise OptionError(
                "full_blocks",
                "must be left out: the blocks that see everything have rotary positions of their own and stay which "
                "they are",
            )
        return full_now
    if chosen is None:
        return full_now if len(full_now) < len(before) else ()
    if not is_known:  # the job asks again when it is
        return ()
    if beyond := [block for block in chosen if block >= len(before)]:
        raise OptionError("full_blocks", f"must be below {len(before)}, the number of blocks, not {beyond[0]}")
    if narrow := [block for block in chosen if before[block] is not None]:
        raise OptionError(
            "full_blocks", f"must name blocks that see everything now; block {narrow[0]} has a window of "
            f"{before[narrow[0]]}"
        )  # fmt: skip
    if len(chosen) == len(before):
        raise OptionError("full_blocks", f"must leave at least one of the model's {len(before)} blocks to the window")
    return chosen


def _check_narrower(
    window: int, before: Sequence[int | None], after: Sequence[int | None], positions: int | None
) -> None:
    """Raise OptionError where a block would see more than it does, or none would see less."""
    if positions is not None and window >= positions:
        raise OptionError("window", f"must be below {positions}, the model's positions: it would change nothing")
    seen = [now for now, then in zip(before, after, strict=True) if then is not None]
    narrowest = min((now for now in seen if now is not None), default=None)
    if narrowest is not None and window > narrowest:
        raise OptionError("window", f"must be at most {narrowest}, the window that the model has")
    if all(now == window for now in seen):
        raise OptionError("window", f"must be below {window}, the window that the model has: it would change nothing")


def _as_mistral(config: Mapping[str, Any], window: int) -> dict[str, Any]:
    """Llama's config as Mistral's: the same parameters by the same names, the same arithmetic, and a window.

    Where config.json is silent the two types mean different things, so that it is made to say them.
    """
    meant = {"num_key_value_heads": config["num_attention_heads"], "max_position_embeddings": 2_048}
    kept = {name: value for name, value in config.items() if name not in _NOT_OF_MISTRAL}
    return {
        **meant,
        **kept,
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": window,
    }


def _number(config: Mapping[str, Any], name: str, default: int, *, least: int) -> int:
    value = config.get(name, default)
    if type(value) is not int or value < least:
        raise _invalid(name)
    return value


def _invalid(name: str) -> UserError:
    return UserError(
        "invalid_config",
        f"{name} in config.json does not say which blocks have a window.",
        param="model.id",
        hint="Compare config.json with the one that the checkpoint was saved with.",
    )
