"""The texts of one job, set apart: what calibration or training sees, evaluation never does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from workers.errors import JobError, UserError
from workers.recipe import Recipe
from workers.recipe_parts import BUILTIN_DATASET, Calibration, Dataset, Evaluation, InlineDataset, Training
from workers.sources.datasets import (
    Document,
    builtin_sha256,
    describe,
    empty_dataset,
    load_documents,
    located,
    parse_hub_dataset,
)
from workers.sources.identifiers import parse_file_name
from workers.sources.labels import Labels
from workers.sources.passages import Passages

# Enough for any tokenizer: English has 4 to 5 characters a token. More would only cost time.
CHARACTERS_A_TOKEN = 12
_MAX_CHARACTERS = 4 * 10**9
# One document in three is evaluation's when both read the same source.
_EVALUATION_EVERY = 3


def write_texts(
    recipe: Recipe,
    folder: Path,
    model_roots: Sequence[Path],
    token: str | None = None,
    *,
    labels: Labels | None = None,
    training_labels: Labels | None = None,
) -> dict[str, dict[str, Any] | None]:
    """Write ``evaluation.jsonl``, and ``calibration.jsonl`` and ``training.jsonl`` if a stage needs them.

    Tell what they hold. Evaluation has nothing that the others see. From one source, every third document is
    evaluation's, whether or not anything is calibrated, so that results compare; of the built-in text always, whatever
    else is calibrated with. From two, evaluation leaves out the passages that the other has, whatever file or layout
    they come in.
    With ``labels`` each text of evaluation, and with ``training_labels`` each of training, has its class, and is there
    whole or not at all.
    Raises the UserErrors of :func:`workers.sources.datasets.check_dataset`, and ``one_class``.
    """
    calibration, training, evaluation = recipe.calibration, recipe.training, recipe.evaluation
    reads_training = training is not None and recipe.reads_training_text
    with (
        _TextFile(folder / "calibration.jsonl", recipe.num_calibration_tokens) as calibrating,
        _TextFile(folder / "training.jsonl", recipe.num_training_tokens if reads_training else 0) as training_file,
        _TextFile(folder / "evaluation.jsonl", evaluation.num_tokens) as evaluating,
    ):
        # One text has one field of labels, whoever reads it: see `check_training` for two.
        is_shared = training is not None and is_one_source(training, evaluation)
        read_as = (training_labels or labels) if is_shared else labels
        sources = _Sources(model_roots, token, read_as, training_labels)
        seen: list[_Seen] = [_Seen("calibration", calibration, calibrating, recipe.needs_calibration)]
        if training is not None and reads_training:
            seen.append(_Seen("training", training, training_file, is_read=True))
        shared = [each for each in seen if is_one_source(each.part, evaluation) and not evaluation.allow_overlap]
        used = Passages()
        for each in seen:
            if each in shared or not each.is_read:
                continue
            with _located(f"recipe.{each.name}.dataset"):
                for document in sources.documents(each.part):
                    if not evaluation.allow_overlap:
                        used.add(document.text)
                    if not each.take(document):
                        break

        def evaluate(document: Document, /, *, num_removed: int) -> bool:
            left = document if evaluation.allow_overlap else _left_of(document, used)
            left = left if labels is not None else Document(left.text)
            return evaluating.add(left, num_removed=num_removed + len(document.text) - len(left.text))

        def share(document: Document, /, *, num_removed: int) -> bool:
            wanting = [each.take(document, num_removed=num_removed) for each in shared]  # each takes its own
            return any(wanting)

        with _located("recipe.evaluation.dataset"):
            documents = sources.documents(evaluation)
            if shared:
                divide(documents, share, evaluate)
            elif evaluation.dataset == BUILTIN_DATASET and not evaluation.allow_overlap:
                divide(documents, _nothing, evaluate)
            else:
                for document in documents:
                    if not evaluate(document, num_removed=0):
                        break
        for each in seen:
            each.check()
        if not evaluating.num_documents:
            raise UserError(
                "empty_dataset",
                "No text is left for evaluation that calibration or training does not use.",
                param="recipe.evaluation.dataset",
                hint="Give evaluation other or more text, or set recipe.evaluation.allow_overlap.",
            )
        described: dict[str, dict[str, Any] | None] = {"calibration": None}
        described |= {each.name: sources.describe(each.part) | each.file.describe() for each in seen if each.is_read}
        described["evaluation"] = sources.describe(evaluation) | evaluating.describe()
    for name, is_read in (("calibration", recipe.needs_calibration), ("training", reads_training)):
        if not is_read:
            (folder / f"{name}.jsonl").unlink()
    return described


@dataclass(frozen=True)
class _Seen:
    """A part of the recipe whose text the model sees, so that evaluation must not."""

    name: str
    part: Calibration | Training
    file: _TextFile
    is_read: bool

    def take(self, document: Document, *, num_removed: int = 0) -> bool:
        """Take a document; False for having enough. A label is for training alone."""
        text = document if isinstance(self.part, Training) else Document(document.text)
        return self.file.add(text, num_removed=num_removed)

    def check(self) -> None:
        """Raise UserError where there is no text, or all of it is of one class."""
        param = f"recipe.{self.name}.dataset"
        if self.is_read and not self.file.num_documents:
            raise empty_dataset().at(param)
        if self.is_read and len(self.file.labels) == 1:
            raise UserError(
                "one_class",
                f"All {self.file.num_documents} texts have one label: there is nothing to tell apart.",
                param=param,
                hint="Give texts of every class.",
            )


class Take(Protocol):
    """One side of the texts."""

    def __call__(self, document: Document, /, *, num_removed: int) -> bool:
        """Take a document that lost so many characters before; False for having enough."""
        ...


def _nothing(_document: Document, /, *, num_removed: int) -> bool:  # noqa: ARG001 - a `Take`
    """A side that wants none of its documents, which are the other's no more for that."""
    return False


