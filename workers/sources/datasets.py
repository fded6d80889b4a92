"""Texts for calibration and evaluation: built in, from the hub, from files under the model roots, or inline."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import NamedTuple, cast

from workers.errors import JobError, UserError
from workers.recipe_parts import BUILTIN_DATASET, Dataset, InlineDataset
from workers.sources.dataset_files import Row, read_rows, refusal
from workers.sources.identifiers import parse_hub_name
from workers.sources.labels import Labels

# A file without text in so many lines is refused for holding none: a request does not wait for more.
MAX_CHECKED_LINES = 500_000
_BESIDE = "labels"  # where inline texts have theirs
_HUB_OPTION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@-]{0,120}")


class Document(NamedTuple):
    """A text of a dataset, and its class where the dataset says so."""

    text: str
    label: int | None = None


def check_dataset(
    dataset: Dataset,
    param: str,
    model_roots: Sequence[Path],
    *,
    text_field: str = "text",
    labels: Labels | None = None,
    token: str | None = None,
    timeout_seconds: float = 10.0,
) -> None:
    """Refuse a dataset that is not there, has no such field, or holds no text; ``param`` is its path in the request.

    With ``labels``, those of inline texts are all checked, and of a file the first.

    Raises UserError ``dataset_not_found``, ``dataset_gated``, ``empty_dataset``, ``text_field_missing``,
    ``label_field_missing``, ``unknown_label``, ``unsupported_dataset_file``, ``invalid_dataset`` or
    ``symlink_refused``; InfrastructureError ``hub_unreachable``.
    """
    try:
        if isinstance(dataset, str) and dataset.startswith("hub:"):
            from workers.sources.hub import dataset_commit

            dataset_commit(parse_hub_dataset(dataset)[0], token=token, timeout_seconds=timeout_seconds)
            return
        documents = load_documents(dataset, text_field, model_roots, token, labels=labels, max_lines=MAX_CHECKED_LINES)
        if next(documents, None) is None:
            raise empty_dataset()
        if isinstance(dataset, InlineDataset):
            for _ in documents:
                continue
    except JobError as error:
        raise located(error, param) from None


def load_documents(
    dataset: Dataset,
    text_field: str,
    model_roots: Sequence[Path],
    token: str | None = None,
    *,
    labels: Labels | None = None,
    commit: str | None = None,
    max_lines: int | None = None,
) -> Iterator[Document]:
    """The documents of a dataset that hold more than white space, in their order, read as they are asked for.

    With ``labels`` each has its class. ``commit`` pins a dataset of the hub. Of a file, at most ``max_lines`` are read.

    Raises the UserErrors of :func:`check_dataset` with ``param`` relative: ``dataset``, ``text_field``,
    ``label_field`` or ``labels``.
    """
    rows: Iterator[tuple[Row, str]]
    if isinstance(dataset, InlineDataset):
        beside = repeat(None, len(dataset.texts)) if dataset.labels is None else dataset.labels
        pairs = zip(dataset.texts, beside, strict=True)
        rows = (({text_field: text, _BESIDE: label}, "the dataset") for text, label in pairs)
    elif dataset == BUILTIN_DATASET:
        rows = (({text_field: text}, "the built-in text") for text in _builtin())
    elif dataset.startswith("hub:"):
        rows = _hub(dataset, token, commit)
    else:
        rows = read_rows(dataset.removeprefix("file:"), text_field, model_roots, max_lines)
    return _documents(rows, text_field, labels)


def _documents(rows: Iterator[tuple[Row, str]], text_field: str, labels: Labels | None) -> Iterator[Document]:
    for row, place in rows:
        text = _text_of(row, text_field, place)
        if not text.strip():
            continue
        yield Document(text, None if labels is None else _class_of(row, labels.field or _BESIDE, place, labels))


def located(error: JobError, param: str) -> JobError:
    """The same error with its ``param`` made absolute; ``param`` is the dataset's, such as recipe.training.dataset."""
    if error.param in ("text_field", "label_field"):
        error.param = f"{param.rpartition('.')[0]}.{error.param}"
    else:
        error.param = f"{param}.labels" if error.param == "labels" else param
    return error


def describe(dataset: Dataset) -> str:
    """A short name of a dataset for reports."""
    return dataset if isinstance(dataset, str) else f"inline ({len(dataset.texts)} texts)"


def empty_dataset() -> UserError:
    """The error for a dataset without text."""
    return refusal("empty_dataset", "The dataset holds no text.", "Send at least one text with words in it.")


def parse_hub_dataset(dataset: str) -> tuple[str, str | None, str | None]:
    """Repository, configuration and split of ``hub:NAME[:CONFIG][:SPLIT]``; a single option may be either."""
    name, *options = dataset.removeprefix("hub:").split(":")
    try:
        parse_hub_name(name)
        if len(options) > 2 or not all(_HUB_OPTION.fullmatch(option) for option in options):
            raise ValueError("use hub:NAME, hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT")
    except ValueError as error:
        raise refusal("invalid_dataset", f"Not a hub dataset: {error}.", "For example hub:org/name:train.") from None
    first, second = [*options, None, None][:2]
    return name, first, second


def _builtin() -> Iterator[str]:
    """The prose of Python's own documentation, which every installation carries.

    A fifth of it repeats itself: topics hold one another's sections. Each paragraph is given once, or text set
    apart for evaluation would be calibrated on.
    """
    seen: set[str] = set()
    for topic in _topics().values():
        paragraphs = []
        for paragraph in re.split(r"\n[ \t]*\n", topic):
            words = " ".join(paragraph.split())
            if words not in seen:
                seen.add(words)
                paragraphs.append(paragraph)
        yield "\n\n".join(paragraphs)


def _topics() -> Mapping[str, str]:
    from pydoc_data.topics import topics

    return cast("Mapping[str, str]", topics)


def builtin_sha256() -> str:
    """Identifies the release of the built-in text: it differs between Python versions."""
    digest = hashlib.sha256()
    for text in _topics().values():
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def _hub(dataset: str, token: str | None, commit: str | None) -> Iterator[tuple[Row, str]]:
    from workers.sources.hub import dataset_commit, dataset_rows

    name, *options = parse_hub_dataset(dataset)
    if commit is None:
        commit = dataset_commit(name, token=token, timeout_seconds=10.0)
    return ((row, "a row") for row in dataset_rows(name, commit, *options, token=token))


def _text_of(row: Row, text_field: str, place: str) -> str:
    text = row.get(text_field)
    if text is None and text_field in row:
        return ""
    if not isinstance(text, str):
        raise _missing_field("text", text_field, place, list(row))
    # JSON can spell half a surrogate pair, which no encoder takes.
    return text.encode(errors="replace").decode()


def _class_of(row: Row, field: str, place: str, labels: Labels) -> int:
    label = row.get(field)
    if label is None or label == "":
        raise _missing_field("label", field, place, list(row))
    return labels.class_of(label)


def _missing_field(what: str, field: str, place: str, names: Sequence[str]) -> UserError:
    return UserError(
        f"{what}_field_missing",
        f"There is no {what} in the field {field!r} of {place}.",
        param=f"{what}_field",
        hint=f"The fields are: {', '.join(map(str, names[:20]))[:400]}.",
    )
