"""The config of a student: of the model with fewer blocks and smaller widths, or of a model of another type."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from workers.architectures import ARCHITECTURES, Architecture, architecture_of
from workers.errors import UserError
from workers.shapes.depth import config_of_fewer_blocks
from workers.shapes.matrices import num_matrix_weights
from workers.shapes.width import Widths, binds_heads, config_of_smaller_widths, widths_of
from workers.techniques import DepthPruning, LogitDistillation, WidthPruning
from workers.techniques.options import OptionError
from workers.techniques.student_options import Student

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What the options of stages that cut are called of a student.
_OPTIONS = {"num_key_value_heads": "num_heads", "blocks": "num_layers", "technique": "num_layers"}
_POSITIONS = 2_048  # of a model with attention, where the one before has no limit
_MAMBA2_HEAD_DIM = 64
# Scans in plain PyTorch hold a matrix of so many rows and columns for each head; what they give is the same for all.
_MAMBA2_CHUNK = 64


def config_of_student(stage: LogitDistillation, param: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of what the stage, at ``param``, makes of the model with ``config`` before it trains.

    Raises:
        UserError: ``invalid_value``, ``unsupported_task`` or ``unsupported_architecture``; ``param`` names the option.
    """
    student = stage.student
    assert student is not None
    try:
        if student.model_type is not None:
            return _config_of_another_type(student, f"{param}.student", config)
        cuts = cuts_of(student, config)
    except OptionError as error:
        raise UserError("invalid_value", f"{error}.", param=f"{param}.student.{error.option}") from error
    for cut in cuts:
        try:
            rule: Any = config_of_fewer_blocks if isinstance(cut, DepthPruning) else config_of_smaller_widths
            config = rule(cut, param, config)
        except UserError as error:
            raise _as_of_student(error) from error
    return dict(config)


def cuts_of(student: Student, config: Mapping[str, Any]) -> Sequence[DepthPruning | WidthPruning]:
    """The stages that turn the model with ``config`` into ``student``, which is of its own type.

    Raises:
        OptionError: a size is larger than the model's, is none that its heads allow, or none is smaller.
    """
    architecture = architecture_of(config)
    num_blocks = int(config[architecture.size("num_hidden_layers")])
    cuts: list[DepthPruning | WidthPruning] = []
    if student.num_layers is not None:
        _check_at_most("num_layers", student.num_layers, num_blocks)
        if student.num_layers < num_blocks:
            kept = spread_blocks(student.num_layers, num_blocks)
            cuts.append(DepthPruning(method="list", blocks=[each for each in range(num_blocks) if each not in kept]))
    wanted = {name: getattr(student, name) for name in ("num_heads", "intermediate_size", "hidden_size")}
    if any(size is not None for size in wanted.values()) and not architecture.is_recurrent:
        widths = widths_of(config)
        sizes = _sizes_left(wanted, architecture, config, widths)
        smaller = {name: size for name, size in sizes.items() if size < getattr(widths, name)}
        if smaller:
            cuts.append(WidthPruning.model_validate({"importance": student.importance, **smaller}))
    elif any(size is not None for size in wanted.values()):
        option = next(name for name, size in wanted.items() if size is not None)
        raise OptionError(option, f"must be left out: a {architecture.model_type} becomes smaller by num_layers alone")
    if not cuts:
        option = "num_layers" if student.num_layers is not None else next(name for name in wanted if wanted[name])
        raise OptionError(option, "or another size must be smaller: the model has all of them already")
    return cuts


