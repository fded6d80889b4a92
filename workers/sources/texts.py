"""The texts of one job, set apart: what calibration sees, evaluation never does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from workers.errors import JobError, UserError
from workers.recipe import BUILTIN_DATASET, Calibration, Dataset, Evaluation, InlineDataset, Recipe
from workers.sources.datasets import builtin_sha256, describe, empty_dataset, load_texts, located, parse_hub_dataset
from workers.sources.identifiers import parse_file_name
from workers.sources.passages import Passages

# Enough for any tokenizer: English has 4 to 5 characters a token. More would only cost time.
_CHARACTERS_A_TOKEN = 12
_MAX_CHARACTERS = 4 * 10**9
# One document in three is evaluation's when both read the same source.
_EVALUATION_EVERY = 3


def write_texts(
    recipe: Recipe, folder: Path, model_roots: Sequence[Path], token: str | None = None
) -> dict[str, dict[str, Any] | None]:
    """Write ``evaluation.jsonl``, and ``calibration.jsonl`` if a stage needs it; tell what they hold.

    From one source, every third document is evaluation's, whether or not anything is calibrated, so that results
    compare. From two, evaluation leaves out the passages that calibration has, whatever file or layout they come in.
    Raises the UserErrors of :func:`workers.sources.datasets.check_dataset`.
    """
    calibration, evaluation = recipe.calibration, recipe.evaluation
    needs_calibration = bool(recipe.statistics)
    calibration_budget = calibration.num_samples * calibration.max_seq_length if needs_calibration else 0
    with (
        _TextFile(folder / "calibration.jsonl", calibration_budget) as calibrating,
        _TextFile(folder / "evaluation.jsonl", evaluation.num_tokens) as evaluating,
    ):
        sources = _Sources(model_roots, token)
        if is_one_source(calibration, evaluation) and not evaluation.allow_overlap:
            with _located("recipe.evaluation.dataset"):
                divide(sources.texts(evaluation), calibrating.add, evaluating.add)
        else:
            used = Passages()
            if needs_calibration:
                with _located("recipe.calibration.dataset"):
                    for text in sources.texts(calibration):
                        if not evaluation.allow_overlap:
                            used.add(text)
                        if not calibrating.add(text):
                            break
            with _located("recipe.evaluation.dataset"):
                for text in sources.texts(evaluation):
                    left = text if evaluation.allow_overlap else used.left_out_of(text)
                    if not evaluating.add(left, num_removed=len(text) - len(left)):
                        break
        if needs_calibration and not calibrating.num_documents:
            raise empty_dataset().at("recipe.calibration.dataset")
        if not evaluating.num_documents:
            raise UserError(
                "empty_dataset",
                "No text is left for evaluation that calibration does not use.",
                param="recipe.evaluation.dataset",
                hint="Give evaluation other or more text, or set recipe.evaluation.allow_overlap.",
            )
        described = {
            "calibration": {**sources.describe(calibration), **calibrating.describe()} if needs_calibration else None,
            "evaluation": {**sources.describe(evaluation), **evaluating.describe()},
        }
    if not needs_calibration:
        (folder / "calibration.jsonl").unlink()
    return described


class Take(Protocol):
    """One side of the texts."""

    def __call__(self, text: str, /, *, num_removed: int) -> bool:
        """Take a text that lost so many characters before; False for having enough."""
        ...


def divide(texts: Iterator[str], calibrate: Take, evaluate: Take) -> None:
    """Give each text to one side, until both have enough. Texts that repeat are dropped.

    A passage belongs to the side that it comes to first, and is left out of the other. Calibration's is remembered
    even when calibration takes no more, so that evaluation never depends on how much that wants.
    """
    wanting = {calibrate: True, evaluate: True}
    used = {calibrate: Passages(), evaluate: Passages()}
    for text, take, other in _sides(_distinct(texts), calibrate, evaluate):
        if take is calibrate or wanting[take]:
            left = used[other].left_out_of(text)
            used[take].add(left)
            wanting[take] = wanting[take] and take(left, num_removed=len(text) - len(left))
        if not any(wanting.values()):
            return


def _sides(texts: Iterator[str], calibrate: Take, evaluate: Take) -> Iterator[tuple[str, Take, Take]]:
    """Each text, the side it goes to and the other one.

    Fewer than three texts are cut instead: their last third is evaluation's.
    """
    first = list(islice(texts, _EVALUATION_EVERY))
    if len(first) < _EVALUATION_EVERY:
        for text in first:
            position = _cut(text)
            yield text[:position], calibrate, evaluate
            yield text[position:], evaluate, calibrate
        return
    for index, text in enumerate(chain(first, texts)):
        if index % _EVALUATION_EVERY == _EVALUATION_EVERY - 1:
            yield text, evaluate, calibrate
        else:
            yield text, calibrate, evaluate


class _TextFile:
    """A JSON Lines file of texts that wants ``num_tokens`` tokens' worth of them."""

    def __init__(self, path: Path, num_tokens: int) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._wanted_characters = min(num_tokens * _CHARACTERS_A_TOKEN, _MAX_CHARACTERS)
        self._num_characters = 0
        self._num_removed_characters = 0
        self.num_documents = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, text: str, *, num_removed: int = 0) -> bool:
        """Take ``text``, unless it is blank or there is enough already; False when no more is wanted.

        ``num_removed`` characters of it were left out for being the other side's.
        """
        if self._num_characters < self._wanted_characters:
            self._num_removed_characters += num_removed
            if text.strip():
                line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
                self._file.write(line)
                self._digest.update(line)
                self._num_characters += len(text)
                self.num_documents += 1
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

    def __init__(self, model_roots: Sequence[Path], token: str | None) -> None:
        self._model_roots = model_roots
        self._token = token
        self._commits: dict[str, str] = {}

    def texts(self, part: Calibration | Evaluation) -> Iterator[str]:
        """The texts of one part of the recipe."""
        commit = self._commit(part.dataset)
        return load_texts(part.dataset, part.text_field, self._model_roots, self._token, commit=commit)

    def describe(self, part: Calibration | Evaluation) -> dict[str, Any]:
        """Where the texts came from, exactly enough to have them again."""
        told: dict[str, Any] = {"dataset": describe(part.dataset), "text_field": part.text_field}
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


def is_one_source(calibration: Calibration, evaluation: Evaluation) -> bool:
    """Whether both name one text, which is divided between them then."""
    return calibration.text_field == evaluation.text_field and _same(calibration.dataset) == _same(evaluation.dataset)


def _same(dataset: Dataset) -> object:
    """Equal for two spellings of one file."""
    if isinstance(dataset, str) and dataset.startswith("file:"):
        try:
            return parse_file_name(dataset.removeprefix("file:"))
        except ValueError:
            return dataset
    return dataset


def _distinct(texts: Iterator[str]) -> Iterator[str]:
    seen: set[bytes] = set()
    for text in texts:
        key = hashlib.sha256(text.strip().encode()).digest()
        if key not in seen:
            seen.add(key)
            yield text


def _cut(text: str) -> int:
    """Where the last third of ``text`` begins, at white space if there is any."""
    position = len(text) * (_EVALUATION_EVERY - 1) // _EVALUATION_EVERY
    for index in chain(range(position, len(text)), range(position, 0, -1)):
        if text[index].isspace():
            return index
    return len(text)
