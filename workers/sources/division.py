"""How one text is divided in two sides that share no passage: what a model sees, and what it is measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, islice
from typing import Protocol

from workers.recipe_parts import BUILTIN_DATASET, NamedText
from workers.sources.datasets import Document
from workers.sources.identifiers import parse_file_name
from workers.sources.passages import Passages

# One document in three is evaluation's when both read the same source.
EVALUATION_EVERY = 3


class Take(Protocol):
    """One side of the texts."""

    def __call__(self, document: Document, /, *, num_removed: int) -> bool:
        """Take a document that lost so many characters before; False for having enough."""
        ...


def nothing(_document: Document, /, *, num_removed: int) -> bool:  # noqa: ARG001 - a `Take`
    """A side that wants none of its documents, which are the other's no more for that."""
    return False


def divide(
    documents: Iterator[Document],
    calibrate: Take,
    evaluate: Take,
    *,
    every: int = EVALUATION_EVERY,
    gives_rest: bool = False,
) -> Passages:
    """Give each document to one side, until both have enough: each ``every``-th to evaluation. Repeats are dropped.

    With ``gives_rest`` calibration has what evaluation wants no more. A passage belongs to the side that it comes to
    first, and is left out of the other. Calibration's is remembered even when calibration takes no more, so that
    evaluation never depends on how much that wants; all of its passages are returned.
    """
    wanting = {calibrate: True, evaluate: True}
    used = {calibrate: Passages(), evaluate: Passages()}
    for document, is_evaluated in _sides(_distinct(documents), every):
        take, other = (evaluate, calibrate) if is_evaluated else (calibrate, evaluate)
        if gives_rest and not wanting[evaluate]:
            take, other = calibrate, evaluate
        if take is calibrate or wanting[take]:
            left = left_of(document, used[other])
            used[take].add(left.text)
            wanting[take] = wanting[take] and take(left, num_removed=len(document.text) - len(left.text))
        if not any(wanting.values()):
            break
    return used[calibrate]


def left_of(document: Document, *used: Passages) -> Document:
    """The document without passages of the other side; a part of a text has not the label of the whole."""
    left = document.text
    for passages in used:
        left = passages.left_out_of(left)
    is_whole = left == document.text
    return document if is_whole else Document("" if document.label is not None else left, document.label)


def _sides(documents: Iterator[Document], every: int) -> Iterator[tuple[Document, bool]]:
    """Each document, and whether it is evaluation's.

    Fewer than ``every`` are cut instead: the last of so many parts is evaluation's. With labels, the last one is.
    """
    first = list(islice(documents, every))
    if len(first) < every:
        for document in first:
            if document.label is None:
                position = _cut(document.text, every)
                yield Document(document.text[:position]), False
                yield Document(document.text[position:]), True
            else:
                yield document, document is first[-1]
        return
    for index, document in enumerate(chain(first, documents)):
        # Rows of a table often come by class, or in turns.
        number = index if document.label is None else _number_of(document.text)
        yield document, number % every == every - 1


def _distinct(documents: Iterator[Document]) -> Iterator[Document]:
    seen: set[bytes] = set()
    for document in documents:
        key = hashlib.sha256(document.text.strip().encode()).digest()
        if key not in seen:
            seen.add(key)
            yield document


def _number_of(text: str) -> int:
    """A number that hangs on a text alone, and on all of it."""
    return int.from_bytes(hashlib.sha256(text.strip().encode()).digest()[:8])


def _cut(text: str, every: int) -> int:
    """Where the last of ``every`` parts of ``text`` begins, at white space if there is any."""
    position = len(text) * (every - 1) // every
    for index in chain(range(position, len(text)), range(position, 0, -1)):
        if text[index].isspace():
            return index
    return len(text)


def is_one_source(seen: NamedText, evaluation: NamedText) -> bool:
    """Whether both name one text, which is divided between them then."""
    return _source(seen) == _source(evaluation)


def _source(part: NamedText) -> tuple[object, str]:
    """Equal for two spellings of one file, and whatever field the built-in text is said to be in."""
    dataset = part.dataset
    if dataset == BUILTIN_DATASET:
        return dataset, ""
    if isinstance(dataset, str) and dataset.startswith("file:"):
        with suppress(ValueError):
            return parse_file_name(dataset.removeprefix("file:")), part.text_field
    return dataset, part.text_field