def divide(documents: Iterator[Document], calibrate: Take, evaluate: Take) -> None:
    """Give each document to one side, until both have enough. Texts that repeat are dropped.

    A passage belongs to the side that it comes to first, and is left out of the other. Calibration's is remembered
    even when calibration takes no more, so that evaluation never depends on how much that wants.
    """
    wanting = {calibrate: True, evaluate: True}
    used = {calibrate: Passages(), evaluate: Passages()}
    for document, take, other in _sides(_distinct(documents), calibrate, evaluate):
        if take is calibrate or wanting[take]:
            left = _left_of(document, used[other])
            used[take].add(left.text)
            wanting[take] = wanting[take] and take(left, num_removed=len(document.text) - len(left.text))
        if not any(wanting.values()):
            return


def _left_of(document: Document, used: Passages) -> Document:
    """The document without the other side's passages; a part of a text has not the label of the whole."""
    left = used.left_out_of(document.text)
    is_whole = left == document.text
    return document if is_whole else Document("" if document.label is not None else left, document.label)


def _sides(documents: Iterator[Document], calibrate: Take, evaluate: Take) -> Iterator[tuple[Document, Take, Take]]:
    """Each document, the side it goes to and the other one.

    Fewer than three are cut instead: their last third is evaluation's. With labels, the last one is.
    """
    first = list(islice(documents, _EVALUATION_EVERY))
    if len(first) < _EVALUATION_EVERY:
        for document in first:
            if document.label is None:
                position = _cut(document.text)
                yield Document(document.text[:position]), calibrate, evaluate
                yield Document(document.text[position:]), evaluate, calibrate
            elif document is first[-1]:
                yield document, evaluate, calibrate
            else:
                yield document, calibrate, evaluate
        return
    for index, document in enumerate(chain(first, documents)):
        # Rows of a table often come by class, or in turns.
        number = index if document.label is None else _number_of(document.text)
        if number % _EVALUATION_EVERY == _EVALUATION_EVERY - 1:
            yield document, evaluate, calibrate
        else:
            yield document, calibrate, evaluate


