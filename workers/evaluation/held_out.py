"""The held-out text of a job, read as each task reads it, and what both models make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from torch import Tensor

from workers.engine.text import DOCUMENT_SEPARATOR, read_documents, read_labels, sequences, tokenize
from workers.evaluation.both import Batch
from workers.evaluation.classes import measure_classes
from workers.evaluation.pieces import Framed, Pair, Piece, num_retokenized
from workers.evaluation.quality import masked_windows, measure, windows_of
from workers.evaluation.retokenized import (
    PairedWindow,
    measure_retokenized,
    paired_masked_windows,
    paired_sequences,
    paired_windows,
    sequence_of,
)
from workers.formats.opening import Readable
from workers.recipe_parts import Evaluation

_PARAM = "recipe.evaluation.dataset"


class HeldOut:
    """The evaluation text of a work folder, as token ids that both models read, each those of its own tokenizer."""

    def __init__(self, texts: Path, wanted: Evaluation, original: Readable) -> None:
        """Take in ``texts`` (JSON Lines) with the tokenizer of the original, as far as ``wanted`` says."""
        self._original = original
        self._task = original.architecture.task
        self._texts = texts
        self._wanted = wanted
        self._labels: list[int] | None = None
        self._length = min(wanted.max_seq_length, original.max_positions or wanted.max_seq_length)
        tokenizer, documents = original.tokenizer, read_documents(texts)
        if self._task == "causal":
            ids = tokenize(tokenizer, documents, param=_PARAM)
            self.num_tokens = ids.numel()
            self._ids = ids[: wanted.num_tokens]
            self._windows = windows_of(ids, wanted.num_tokens, self._length)
            return
        # A label is of the whole text: what does not fit in is not read, as in use. Other text is cut and read on.
        self._labels = read_labels(texts) if self._task == "classification" else None
        found = sequences(tokenizer, list(documents), self._length, param=_PARAM, cuts=self._labels is None)
        self.num_tokens = sum(ids.numel() for ids in found)
        self._sequences = _enough(found, wanted.num_tokens)
        if self._task == "masked":
            special = frozenset(tokenizer.all_special_ids)
            self._windows = masked_windows(self._sequences, tokenizer.mask_token_id, special)

    @property
    def ids(self) -> Tensor:
        """The text that a causal language model reads here, as one row of token ids."""
        return self._ids

    def pieces(self, artifact: Readable) -> list[Piece] | None:
        """The same as both tokenizers write it; None where they are one."""
        pair = Pair(self._original.tokenizer, artifact.tokenizer)
        return None if pair.is_one else self._pieces(pair)

    @property
    def longest(self) -> Tensor:
        """The longest sequence of token ids that an encoder reads here."""
        return max(self._sequences, key=Tensor.numel)

    def longest_of(self, artifact: Readable) -> Tensor:
        """The same, as the artifact reads it."""
        pair = Pair(self._original.tokenizer, artifact.tokenizer)
        if pair.is_one:
            return self.longest
        return max((ids for _, ids in self._paired_sequences(pair)[0]), key=Tensor.numel)

    def measure(self, artifact: Readable, progress: Callable[[float], None]) -> dict[str, Any]:
        """What the original and ``artifact`` make of the text: the ``quality`` part of a report, as far as it goes.

        Raises:
            UserError: ``non_finite_evaluation``.
        """
        pair = Pair(self._original.tokenizer, artifact.tokenizer)
        if self._task == "classification":
            found, num_others = [(ids, ids) for ids in self._sequences], 0
            if not pair.is_one:
                found, num_others = self._paired_sequences(pair)
            labels = None if self._labels is None else self._labels[: len(found)]
            return measure_classes(
                self._original, artifact, found, labels, progress, num_retokenized=num_others
            ).to_report()
        if pair.is_one:
            return measure(self._original, artifact, self._windows, progress).to_report()
        windows = self._paired_windows(pair)
        return measure_retokenized(self._original, artifact, windows, pair, progress).to_report()

    def _paired_windows(self, pair: Pair) -> list[PairedWindow]:
        if self._task == "masked":
            found = paired_sequences(self._framed(pair), self._wanted.num_tokens, self._length)
            return paired_masked_windows(found, pair)
        return paired_windows(self._pieces(pair), self._wanted.num_tokens, self._length)

    def _pieces(self, pair: Pair) -> list[Piece]:
        """All of the text, as a causal language model reads it."""
        (framed,) = pair.pieces([DOCUMENT_SEPARATOR.join(read_documents(self._texts))])
        return [piece for part in framed for piece in part]

    def _paired_sequences(self, pair: Pair) -> tuple[list[Batch], int]:
        """Sequences as each tokenizer writes them, and how many of the original's tokens the other does not write."""
        if self._labels is None:
            framed = paired_sequences(self._framed(pair), self._wanted.num_tokens, self._length)
            return [sequence_of(each) for each in framed], num_retokenized(framed)
        num_texts = len(self._sequences)
        documents = list(islice(read_documents(self._texts), num_texts))
        others = sequences(pair.artifact, documents, self._length, param=_PARAM, cuts=False)
        return list(zip(self._sequences, others, strict=True)), num_retokenized(islice(self._framed(pair), num_texts))

    def _framed(self, pair: Pair) -> Iterator[Framed]:
        """Each document as pieces."""
        return pair.pieces(list(read_documents(self._texts)))


def _enough(found: list[Tensor], num_tokens: int) -> list[Tensor]:
    """As many of the first sequences as have ``num_tokens`` tokens together, or all."""
    before = accumulate((ids.numel() for ids in found), initial=0)
    return [ids for ids, num_before in zip(found, before, strict=False) if num_before < num_tokens]
