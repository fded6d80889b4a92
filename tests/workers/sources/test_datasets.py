"""Where texts come from: built in, files, a hub."""

from __future__ import annotations

import json
import re
import time
import tracemalloc
from pathlib import Path

import pytest

from workers.errors import JobError, UserError
from workers.recipe_parts import BUILTIN_DATASET, Dataset, InlineDataset
from workers.sources.datasets import builtin_sha256, check_dataset, load_documents, parse_hub_dataset

PARAM = "recipe.calibration.dataset"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path


def texts(root: Path, dataset: Dataset, text_field: str = "text") -> list[str]:
    return [document.text for document in load_documents(dataset, text_field, [root])]


def refused(root: Path, dataset: Dataset, text_field: str = "text") -> tuple[str, str | None]:
    with pytest.raises(JobError) as caught:
        check_dataset(dataset, PARAM, [root], text_field=text_field)
    assert caught.value.hint
    return caught.value.code, caught.value.param


def test_the_built_in_text_is_prose_of_a_known_release() -> None:
    documents = texts(Path(), BUILTIN_DATASET)
    assert sum(map(len, documents)) > 300_000
    assert re.fullmatch("[0-9a-f]{64}", builtin_sha256())
    check_dataset(BUILTIN_DATASET, PARAM, [])


def test_no_paragraph_of_the_built_in_text_appears_twice() -> None:
    paragraphs = [
        " ".join(paragraph.split())
        for document in texts(Path(), BUILTIN_DATASET)
        for paragraph in re.split(r"\n[ \t]*\n", document)
    ]
    assert len(set(paragraphs)) == len(paragraphs)


def test_inline_texts_are_taken_without_the_empty_ones() -> None:
    assert texts(Path(), InlineDataset(texts=["one", " \n", "two"])) == ["one", "two"]


def test_a_text_file_is_divided_at_blank_lines_and_loses_nothing(root: Path) -> None:
    paragraphs = [f"Paragraph {index}.\n{'word ' * 300}" for index in range(20)]
    (root / "book.txt").write_text("\n\n".join(paragraphs))
    documents = texts(root, "file:book.txt")
    assert 1 < len(documents) < 20
    assert "\n\n".join(documents) == "\n\n".join(paragraphs)
    assert all(document.startswith("Paragraph") for document in documents)


def test_json_lines_and_tables_give_the_field_that_is_asked_for(root: Path) -> None:
    rows = [{"id": 1, "body": 'a "quoted",\ncell'}, {"id": 2, "body": ""}, {"id": 3, "body": "ünï"}]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    assert texts(root, "file:rows.jsonl", "body") == ['a "quoted",\ncell', "ünï"]
    (root / "rows.csv").write_text('id,body\n1,"a ""quoted"",\ncell"\n2,\n3,ünï\n', encoding="utf-8-sig")
    assert texts(root, "file:rows.csv", "body") == ['a "quoted",\ncell', "ünï"]
    (root / "rows.TSV").write_text("id\tbody\n1\tone, two\n")
    assert texts(root, "file:rows.TSV", "body") == ["one, two"]


def test_a_cell_longer_than_the_csv_modules_default_is_read(root: Path) -> None:
    (root / "long.csv").write_text("text\n" + "x" * 300_000 + "\n")
    assert len(texts(root, "file:long.csv")[0]) == 300_000


def test_half_a_surrogate_pair_does_not_reach_an_encoder(root: Path) -> None:
    (root / "odd.jsonl").write_text('{"text": "a\\ud800b"}\n')
    assert texts(root, "file:odd.jsonl") == ["a?b"]


def test_a_large_file_is_read_only_as_far_as_texts_are_taken(root: Path) -> None:
    with (root / "endless.jsonl").open("w") as file:
        file.write('{"text": "first"}\n')
        file.truncate(10**12)
    assert next(load_documents("file:endless.jsonl", "text", [root])).text == "first"