def spread_blocks(count: int, num_blocks: int) -> list[int]:
    """Which of ``num_blocks`` blocks stay, if ``count`` do: evenly spaced, the first and the last with them.

    Of twelve, six are 0, 2, 4, 7, 9 and 11, as in DistilBERT's own script (arXiv:1910.01108); one is the first.
    """
    if count == 1:
        return [0]
    return [(2 * each * (num_blocks - 1) + count - 1) // (2 * (count - 1)) for each in range(count)]


def _sizes_left(
    wanted: Mapping[str, int | None], architecture: Architecture, config: Mapping[str, Any], widths: Widths
) -> dict[str, int]:
    """The widths of the student as ``width_pruning`` calls them; OptionError where the model cannot have them."""
    for name, size in wanted.items():
        if size is not None:
            _check_at_most(name, size, getattr(widths, "num_attention_heads" if name == "num_heads" else name))
    num_heads, hidden_size = wanted["num_heads"], wanted["hidden_size"]
    if binds_heads(architecture, config):  # where both go together, either says the other
        if num_heads is None and hidden_size is not None and not hidden_size % widths.head_dim:
            num_heads = hidden_size // widths.head_dim
        elif hidden_size is None and num_heads is not None:
            hidden_size = num_heads * widths.head_dim
        if (num_heads or 0) * widths.head_dim != (hidden_size or 0):
            raise OptionError(
                "hidden_size" if wanted["hidden_size"] is not None else "num_heads",
                f"must be a multiple of {widths.head_dim}, the columns of a head: of this {architecture.model_type}, "
                f"hidden_size is num_heads × {widths.head_dim}",
            )
    sizes = {"hidden_size": hidden_size, "intermediate_size": wanted["intermediate_size"]}
    if num_heads is not None:
        if num_heads % widths.queries_a_group:
            raise OptionError(
                "num_heads",
                f"must be a multiple of {widths.queries_a_group}: so many heads of the model share keys and values",
            )
        sizes["num_key_value_heads"] = num_heads // widths.queries_a_group
    return {name: size for name, size in sizes.items() if size is not None}


def _check_at_most(option: str, size: int, most: int) -> None:
    if size > most:
        raise OptionError(option, f"must be at most {most}, which the model has")


def _as_of_student(error: UserError) -> UserError:
    """The error of a stage that cuts, as one of the student: its options have other names there."""
    place, _, option = str(error.param).rpartition(".")
    name = _OPTIONS.get(option, option)
    return UserError(error.code, error.message.replace(option, name), param=f"{place}.student.{name}", hint=error.hint)


def _config_of_another_type(student: Student, param: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model of the type, with the vocabulary of the model before.

    What it does not say, transformers' class for the type says. OptionError for a type that the model has already,
    or a student that has as many weights.
    """
    before = architecture_of(config)
    assert student.model_type is not None
    if before.task != "causal":
        raise UserError(
            "unsupported_task",
            "The model is no causal language model, and only such a one can have a student of another type.",
            param=f"{param}.model_type",
            hint="Leave model_type out and give sizes: the student is of the model's own type then.",
        )
    if student.model_type == before.model_type:
        raise OptionError("model_type", f"must be left out: the model is a {student.model_type} already")
    row = ARCHITECTURES[student.model_type, "causal"]
    after = {
        "model_type": student.model_type,
        "vocab_size": config["vocab_size"],
        "tie_word_embeddings": before.is_tied(config),
        **{name: config.get(name) for name in TOKEN_IDS},
        row.size("hidden_size"): student.hidden_size,
        row.size("embedding_size"): student.hidden_size,
        row.size("num_hidden_layers"): student.num_layers,
        **(_of_recurrence(student) if row.is_recurrent else _of_attention(student, row, before.max_positions(config))),
    }
    most = num_matrix_weights(config)
    if (num_weights := num_matrix_weights(after)) >= most:
        raise OptionError(
            "hidden_size",
            f"or another size must be smaller: the student's matrices have {num_weights:,} weights, and the model's "
            f"{most:,}",
        )
    return after


def _of_attention(student: Student, row: Architecture, max_positions: int | None) -> dict[str, Any]:
    """Heads with keys and values of their own, and as many positions as the model before has."""
    assert student.num_heads is not None
    assert student.hidden_size is not None
    sizes: dict[str, Any] = {
        row.size("num_attention_heads"): student.num_heads,
        row.size("intermediate_size"): student.intermediate_size or 4 * student.hidden_size,
        row.size("max_position_embeddings"): max_positions or _POSITIONS,
    }
    if row.has_head_dim:
        sizes |= {"num_key_value_heads": student.num_heads, "head_dim": student.hidden_size // student.num_heads}
    if row.model_type == "mistral":  # which has a window where config.json is silent
        sizes["sliding_window"] = None
    return sizes


def _of_recurrence(student: Student) -> dict[str, Any]:
    """Twice as many channels inside a block, as published Mambas have; of Mamba-2 heads in one group."""
    assert student.hidden_size is not None
    if student.model_type == "mamba":
        return {"expand": 2, "state_size": 16}
    head_dim = math.gcd(_MAMBA2_HEAD_DIM, 2 * student.hidden_size)
    heads = {"num_heads": 2 * student.hidden_size // head_dim, "head_dim": head_dim, "n_groups": 1}
    return {"expand": 2, "state_size": 128, "chunk_size": _MAMBA2_CHUNK, **heads}
