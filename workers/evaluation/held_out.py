"""The held-out text of a job, read as each task reads it, and what both models make of it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from workers.engine.text import read_documents, read_labels, sequences, tokenize
from workers.evaluation.classes import measure_classes
from workers.evaluation.quality import masked_windows, measure, windows_of
from workers.formats.opening import Readable
from workers.recipe import Evaluation

_PARAM = "recipe.evaluation.dataset"


class HeldOut:
    """The evaluation text of a work folder, as token ids that both models read."""

    def __init__(self, texts: Path, wanted: Evaluation, original: Readable) -> None:
        """Take in ``texts`` (JSON Lines) with the tokenizer of the original, as far as ``wanted`` says."""
        self._original = original
        self._task = original.architecture.task
        self._labels: list[int] | None = None
        length = min(wanted.max_seq_length, original.max_positions or wanted.max_seq_length)
        tokenizer, documents = original.tokenizer, read_documents(texts)
        if self._task == "causal":
            ids = tokenize(tokenizer, documents, param=_PARAM)
            self.num_tokens = ids.numel()
            self._ids = ids[: wanted.num_tokens]
            self._windows = windows_of(ids, wanted.num_tokens, length)
            return
        # A label is of the whole text: what does not fit in is not read, as in use. Other text is cut and read on.
        self._labels = read_labels(texts) if self._task == "classification" else None
        found = sequences(tokenizer, list(documents), length, param=_PARAM, cuts=self._labels is None)
        self.num_tokens = sum(ids.numel() for ids in found)
        self._sequences = _enough(found, wanted.num_tokens)
        if self._task == "masked":
            special = frozenset(tokenizer.all_special_ids)
            self._windows = masked_windows(self._sequences, tokenizer.mask_token_id, special)

    @property
    def ids(self) -> Tensor:
        """The text that a causal language model reads here, as one row of token ids."""
        return self._ids

    @property
    def longest(self) -> Tensor:
        """The longest sequence of token ids that an encoder reads here."""
        return max(self._sequences, key=Tensor.numel)

    def measure(self, artifact: Readable, progress: Callable[[float], None]) -> dict[str, Any]:
        """What the original and ``artifact`` make of the text: the ``quality`` part of a report, as far as it goes.

        Raises:
            UserError: ``non_finite_evaluation``.
        """
        if self._task == "classification":
            labels = None if self._labels is None else self._labels[: len(self._sequences)]
            return measure_classes(self._original, artifact, self._sequences, labels, progress).to_report()
        return measure(self._original, artifact, self._windows, progress).to_report()


def _enough(found: list[Tensor], num_tokens: int) -> list[Tensor]:
    """As many of the first sequences as have ``num_tokens`` tokens together, or all."""
    before = accumulate((ids.numel() for ids in found), initial=0)
    return [ids for ids, num_before in zip(found, before, strict=False) if num_before < num_tokens]