@pytest.mark.parametrize("name", ["empty.txt", "blank.txt", "empty.jsonl", "header.csv", "nothing.csv"])
def test_a_dataset_without_text_is_refused(root: Path, name: str) -> None:
    content = {"blank.txt": "\n \n\t\n", "header.csv": "text\n", "empty.jsonl": '{"text": null}\n'}
    (root / name).write_text(content.get(name, ""))
    assert refused(root, f"file:{name}") == ("empty_dataset", PARAM)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"body": "x"}\n'),
        ("b.jsonl", b'{"text": 5}\n'),
        ("c.csv", b"body\nx\n"),
        ("d.tsv", b"a\tb\n1\t2\n"),
    ],
)
def test_a_missing_field_is_named_with_the_ones_there_are(root: Path, name: str, content: bytes) -> None:
    (root / name).write_bytes(content)
    assert refused(root, f"file:{name}") == ("text_field_missing", "recipe.calibration.text_field")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latin.txt", b"caf\xe9"),
        ("bad.jsonl", b"{\n"),
        ("deep.jsonl", b"[" * 100_000),
        ("list.jsonl", b"[1]\n"),
        ("bad.csv", b'text\n"open\n'),
        ("line.txt", b"x" * 16_000_001),
    ],
)
def test_a_damaged_file_is_refused(root: Path, name: str, content: bytes) -> None:
    (root / name).write_bytes(content)
    assert refused(root, f"file:{name}") == ("invalid_dataset", PARAM)


def test_names_that_are_not_there_or_lead_away_are_refused(root: Path) -> None:
    (root / "folder.txt").mkdir()
    (root / "x.parquet").write_bytes(b"PAR1")
    (root / "link.txt").symlink_to("/etc/hostname")
    assert refused(root, "file:nothing.txt")[0] == "dataset_not_found"
    assert refused(root, "file:folder.txt")[0] == "dataset_not_found"
    assert refused(root, "file:x.parquet")[0] == "unsupported_dataset_file"
    assert refused(root, "file:../secret.txt") == ("invalid_dataset", PARAM)
    assert refused(root, "file:/etc/hostname.txt") == ("invalid_dataset", PARAM)
    assert refused(root, "file:link.txt") == ("symlink_refused", PARAM)


def test_hub_datasets_name_a_repository_a_configuration_and_a_split() -> None:
    assert parse_hub_dataset("hub:imdb") == ("imdb", None, None)
    assert parse_hub_dataset("hub:org/name:train") == ("org/name", "train", None)
    assert parse_hub_dataset("hub:org/name:raw-v1:test") == ("org/name", "raw-v1", "test")


@pytest.mark.parametrize("dataset", ["hub:", "hub:../x", "hub:a:b:c:d", "hub:a:", "hub:a:../b:train", "hub:/etc"])
def test_other_hub_datasets_are_refused(dataset: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_hub_dataset(dataset)
    assert caught.value.code == "invalid_dataset"


@pytest.mark.parametrize("name", ["nul.csv", "nul.txt", "row.csv"])
def test_an_endless_line_or_row_is_refused_with_bounded_memory(root: Path, name: str) -> None:
    with (root / name).open("wb") as file:
        file.write(b'text\n"' + b"a,b\n" * 5_000_000 if name == "row.csv" else b"text\n")
        file.truncate(200_000_000)
    tracemalloc.start()
    try:
        assert refused(root, f"file:{name}") == ("invalid_dataset", PARAM)
        assert tracemalloc.get_traced_memory()[1] < 200_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["blank.txt", "blank.jsonl", "blank.csv"])
def test_a_file_of_nothing_but_line_ends_is_refused_soon(root: Path, name: str) -> None:
    (root / name).write_bytes(b"text\n" * (name == "blank.csv") + b"\n" * 20_000_000)
    started = time.monotonic()
    assert refused(root, f"file:{name}") == ("empty_dataset", PARAM)
    assert time.monotonic() - started < 5
