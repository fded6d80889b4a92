"""Texts for calibration and evaluation: built in, from the hub, from files under the model roots, or inline."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, cast

from workers.errors import JobError, UserError
from workers.recipe import BUILTIN_DATASET, Dataset, InlineDataset
from workers.sources.checkpoint_folder import open_file
from workers.sources.identifiers import parse_file_name, parse_hub_name

# Consecutive paragraphs of a text file are gathered up to this size: samples then hold connected text.
_DOCUMENT_CHARACTERS = 4_000
_MAX_LINE_CHARACTERS = 16_000_000
# A file without text in so many lines is refused for holding none: a request does not wait for more.
_MAX_CHECKED_LINES = 500_000
_TABLES = {".csv": ",", ".tsv": "\t"}
_HUB_OPTION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@-]{0,120}")


def check_dataset(
    dataset: Dataset,
    param: str,
    model_roots: Sequence[Path],
    *,
    text_field: str = "text",
    token: str | None = None,
    timeout_seconds: float = 10.0,
) -> None:
    """Refuse a dataset that is not there, has no such field, or holds no text; ``param`` is its path in the request.

    Raises UserError ``dataset_not_found``, ``dataset_gated``, ``empty_dataset``, ``text_field_missing``,
    ``unsupported_dataset_file``, ``invalid_dataset`` or ``symlink_refused``; InfrastructureError ``hub_unreachable``.
    """
    try:
        if isinstance(dataset, str) and dataset.startswith("hub:"):
            from workers.sources.hub import dataset_commit

            dataset_commit(parse_hub_dataset(dataset)[0], token=token, timeout_seconds=timeout_seconds)
            return
        texts = load_texts(dataset, text_field, model_roots, token, max_lines=_MAX_CHECKED_LINES)
        if next(texts, None) is None:
            raise empty_dataset()
    except JobError as error:
        raise located(error, param) from None


def load_texts(
    dataset: Dataset,
    text_field: str,
    model_roots: Sequence[Path],
    token: str | None = None,
    *,
    commit: str | None = None,
    max_lines: int | None = None,
) -> Iterator[str]:
    """The documents of a dataset that hold more than white space, in their order, read as they are asked for.

    ``commit`` pins a dataset of the hub. Of a file, at most ``max_lines`` are read.

    Raises the UserErrors of :func:`check_dataset` with ``param`` relative: ``dataset`` or ``text_field``.
    """
    if isinstance(dataset, InlineDataset):
        documents: Iterator[str] = iter(dataset.texts)
    elif dataset == BUILTIN_DATASET:
        documents = _builtin()
    elif dataset.startswith("hub:"):
        documents = _hub(dataset, text_field, token, commit)
    else:
        documents = _file(dataset.removeprefix("file:"), text_field, model_roots, max_lines)
    return (text for text in documents if text.strip())


def located(error: JobError, param: str) -> JobError:
    """The same error with its ``param`` made absolute; ``param`` is the dataset's, such as recipe.training.dataset."""
    parent = param.rpartition(".")[0]
    error.param = f"{parent}.text_field" if error.param == "text_field" else param
    return error


def describe(dataset: Dataset) -> str:
    """A short name of a dataset for reports."""
    return dataset if isinstance(dataset, str) else f"inline ({len(dataset.texts)} texts)"


def empty_dataset() -> UserError:
    """The error for a dataset without text."""
    return _refusal("empty_dataset", "The dataset holds no text.", "Send at least one text with words in it.")


def parse_hub_dataset(dataset: str) -> tuple[str, str | None, str | None]:
    """Repository, configuration and split of ``hub:NAME[:CONFIG][:SPLIT]``; a single option may be either."""
    name, *options = dataset.removeprefix("hub:").split(":")
    try:
        parse_hub_name(name)
        if len(options) > 2 or not all(_HUB_OPTION.fullmatch(option) for option in options):
            raise ValueError("use hub:NAME, hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT")
    except ValueError as error:
        raise _refusal("invalid_dataset", f"Not a hub dataset: {error}.", "For example hub:org/name:train.") from None
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


