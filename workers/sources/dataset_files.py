"""Rows of text files, JSON Lines and tables below the model roots, read as they are asked for."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO

from workers.errors import UserError
from workers.sources.checkpoint_folder import open_file
from workers.sources.identifiers import parse_file_name

Row = Mapping[str, object]

# Consecutive paragraphs of a text file are gathered up to this size: samples then hold connected text.
_DOCUMENT_CHARACTERS = 4_000
_MAX_LINE_CHARACTERS = 16_000_000
_TABLES = {".csv": ",", ".tsv": "\t"}


def read_rows(
    name: str, text_field: str, model_roots: Sequence[Path], max_lines: int | None
) -> Iterator[tuple[Row, str]]:
    """The rows of a file and where each one is; a text file's have the one field ``text_field``.

    Raises UserError with ``param`` relative: ``dataset``. At most ``max_lines`` lines are read.
    """
    try:
        parts = parse_file_name(name)
    except ValueError as error:
        raise refusal("invalid_dataset", f"Not a file: {error}.", "Use file:NAME below a model root.") from None
    suffix = Path(parts[-1]).suffix.lower()
    if suffix not in {".txt", ".jsonl", *_TABLES}:
        raise refusal(
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
        raise refusal(
            "dataset_not_found",
            f"There is no file {'/'.join(parts)}.",
            "Put it under one of the folders of ATTAR_MODEL_ROOTS.",
        )
    newline = "" if suffix in _TABLES else None  # a table's quoted cells keep their own line ends
    file = os.fdopen(descriptor, encoding="utf-8-sig", newline=newline)
    return _read_file(file, suffix, text_field, max_lines)


def refusal(code: str, message: str, hint: str) -> UserError:
    """An error of the dataset itself."""
    return UserError(code, message, param="dataset", hint=hint)


def _read_file(file: IO[str], suffix: str, text_field: str, max_lines: int | None) -> Iterator[tuple[Row, str]]:
    lines = islice(_lines(file), max_lines)
    with file:
        try:
            if suffix == ".txt":
                yield from (({text_field: text}, "a text file") for text in _paragraphs(lines))
            elif suffix == ".jsonl":
                yield from _json_lines(lines)
            else:
                yield from ((row, "the header") for row in _table(lines, _TABLES[suffix]))
        except UnicodeDecodeError:
            raise refusal("invalid_dataset", "The file is not UTF-8 text.", "Save it as UTF-8.") from None


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


def _json_lines(lines: Iterator[str]) -> Iterator[tuple[Row, str]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise refusal("invalid_dataset", f"Line {number} is not a JSON object.", "Write one object a line.")
        yield row, f"line {number}"


def _table(lines: Iterator[str], delimiter: str) -> Iterator[Row]:
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
            yield {name: cell for name, cell in row.items() if name}
            num_characters = 0
    except csv.Error as error:
        raise refusal("invalid_dataset", f"The table cannot be read: {error}.", "Quote it as RFC 4180 says.") from None


def _too_long(what: str) -> UserError:
    message = f"{what} is longer than {_MAX_LINE_CHARACTERS} characters."
    return refusal("invalid_dataset", message, "Break the text up.")