class _TextFile:
    """A JSON Lines file of texts that wants ``num_tokens`` tokens' worth of them; None for all there are."""

    def __init__(self, path: Path, num_tokens: int | None) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        wanted = _MAX_CHARACTERS if num_tokens is None else num_tokens * CHARACTERS_A_TOKEN
        self._wanted_characters = min(wanted, _MAX_CHARACTERS)
        self.labels: set[int] = set()
        self._num_characters = 0
        self._num_removed_characters = 0
        self.num_documents = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, document: Document, *, num_removed: int = 0) -> bool:
        """Take ``document``, unless it is blank or there is enough already; False when no more is wanted.

        ``num_removed`` characters of it were left out for being the other side's.
        """
        if self._num_characters < self._wanted_characters:
            self._num_removed_characters += num_removed
            text, label = document
            if text.strip():
                told = {"text": text} if label is None else {"text": text, "label": label}
                line = json.dumps(told, ensure_ascii=False).encode() + b"\n"
                self._file.write(line)
                self._digest.update(line)
                self._num_characters += len(text)
                self.num_documents += 1
                self.labels |= set() if label is None else {label}
        return self._num_characters < self._wanted_characters

    def describe(self) -> dict[str, Any]:
        """Digest and size of what was written."""
        return {
            "sha256": self._digest.hexdigest(),
            "num_documents": self.num_documents,
            "num_characters": self._num_characters,
            "num_removed_characters": self._num_removed_characters,
        }


class _Sources:
    """Opens datasets, each of the hub pinned to the commit that it has now."""

    def __init__(
        self,
        model_roots: Sequence[Path],
        token: str | None,
        labels: Labels | None,
        training_labels: Labels | None,
    ) -> None:
        self._model_roots = model_roots
        self._labels: dict[type, Labels | None] = {Evaluation: labels, Training: training_labels}
        self._token = token
        self._commits: dict[str, str] = {}

    def documents(self, part: Calibration | Training | Evaluation) -> Iterator[Document]:
        """The documents of one part of the recipe."""
        labels = self._labels.get(type(part))
        commit = self._commit(part.dataset)
        return load_documents(
            part.dataset, part.text_field, self._model_roots, self._token, labels=labels, commit=commit
        )

    def describe(self, part: Calibration | Training | Evaluation) -> dict[str, Any]:
        """Where the texts came from, exactly enough to have them again."""
        told: dict[str, Any] = {"dataset": describe(part.dataset), "text_field": part.text_field}
        labels = self._labels.get(type(part))
        if labels is not None and labels.field is not None:
            told["label_field"] = labels.field
        if part.dataset == BUILTIN_DATASET:
            told["source_sha256"] = builtin_sha256()
        commit = self._commit(part.dataset)
        return told if commit is None else {**told, "revision": commit}

    def _commit(self, dataset: Dataset) -> str | None:
        if isinstance(dataset, InlineDataset) or not dataset.startswith("hub:"):
            return None
        name, *_ = parse_hub_dataset(dataset)
        if name not in self._commits:
            from workers.sources.hub import dataset_commit

            self._commits[name] = dataset_commit(name, token=self._token, timeout_seconds=10.0)
        return self._commits[name]


class _located:  # noqa: N801 - used as a function, in `with`
    """Makes the ``param`` of an error absolute."""

    def __init__(self, param: str) -> None:
        self._param = param

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, JobError):
            located(error, self._param)


def is_one_source(seen: Calibration | Training, evaluation: Evaluation) -> bool:
    """Whether both name one text, which is divided between them then."""
    return seen.text_field == evaluation.text_field and _same(seen.dataset) == _same(evaluation.dataset)


def _same(dataset: Dataset) -> object:
    """Equal for two spellings of one file."""
    if isinstance(dataset, str) and dataset.startswith("file:"):
        try:
            return parse_file_name(dataset.removeprefix("file:"))
        except ValueError:
            return dataset
    return dataset


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


def _cut(text: str) -> int:
    """Where the last third of ``text`` begins, at white space if there is any."""
    position = len(text) * (_EVALUATION_EVERY - 1) // _EVALUATION_EVERY
    for index in chain(range(position, len(text)), range(position, 0, -1)):
        if text[index].isspace():
            return index
    return len(text)