def _file(name: str, text_field: str, model_roots: Sequence[Path], max_lines: int | None) -> Iterator[str]:
    try:
        parts = parse_file_name(name)
    except ValueError as error:
        raise _refusal("invalid_dataset", f"Not a file: {error}.", "Use file:NAME below a model root.") from None
    suffix = Path(parts[-1]).suffix.lower()
    if suffix not in {".txt", ".jsonl", *_TABLES}:
        raise _refusal(
            "unsupported_dataset_file",
            f"Texts are not read from {suffix or 'files without a suffix'}.",
            "Use .txt, .jsonl, .csv or .tsv.",
        )
    try:
        descriptor = open_file(parts, model_roots)
    except UserError as error:
        error.param = "dataset"
        raise
    if descriptor is None:
        raise _refusal(
            "dataset_not_found",
            f"There is no file {'/'.join(parts)}.",
            "Put it under one of the folders of ATTAR_MODEL_ROOTS.",
        )
    newline = "" if suffix in _TABLES else None  # a table's quoted cells keep their own line ends
    file = os.fdopen(descriptor, encoding="utf-8-sig", newline=newline)
    return _read_file(file, suffix, text_field, max_lines)


def _read_file(file: IO[str], suffix: str, text_field: str, max_lines: int | None) -> Iterator[str]:
    lines = islice(_lines(file), max_lines)
    with file:
        try:
            if suffix == ".txt":
                yield from _paragraphs(lines)
            elif suffix == ".jsonl":
                yield from _json_lines(lines, text_field)
            else:
                yield from _table(lines, _TABLES[suffix], text_field)
        except UnicodeDecodeError:
            raise _refusal("invalid_dataset", "The file is not UTF-8 text.", "Save it as UTF-8.") from None


def _lines(file: IO[str]) -> Iterator[str]:
    while line := file.readline(_MAX_LINE_CHARACTERS):
        if len(line) == _MAX_LINE_CHARACTERS and not line.endswith("\n"):
            raise _too_long("A line")
        yield line


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    """Whole paragraphs, divided at blank lines, gathered to documents."""
    document: list[str] = []
    num_characters = 0
    for line in lines:
        if line == "\n" and not document:
            continue
        if not line.strip() and num_characters >= _DOCUMENT_CHARACTERS:
            yield "".join(document).strip("\n")
            document, num_characters = [], 0
        elif num_characters >= _MAX_LINE_CHARACTERS:
            yield "".join(document)
            document, num_characters = [line], len(line)
        else:
            document.append(line)
            num_characters += len(line)
    yield "".join(document).strip("\n")


def _json_lines(lines: Iterator[str], text_field: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise _refusal("invalid_dataset", f"Line {number} is not a JSON object.", "Write one object a line.")
        yield _text_of(row, text_field, f"line {number}")


def _table(lines: Iterator[str], delimiter: str, text_field: str) -> Iterator[str]:
    num_characters = 0

    def lines_of_a_row() -> Iterator[str]:
        nonlocal num_characters
        for line in lines:
            num_characters += len(line)
            if num_characters > _MAX_LINE_CHARACTERS:
                raise _too_long("A row")
            yield line

    # The limit is the process's; its default of 128 KiB a cell is less than a document may have.
    csv.field_size_limit(_MAX_LINE_CHARACTERS)
    try:
        for row in csv.DictReader(lines_of_a_row(), delimiter=delimiter, strict=True):
            if text_field not in row:
                raise _missing_field(text_field, "the header", [name for name in row if name])
            yield row[text_field] or ""
            num_characters = 0
    except csv.Error as error:
        raise _refusal("invalid_dataset", f"The table cannot be read: {error}.", "Quote it as RFC 4180 says.") from None


def _hub(dataset: str, text_field: str, token: str | None, commit: str | None) -> Iterator[str]:
    from workers.sources.hub import dataset_commit, dataset_rows

    name, *options = parse_hub_dataset(dataset)
    if commit is None:
        commit = dataset_commit(name, token=token, timeout_seconds=10.0)
    for row in dataset_rows(name, commit, *options, token=token):
        yield _text_of(row, text_field, "a row")


def _text_of(row: Mapping[str, object], text_field: str, place: str) -> str:
    text = row.get(text_field)
    if text is None and text_field in row:
        return ""
    if not isinstance(text, str):
        raise _missing_field(text_field, place, list(row))
    # JSON can spell half a surrogate pair, which no encoder takes.
    return text.encode(errors="replace").decode()


def _missing_field(text_field: str, place: str, names: Sequence[str]) -> UserError:
    return UserError(
        "text_field_missing",
        f"There is no text in the field {text_field!r} of {place}.",
        param="text_field",
        hint=f"The fields are: {', '.join(map(str, names[:20]))[:400]}.",
    )


def _too_long(what: str) -> UserError:
    message = f"{what} is longer than {_MAX_LINE_CHARACTERS} characters."
    return _refusal("invalid_dataset", message, "Break the text up.")


def _refusal(code: str, message: str, hint: str) -> UserError:
    return UserError(code, message, param="dataset", hint=hint)
