"""How the labels of a dataset become the classes of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workers.architectures import num_classes, row_of
from workers.errors import UserError
from workers.recipe_parts import Evaluation, InlineDataset, Training


@dataclass(frozen=True)
class Labels:
    """The classes of a model, and where the rows of a dataset say theirs."""

    field: str | None  # of a row; inline texts have their labels beside them
    names: tuple[str, ...]  # of the classes, in the order of the logits

    def class_of(self, label: object) -> int:
        """The class that a label names, by its name or its number.

        Raises UserError ``unknown_label`` with ``param`` relative to the dataset's part of the recipe.
        """
        if self.names.count(str(label)) == 1:
            return self.names.index(str(label))
        number = (
            int(label) if isinstance(label, str) and label.isascii() and label.isdigit() and len(label) < 10 else label
        )
        if type(number) is int and 0 <= number < len(self.names):
            return number
        raise UserError(
            "unknown_label",
            f"The label {str(label)[:100]!r} names no class of the model.",
            param="labels" if self.field is None else "label_field",
            hint=f"Its classes are {', '.join(self.names[:20])[:400]}; or say their numbers, from 0 to "
            f"{len(self.names) - 1}.",
        )


def labels_of(part: Evaluation | Training, config: Mapping[str, Any]) -> Labels | None:
    """The labels that a part of the recipe has; None for a model that is no classifier, and for text without."""
    row = row_of(config)
    if row is None or row.task != "classification" or not has_labels(part):
        return None
    names = config.get("id2label")
    names = names if isinstance(names, Mapping) else {}
    found = tuple(str(names.get(str(number), f"LABEL_{number}")) for number in range(num_classes(config)))
    return Labels(_field_of(part), found)


def has_labels(part: Evaluation | Training) -> bool:
    """Whether the recipe says where the labels of a part's text are."""
    beside = isinstance(part.dataset, InlineDataset) and part.dataset.labels is not None
    return beside or part.label_field is not None


def _field_of(part: Evaluation | Training) -> str | None:
    return None if isinstance(part.dataset, InlineDataset) else part.label_field
