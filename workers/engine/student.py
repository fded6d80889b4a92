"""The model that a distillation trains, made before the first step: a part of the model, or a new one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from workers.architectures import Architecture, architecture_of
from workers.disk import write_json
from workers.engine.checkpoint import Checkpoint
from workers.engine.empty_model import empty_model
from workers.engine.reshaping import reshape
from workers.engine.shaping import Shaping
from workers.engine.skeleton import Skeleton
from workers.engine.vocabulary import ids_by_default
from workers.errors import UserError
from workers.export import copy_companions, plain_config
from workers.shapes.student import config_of_student, cuts_of
from workers.shapes.width import widths_of
from workers.sources.checkpoint import CONFIG, SINGLE_WEIGHTS
from workers.sources.tokenizer_file import tokenizer_failures
from workers.techniques import LogitDistillation

_MODEL = "model"
_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
# Documents of the held-out text that both tokenizers have to write with the same tokens.
_NUM_COMPARED_DOCUMENTS = 64


def make_student(shaping: Shaping, stage: LogitDistillation, seed: int) -> tuple[Skeleton, dict[str, Any]]:
    """The model that the stage trains, and what the report says of it. ``seed`` is of the values that are drawn.

    Of the model's own type it is a view of the same files (arXiv:1910.01108, section 3: layers of the teacher), with
    heads, neurons and channels chosen as width pruning does. Any other is written to the journal's folder.

    Raises:
        UserError: as :func:`config_of_student` says; ``tokenizer_not_reproduced`` where a model of the other type
            reads text in another way, or ``student_not_smaller``.
    """
    before, options = shaping.skeleton, stage.student
    assert options is not None
    config = {**ids_by_default(before), **before.checkpoint.config}
    wanted = config_of_student(stage, shaping.param, config)
    told: dict[str, Any] = {"initialization": options.initialization}
    if options.is_cut:
        after = before
        for number, cut in enumerate(cuts_of(options, before.checkpoint.config)):
            step = replace(shaping, skeleton=after, journal=shaping.journal.inner(f"cut-{number}"))
            after, metrics = reshape(step, cut)
            told |= {name: metrics[name] for name in ("removed_blocks", "kept_key_value_heads") if name in metrics}
    else:
        made = shaping.journal.folder_once(_MODEL, lambda folder: _write_model(folder, shaping, wanted, seed, stage))
        told |= made
        checkpoint = Checkpoint(shaping.journal.folder / _MODEL, cast=before.checkpoint.cast)
        after = Skeleton(checkpoint, architecture_of(checkpoint.config), before.device)
    if after.num_parameters >= before.num_parameters:
        raise UserError(
            "student_not_smaller",
            f"The student has {after.num_parameters:,} parameters and the model {before.num_parameters:,}.",
            param=f"{shaping.param}.student",
            hint="Ask for fewer layers or a smaller hidden_size.",
        )
    return after, {"original_num_parameters": before.num_parameters, **_sizes(after), **told}


def _sizes(skeleton: Skeleton) -> dict[str, Any]:
    config, architecture = skeleton.checkpoint.config, skeleton.architecture
    widths: dict[str, int] = {"hidden_size": skeleton.hidden_size}
    if not architecture.is_recurrent:
        widths = {name: getattr(widths_of(config), name) for name in _WIDTHS}
    counts = {"num_parameters": skeleton.num_parameters, "num_blocks": skeleton.num_blocks}
    return {"model_type": architecture.model_type, **counts, **widths}


def _write_model(
    folder: Path, shaping: Shaping, config: Mapping[str, Any], seed: int, stage: LogitDistillation
) -> dict[str, Any]:
    """Write a new model of ``config``, with the values that transformers gives one, in the type of the one before.

    Returns which matrices are the model's that was before.
    """
    before, options = shaping.skeleton, stage.student
    assert options is not None
    dtype = before.checkpoint.stored_dtype(f"{before.architecture.embedding}.weight")
    write_json(folder / CONFIG, plain_config(before.checkpoint.with_config(config)))
    copy_companions(before.checkpoint, folder)
    empty = empty_model(Checkpoint(folder), architecture_of(config))
    torch.manual_seed(seed)
    fresh: Any = type(empty)(empty.config)
    copied = _copy_rows(fresh, before, architecture_of(config)) if options.initialization == "copy" else []
    values = {name: parameter.detach().to(dtype).contiguous() for name, parameter in fresh.named_parameters()}
    save_file(values, folder / SINGLE_WEIGHTS, {"format": "pt"})
    fresh.config.architectures, fresh.config.dtype = [type(fresh).__name__], dtype
    fresh.config.save_pretrained(folder)
    if options.model_type is not None:
        _write_tokenizer(folder, shaping)
    return {"copied": copied}


@torch.no_grad()
def _copy_rows(fresh: Any, before: Skeleton, architecture: Architecture) -> list[str]:
    """Give a new model the embedding, and the head if it is another matrix, of the one before; which had its shape."""
    checkpoint, modules = before.checkpoint, {"embedding": (architecture.embedding, before.architecture.embedding)}
    if not before.architecture.is_tied(checkpoint.config):
        modules["head"] = (architecture.head, before.architecture.head)
    copied = []
    for name, (own, others) in modules.items():
        weight, rows = fresh.get_parameter(f"{own}.weight"), checkpoint.parameter(f"{others}.weight")
        if weight.shape == rows.shape:
            weight.copy_(rows)
            copied.append(name)
    return copied


def _write_tokenizer(folder: Path, shaping: Shaping) -> None:
    """Write the model's tokenizer so that it opens as what it is beside a config of another type.

    Raises UserError ``tokenizer_not_reproduced`` where it reads text in another way there.
    """
    own = shaping.texts.tokenizer(shaping.skeleton)
    own.save_pretrained(folder)
    with tokenizer_failures("tokenizer_not_reproduced", "The tokenizer cannot be opened beside the student"):
        opened = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        documents = list(islice(shaping.texts.evaluation(), _NUM_COMPARED_DOCUMENTS))
        are_alike = opened.get_vocab() == own.get_vocab() and all(
            opened(document, verbose=False)["input_ids"] == own(document, verbose=False)["input_ids"]
            for document in documents
        )
    if not are_alike:
        raise UserError(
            "tokenizer_not_reproduced",
            "Beside a model of the student's type transformers opens the tokenizer as another one.",
            param=f"{shaping.param}.student.model_type",
            hint="Save the tokenizer as a tokenizer.json with save_pretrained, or choose another model_type.",
        )
