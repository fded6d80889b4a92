"""One table: what the engine needs to know of an architecture. Torch-free.

A row says where the blocks, the embedding, what lies around the blocks, and the head are, in names of the checkpoint,
and which linear layers of a block share one input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.architectures.architecture import Architecture, Producer, Task
from workers.architectures.decoders import DECODERS
from workers.architectures.encoders import ENCODERS
from workers.architectures.recurrent import RECURRENT
from workers.errors import UserError

ARCHITECTURES: Mapping[tuple[str, Task], Architecture] = {
    (row.model_type, row.task): row for row in (*DECODERS, *RECURRENT, *ENCODERS)
}
# What transformers opens a model with that is for each task.
AUTO_CLASSES: Mapping[Task, str] = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
}
# How the names in config.json's `architectures` end.
_ENDS: Mapping[Task, tuple[str, ...]] = {
    "causal": ("ForCausalLM", "LMHeadModel"),
    "masked": ("ForMaskedLM",),
    "classification": ("ForSequenceClassification",),
}

__all__ = [
    "ARCHITECTURES",
    "AUTO_CLASSES",
    "Architecture",
    "Producer",
    "Task",
    "architecture_of",
    "num_classes",
    "row_of",
]


def row_of(config: Mapping[str, Any]) -> Architecture | None:
    """The table's row for a ``config.json``; None where there is none."""
    task = _task_of(config)
    return None if task is None else ARCHITECTURES.get((str(config.get("model_type")), task))


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The table's row for a ``config.json``.

    Raises UserError ``unsupported_architecture`` for a type of model, or ``unsupported_task`` for a head, that is not
    in the table.
    """
    model_type, names = config.get("model_type"), config.get("architectures") or []
    tasks = [task for known, task in ARCHITECTURES if known == model_type]
    if not tasks:
        raise UserError(
            "unsupported_architecture",
            f"Models of type {model_type!r} are not supported.",
            param="model.id",
            hint="Supported model types: " + ", ".join(sorted({known for known, _ in ARCHITECTURES})) + ".",
        )
    row = row_of(config)
    if row is None:
        raise UserError(
            "unsupported_task",
            f"The model is {', '.join(map(str, names)) or f'a {model_type} of no named architecture'}, "
            "which has no head that is supported.",
            param="model.id",
            hint=f"Choose a {model_type} model whose config.json names, in `architectures`, one that ends in "
            f"{' or '.join(_ENDS[task][0] for task in tasks)}.",
        )
    if row.task != "causal":
        _check_encoder(config)
    return row


def num_classes(config: Mapping[str, Any]) -> int:
    """How many classes the head of a classifier tells apart: two where config.json is silent."""
    names = config.get("id2label")
    return len(names) if isinstance(names, Mapping) and names else int(config.get("num_labels", 2))


def _task_of(config: Mapping[str, Any]) -> Task | None:
    """The task of a checkpoint; a config.json that names no architecture is one of a causal model, as of old."""
    names = config.get("architectures") or ["ForCausalLM"]
    found = [task for name in names for task, ends in _ENDS.items() if str(name).endswith(ends)]
    return found[0] if found else None


def _check_encoder(config: Mapping[str, Any]) -> None:
    """Raise UserError ``unsupported_task`` for an encoder that reads in one direction, or does not name one class."""
    if config.get("is_decoder") or config.get("add_cross_attention"):
        problem = "config.json makes it a decoder (is_decoder or add_cross_attention)"
    elif config.get("problem_type") not in (None, "single_label_classification"):
        problem = f"its problem_type is {config.get('problem_type')!r}"
    elif num_classes(config) < 2:
        problem = "its head gives a single number"
    else:
        return
    raise UserError(
        "unsupported_task",
        f"The model cannot be measured: {problem}.",
        param="model.id",
        hint="Encoders are taken with a masked-LM head, or with a classifier that gives each text one of several "
        "classes.",
    )
