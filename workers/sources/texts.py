"""The texts of one job, set apart: what calibration or training sees, evaluation never does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from workers.errors import JobError, UserError
from workers.recipe import Recipe
from workers.recipe_parts import BUILTIN_DATASET, Dataset, Evaluation, InlineDataset, NamedText, Training
from workers.sources.datasets import (
    Document,
    builtin_sha256,
    describe,
    empty_dataset,
    load_documents,
    located,
    parse_hub_dataset,
)
from workers.sources.division import EVALUATION_EVERY, Take, divide, is_one_source, left_of, nothing
from workers.sources.labels import Labels
from workers.sources.passages import Passages
from workers.sources.text_file import TextFile

# Of the user's own text that nobody named for evaluation: one document in so many, and no more than is measured.
_APART_EVERY = 10
_SPARE_APART = 4


def write_texts(
    recipe: Recipe,
    folder: Path,
    model_roots: Sequence[Path],
    token: str | None = None,
    *,
    labels: Labels | None = None,
    training_labels: Labels | None = None,
    measures_apart: bool = False,
) -> dict[str, dict[str, Any] | None]:
    """Write ``evaluation.jsonl``, and ``calibration.jsonl`` and ``training.jsonl`` if a stage needs them.

    Tell what they hold. Evaluation has nothing that the others see. From one source, every third document is
    evaluation's, whether or not anything is calibrated, so that results compare; of the built-in text always, whatever
    else is calibrated with. From two, evaluation leaves out the passages that the other has, whatever file or layout
    they come in.
    With ``labels`` each text of evaluation, and with ``training_labels`` each of training, has its class, and is there
    whole or not at all. With ``measures_apart`` there is ``apart.jsonl`` too, of the text that
    :attr:`Recipe.evaluation_apart` names, if the others leave any of it: of the user's own every tenth document, until
    that is enough.
    Raises the UserErrors of :func:`workers.sources.datasets.check_dataset`, and ``one_class``.
    """
    training, evaluation = recipe.training, recipe.evaluation
    apart = recipe.evaluation_apart if measures_apart else None
    reads_training = training is not None and recipe.reads_training_text
    with (
        TextFile(folder / "calibration.jsonl", recipe.num_calibration_tokens) as calibrating,
        TextFile(folder / "training.jsonl", recipe.num_training_tokens if reads_training else 0) as training_file,
        TextFile(folder / "evaluation.jsonl", evaluation.num_tokens) as evaluating,
        TextFile(folder / "apart.jsonl", 0 if apart is None else apart.num_tokens) as measuring_apart,
    ):
        # One text has one field of labels, whoever reads it: see `check_training` for two.
        is_shared = training is not None and is_one_source(training, evaluation)
        read_as = (training_labels or labels) if is_shared else labels
        sources = _Sources(model_roots, token, read_as, training_labels)
        seen: list[_Seen] = [_Seen("calibration", recipe.calibration_text, calibrating, recipe.reads_calibration_text)]
        if training is not None and reads_training:
            seen.append(_Seen("training", training, training_file, is_read=True))
        shared = [each for each in seen if is_one_source(each.part, evaluation) and not evaluation.allow_overlap]
        shared_apart = [each for each in seen if apart is not None and is_one_source(each.part, apart)]
        own = Passages()
        used = [own]  # what the model sees
        for each in seen:
            if each in shared or each in shared_apart or not each.is_read:
                continue
            with _located(f"recipe.{each.name}.dataset"):
                for document in sources.documents(each.part):
                    if not evaluation.allow_overlap or apart is not None:
                        own.add(document.text)
                    if not each.take(document):
                        break

        kept_apart = _KeptApart(0)
        if apart is not None:
            kept_apart = _divide_apart(apart, shared_apart, sources, measuring_apart.wanted_characters)
            used.append(kept_apart.others)

        used += _write_evaluation(evaluation, sources, shared, used, evaluating, keeps_labels=labels is not None)
        # Only now is it known what all the others have that read another text.
        others = [each for each in used if each is not kept_apart.others]
        for document in kept_apart.documents:
            left = left_of(document, *others)
            measuring_apart.add(left, num_removed=len(document.text) - len(left.text))
        for each in seen:
            each.check()
        _check_evaluation(evaluating)
        described: dict[str, dict[str, Any] | None] = {"calibration": None}
        described |= {each.name: sources.describe(each.part) | each.file.describe() for each in seen if each.is_read}
        if recipe.needs_calibration and recipe.calibrates_on_training_text:
            described["calibration"] = described["training"]
        described["evaluation"] = sources.describe(evaluation) | evaluating.describe()
        if apart is not None and measuring_apart.num_documents:
            described["apart"] = sources.describe(apart) | measuring_apart.describe()
    wanted = {"calibration": recipe.reads_calibration_text, "training": reads_training, "apart": "apart" in described}
    for name in (name for name, is_wanted in wanted.items() if not is_wanted):
        (folder / f"{name}.jsonl").unlink()
    return described


def _write_evaluation(
    evaluation: Evaluation,
    sources: _Sources,
    shared: Sequence[_Seen],
    used: Sequence[Passages],
    file: TextFile,
    *,
    keeps_labels: bool,
) -> list[Passages]:
    """Write what evaluation has of its text, without what is ``used``; parts that are ``shared`` read that text too.

    Returns the passages that those have of it.
    """

    def take(document: Document, /, *, num_removed: int) -> bool:
        left = document if evaluation.allow_overlap else left_of(document, *used)
        left = left if keeps_labels else Document(left.text)
        return file.add(left, num_removed=num_removed + len(document.text) - len(left.text))

    with _located("recipe.evaluation.dataset"):
        documents = sources.documents(evaluation)
        if shared:
            divided = divide(documents, _taking(shared), take)
            return [divided] if any(each.is_read for each in shared) else []
        if evaluation.is_general and not evaluation.allow_overlap:
            divide(documents, nothing, take)
            return []
        for document in documents:
            if not take(document, num_removed=0):
                break
        return []


def _check_evaluation(file: TextFile) -> None:
    """Raise UserError ``empty_dataset`` where evaluation has no text."""
    if not file.num_documents:
        raise UserError(
            "empty_dataset",
            "No text is left for evaluation that calibration or training does not use.",
            param="recipe.evaluation.dataset",
            hint="Give evaluation other or more text, or set recipe.evaluation.allow_overlap.",
        )


@dataclass(frozen=True)
class _Seen:
    """A part of the recipe whose text the model sees, so that evaluation must not."""

    name: str
    part: NamedText
    file: TextFile
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


def _taking(seen: Sequence[_Seen]) -> Take:
    """The side of one text that these read, each as much as it wants."""

    def take(document: Document, /, *, num_removed: int) -> bool:
        wanting = [each.take(document, num_removed=num_removed) for each in seen]  # each takes its own
        return any(wanting)

    return take


class _KeptApart:
    """A side of a text that waits until all is known that it must not have: few characters."""

    def __init__(self, wanted_characters: int) -> None:
        self.documents: list[Document] = []
        self.others = Passages()  # what the model sees of the same text
        self._left = wanted_characters

    def __call__(self, document: Document, /, *, num_removed: int) -> bool:  # noqa: ARG002 - a `Take`
        self.documents.append(Document(document.text))
        self._left -= len(document.text)
        return self._left > 0


def _divide_apart(apart: Evaluation, shared: Sequence[_Seen], sources: _Sources, wanted_characters: int) -> _KeptApart:
    """Give what is measured ``apart``, and those who read the same text, each their documents of it."""
    # Of general text some may have to be left out, and none of it is taken from the user.
    kept = _KeptApart((_SPARE_APART if apart.is_general else 1) * wanted_characters)
    names = [each.name for each in shared if each.is_read]
    with _located(f"recipe.{(names or ['evaluation'])[0]}.dataset"):
        passages = divide(
            sources.documents(apart),
            _taking(shared),
            kept,
            every=EVALUATION_EVERY if apart.is_general else _APART_EVERY,
            gives_rest=not apart.is_general,
        )
    if names:
        kept.others = passages
    return kept


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

    def documents(self, part: NamedText) -> Iterator[Document]:
        """The documents of one part of the recipe."""
        labels = self._labels.get(type(part))
        commit = self._commit(part.dataset)
        return load_documents(
            part.dataset, part.text_field, self._model_roots, self._token, labels=labels, commit=commit
        )

    def describe(self, part: NamedText) -> dict[str, Any]:
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
