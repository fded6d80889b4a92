"""A head for an encoder that has none, so that a stage can train it as a classifier: its config and its tensors.

The head is drawn by chance and written beside the model's own files, before anything else sees the model: all that
follows has a classifier before it, whose accuracy is that of guessing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from workers.architectures import ARCHITECTURES, Architecture, row_of
from workers.disk import write_json
from workers.errors import UserError
from workers.recipe import Recipe
from workers.recipe_parts import Training
from workers.sources.checkpoint import CONFIG, SINGLE_WEIGHTS, WEIGHTS_INDEX, Checkpoint
from workers.sources.datasets import load_documents, located
from workers.sources.labels import Labels, has_labels
from workers.sources.safetensors_header import TensorInfo
from workers.techniques import FineTuning

# How transformers begins the names of its classes.
_CLASS_NAMES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
_HEAD_WEIGHTS = "classifier-head.safetensors"
_RENAMED_WEIGHTS = "body.safetensors"
_MAX_CLASSES = 1_000


def makes_classifier(recipe: Recipe) -> bool:
    """Whether the recipe begins by training a classifier, of a model that may be none."""
    first = recipe.stages[0]
    return isinstance(first, FineTuning) and first.task == "classification"


def class_names(training: Training, model_roots: Sequence[Path], *, max_lines: int | None = None) -> tuple[str, ...]:
    """The labels of the training text, in the order of their numbers or of the alphabet.

    Raises UserError ``label_field_missing``, ``one_class`` or another of a dataset's.
    """
    if not has_labels(training):
        raise UserError(
            "label_field_missing",
            "A classifier is to be trained, and the training text says no classes.",
            param="recipe.training.label_field",
            hint="Name the field of a row that holds its class, or send labels beside inline texts.",
        )
    names = _Names(None if not isinstance(training.dataset, str) else training.label_field)
    try:
        for _ in load_documents(training.dataset, training.text_field, model_roots, labels=names, max_lines=max_lines):
            if len(names.found) > _MAX_CLASSES:
                raise UserError(
                    "too_many_classes",
                    f"The training text has more than {_MAX_CLASSES} labels.",
                    param="label_field",
                    hint="Name the field that holds the class of a text, not its text or its number.",
                )
    except UserError as error:
        raise located(error, "recipe.training.dataset") from None
    if len(names.found) < 2:
        raise UserError(
            "one_class",
            "All training texts have one label: there is nothing to tell apart.",
            param="recipe.training.dataset",
            hint="Give texts of every class.",
        )
    is_numbers = all(name.isascii() and name.isdigit() for name in names.found)
    return tuple(sorted(names.found, key=int if is_numbers else str))


class _Names(Labels):
    """Takes every label for a class, and remembers it."""

    def __init__(self, field: str | None) -> None:
        super().__init__(field, ())
        object.__setattr__(self, "found", set())

    found: set[str]

    def class_of(self, label: object) -> int:
        """Any number: what the class is called is all that matters here."""
        self.found.add(str(label)[:1_000])
        return 0


def with_head(checkpoint: Checkpoint, names: tuple[str, ...]) -> Checkpoint:
    """The checkpoint as a classifier of these classes. One that is a classifier already stays as it is.

    Raises UserError ``unsupported_task`` for a model that has no such form here.
    """
    config = checkpoint.config
    present = row_of(config)
    if present is not None and present.task == "classification":
        return checkpoint
    row = ARCHITECTURES.get((str(config.get("model_type")), "classification"))
    if row is None:
        raise UserError(
            "unsupported_task",
            f"A model of type {config.get('model_type')!r} cannot be given a head that tells classes apart.",
            param="recipe.stages[0].task",
            hint="Start from an encoder: " + ", ".join(sorted(_CLASS_NAMES)) + ".",
        )
    config = {
        **config,
        "architectures": [f"{_CLASS_NAMES[row.model_type]}ForSequenceClassification"],
        "problem_type": "single_label_classification",
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }
    stored = {row.canonical(name) for name in checkpoint.tensors}
    added = {
        name: TensorInfo("F32", shape, 4 * math.prod(shape))
        for name, shape in _shapes(row, config, len(names)).items()
        if name not in stored
    }
    return replace(checkpoint, config=config, tensors={**checkpoint.tensors, **added})


def write_head(folder: Path, before: Checkpoint, after: Checkpoint, seed: int) -> None:
    """Write, into a folder of the model's files, the tensors and config that :func:`with_head` added."""
    import numpy as np
    from safetensors.numpy import save_file

    added = {name: tensor for name, tensor in after.tensors.items() if name not in before.tensors}
    spread = float(after.config.get("initializer_range", 0.02))
    generator = np.random.default_rng(seed)
    values = {
        name: np.zeros(tensor.shape, dtype=np.float32)
        if name.endswith(".bias")
        else generator.normal(0.0, spread, tensor.shape).astype(np.float32)
        for name, tensor in sorted(added.items())
    }
    save_file(values, folder / _HEAD_WEIGHTS)
    if (folder / WEIGHTS_INDEX).exists():
        weight_map = json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))["weight_map"]
    else:
        # Loaders take this name for all there is.
        (folder / SINGLE_WEIGHTS).rename(folder / _RENAMED_WEIGHTS)
        weight_map = dict.fromkeys(before.tensors, _RENAMED_WEIGHTS)
    weight_map |= dict.fromkeys(added, _HEAD_WEIGHTS)
    _write_anew(folder / WEIGHTS_INDEX, {"metadata": {}, "weight_map": weight_map})
    _write_anew(folder / CONFIG, after.config)


def _write_anew(path: Path, content: Mapping[str, Any]) -> None:
    """What is there may be a link to the user's own file."""
    path.unlink(missing_ok=True)
    write_json(path, content)


def _shapes(row: Architecture, config: Mapping[str, Any], num_classes: int) -> dict[str, tuple[int, ...]]:
    """Of the parameters between the last block and the logits: a square layer and the classes."""
    hidden_size = int(config[row.size("hidden_size")])
    (dense,) = row.after_blocks
    dense = f"{dense}.dense" if dense.endswith("pooler") else dense
    return {
        f"{dense}.weight": (hidden_size, hidden_size),
        f"{dense}.bias": (hidden_size,),
        f"{row.head}.weight": (num_classes, hidden_size),
        f"{row.head}.bias": (num_classes,),
    }
