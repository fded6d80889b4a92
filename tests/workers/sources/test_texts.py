"""Texts of a recipe, written for the processes that have no network."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from workers.errors import UserError
from workers.recipe import Recipe
from workers.sources.datasets import load_documents
from workers.sources.labels import Labels
from workers.sources.texts import write_texts

ROUNDING = {"technique": "round_to_nearest"}
GPTQ = {"technique": "gptq"}


def write(folder: Path, calibration: Any, evaluation: Any, *, stage: dict[str, Any] = GPTQ, **more: Any) -> Any:
    recipe = Recipe.model_validate(
        {
            "stages": [stage],
            "calibration": {"dataset": calibration, "num_samples": 4, "max_seq_length": 64},
            "evaluation": {"dataset": evaluation, "num_tokens": 256, **more},
        }
    )
    return write_texts(recipe, folder, [folder])


def read(folder: Path, name: str) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def inline(*texts: str) -> dict[str, Any]:
    return {"texts": list(texts)}


def test_one_source_is_divided_by_document(tmp_path: Path) -> None:
    documents = [f"Document {index}." for index in range(9)]
    write(tmp_path, inline(*documents), inline(*documents))
    assert read(tmp_path, "evaluation") == [documents[2], documents[5], documents[8]]
    assert read(tmp_path, "calibration") == [text for text in documents if text not in read(tmp_path, "evaluation")]


def test_the_built_in_text_is_evaluated_alike_whatever_calibrates(tmp_path: Path) -> None:
    """Else the same evaluation would give other numbers for one model under two recipes."""
    builtin, found = "builtin:python-docs", []
    for index, (calibration, stage) in enumerate([(builtin, GPTQ), (builtin, ROUNDING), (inline("Mine."), GPTQ)]):
        folder = tmp_path / str(index)
        folder.mkdir()
        write(folder, calibration, builtin, stage=stage)
        found.append(read(folder, "evaluation"))
    assert found[0] == found[1] == found[2]


def test_passages_of_the_built_in_text_that_calibrate_are_not_evaluated(tmp_path: Path) -> None:
    builtin = "builtin:python-docs"
    write(tmp_path, builtin, builtin)
    passage = read(tmp_path, "evaluation")[0]
    write(tmp_path, inline(passage), builtin)
    assert passage not in read(tmp_path, "evaluation")


def test_a_text_that_repeats_in_one_source_stays_on_one_side(tmp_path: Path) -> None:
    documents = ["same", "a", "same ", "b", "same", "c", "\nsame"]
    write(tmp_path, inline(*documents), inline(*documents))
    calibration, evaluation = read(tmp_path, "calibration"), read(tmp_path, "evaluation")
    assert {text.strip() for text in calibration} & {text.strip() for text in evaluation} == set()


def test_a_single_document_is_cut_at_white_space(tmp_path: Path) -> None:
    words = " ".join(f"word{index}" for index in range(60))
    write(tmp_path, inline(words), inline(words))
    calibration, evaluation = read(tmp_path, "calibration")[0], read(tmp_path, "evaluation")[0]
    assert calibration + evaluation == words
    assert evaluation.startswith(" ")
    assert 1.8 < len(calibration) / len(evaluation) < 2.2


def test_two_spellings_of_one_file_are_one_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "row {index}"}}\n' for index in range(6)))
    write(tmp_path, "file:a.jsonl", "file:a.jsonl/")
    assert len(read(tmp_path, "evaluation")) == 2


def test_evaluation_leaves_out_what_calibration_has_from_elsewhere(tmp_path: Path) -> None:
    write(tmp_path, inline("a", "b"), inline("b ", "c", "\na"))
    assert read(tmp_path, "evaluation") == ["c"]


def test_evaluation_without_text_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        write(tmp_path, inline("a", "b"), inline("b", "a", "a"))
    assert (caught.value.code, caught.value.param) == ("empty_dataset", "recipe.evaluation.dataset")


def test_overlap_is_there_for_those_who_ask(tmp_path: Path) -> None:
    write(tmp_path, inline("a", "b"), inline("b", "a"), allow_overlap=True)
    assert read(tmp_path, "evaluation") == ["b", "a"]


def test_evaluation_is_the_same_whether_or_not_anything_is_calibrated(tmp_path: Path) -> None:
    builtin = "builtin:python-docs"
    with_calibration = write(tmp_path, builtin, builtin)
    without = write(tmp_path, builtin, builtin, stage=ROUNDING)
    assert with_calibration["evaluation"] == without["evaluation"]
    assert without["calibration"] is None
    assert not (tmp_path / "calibration.jsonl").exists()


def test_built_in_calibration_and_evaluation_share_no_paragraph(tmp_path: Path) -> None:
    write(tmp_path, "builtin:python-docs", "builtin:python-docs")
    sides = [
        {part.strip() for text in read(tmp_path, name) for part in re.split(r"\n\s*\n", text) if part.strip()}
        for name in ("calibration", "evaluation")
    ]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_reading_stops_when_there_is_enough(tmp_path: Path) -> None:
    with (tmp_path / "endless.jsonl").open("w") as file:
        file.writelines(f'{{"text": "row {index} {"x" * 100}"}}\n' for index in range(2_000))
        file.truncate(10**12)
    described = write(tmp_path, "file:endless.jsonl", "file:endless.jsonl")
    assert 256 * 12 <= described["evaluation"]["num_characters"] < 256 * 12 + 200
    assert described["evaluation"]["num_documents"] == len(read(tmp_path, "evaluation"))


def test_all_of_the_text_is_there_for_a_stage_that_counts_its_tokens(tmp_path: Path) -> None:
    documents = [f"Document {index} is about subject {index * index}, as told." for index in range(300)]
    write(tmp_path, inline(*documents), inline("Mine."))
    assert 0 < len(read(tmp_path, "calibration")) < 100
    write(tmp_path, inline(*documents), inline("Mine."), stage={"technique": "vocabulary_pruning"})
    assert read(tmp_path, "calibration") == documents


def test_what_is_recorded_identifies_the_text(tmp_path: Path) -> None:
    first = write(tmp_path, inline("a", "b"), "builtin:python-docs")
    again = write(tmp_path, inline("a", "b"), "builtin:python-docs")
    other = write(tmp_path, inline("a", "B"), "builtin:python-docs")
    assert first == again
    assert first["calibration"]["sha256"] != other["calibration"]["sha256"]
    assert first["calibration"]["dataset"] == "inline (2 texts)"
    assert re.fullmatch("[0-9a-f]{64}", first["evaluation"]["source_sha256"])


def test_an_error_names_the_part_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"body": "x"}\n')
    for calibration, evaluation, param in (
        ("file:no.txt", "builtin:python-docs", "recipe.calibration.dataset"),
        ("builtin:python-docs", "file:no.txt", "recipe.evaluation.dataset"),
        ("builtin:python-docs", "file:rows.jsonl", "recipe.evaluation.text_field"),
    ):
        with pytest.raises(UserError) as caught:
            write(tmp_path, calibration, evaluation)
        assert caught.value.param == param


# What an attacker did to have the same text on both sides.

PARAGRAPHS = [
    "\n".join(" ".join(f"Word{part}x{line}x{word}" for word in range(9)) for line in range(3)) for part in range(40)
]
SHORT = [f"Item{index} is of some colour{index} here" for index in range(40)]


def runs(texts: list[str], num_words: int = 13) -> set[tuple[str, ...]]:
    words = " ".join(texts).casefold().split()
    return {tuple(words[start : start + num_words]) for start in range(len(words) - num_words + 1)}


def assert_apart(folder: Path, described: Any, own: str) -> None:
    calibration, evaluation = read(folder, "calibration"), read(folder, "evaluation")
    assert calibration
    assert evaluation == [own]
    assert not runs(calibration) & runs(evaluation)
    assert described["evaluation"]["num_removed_characters"] > 0


def test_the_same_text_under_another_name_form_case_or_layout_is_left_out(tmp_path: Path) -> None:
    own = "This sentence is of evaluation alone."
    text = "\n\n".join(PARAGRAPHS[:4])
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(text + "\n\n" + own)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in [*PARAGRAPHS[:4], own]))
    for evaluation in (
        inline(text, own),
        inline(text.upper(), own),
        inline(" ".join(text.split()), own),
        inline(text.replace(" ", "\u00a0 "), own),
        inline(*PARAGRAPHS[:4], own),
        inline(text[700:], own),
        inline(*text.replace("\n\n", "\n").splitlines()[::2], own),
        "file:b.jsonl",
    ):
        assert_apart(tmp_path, write(tmp_path, "file:a.txt", evaluation), own)
    described = write(tmp_path, "file:a.txt", "file:b.txt")
    assert read(tmp_path, "evaluation")[0].strip() == own
    assert described["evaluation"]["num_removed_characters"] >= len(text)


def test_short_paragraphs_are_found_in_one_document_that_joins_them(tmp_path: Path) -> None:
    own = "This sentence is of evaluation alone."
    for calibration in (inline("\n\n".join(SHORT)), inline("\n".join(SHORT)), inline(" ".join(SHORT))):
        assert_apart(tmp_path, write(tmp_path, calibration, inline(*SHORT, own)), own)
    described = write(tmp_path, inline(*SHORT), inline(" ".join(SHORT[:3]), "\n\n".join(SHORT), own))
    assert described["evaluation"]["num_removed_characters"] > len("".join(SHORT))


def test_only_the_shared_sentences_of_a_long_paragraph_are_left_out(tmp_path: Path) -> None:
    shared = " ".join(f"shared{index}" for index in range(15)) + "."
    write(tmp_path, inline(f"Before this. {shared}"), inline(f"One stays. {shared} Another one stays."))
    assert read(tmp_path, "evaluation") == ["One stays. Another one stays."]


def test_a_file_copy_of_the_built_in_text_shares_nothing_with_it(tmp_path: Path) -> None:
    copy = "\n\n".join(document.text for document in load_documents("builtin:python-docs", "text", []))
    (tmp_path / "copy.txt").write_text(copy)
    described = write(tmp_path, "builtin:python-docs", "file:copy.txt")
    sides = [
        {" ".join(part.split()) for text in read(tmp_path, name) for part in re.split(r"\n\s*\n", text) if part.strip()}
        for name in ("calibration", "evaluation")
    ]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert described["evaluation"]["num_removed_characters"] > 0


def test_a_copy_alone_is_refused_with_the_way_out(tmp_path: Path) -> None:
    text = "\n\n".join(PARAGRAPHS[:4])
    with pytest.raises(UserError) as caught:
        write(tmp_path, inline(text), inline(text.lower(), *PARAGRAPHS[:4]))
    assert (caught.value.code, caught.value.param) == ("empty_dataset", "recipe.evaluation.dataset")
    assert "allow_overlap" in str(caught.value.hint)


def test_a_paragraph_that_repeats_within_one_source_is_on_one_side(tmp_path: Path) -> None:
    notice = "Copyright by Nobody."
    documents = [f"{notice}\n\nText {name} of its own." for name in "abcdef"]
    described = write(tmp_path, inline(*documents), inline(*documents))
    assert read(tmp_path, "evaluation") == ["Text c of its own.", "Text f of its own."]
    assert described["evaluation"]["num_removed_characters"] == 2 * len(notice + "\n\n")
    single = "\n\n".join([*PARAGRAPHS[:8], *PARAGRAPHS[:3], *PARAGRAPHS[8:10]])
    write(tmp_path, inline(single), inline(single))
    assert not runs(read(tmp_path, "calibration")) & runs(read(tmp_path, "evaluation"))


def test_a_source_that_repeats_is_divided_the_same_without_calibration(tmp_path: Path) -> None:
    documents = [PARAGRAPHS[index % 7] + f"\n\nText {index} of its own." for index in range(30)]
    with_calibration = write(tmp_path, inline(*documents), inline(*documents))
    without = write(tmp_path, inline(*documents), inline(*documents), stage=ROUNDING)
    assert with_calibration["evaluation"] == without["evaluation"]


def test_labelled_texts_are_whole_or_not_there_and_calibration_has_no_labels(tmp_path: Path) -> None:
    shared = "these are the thirteen words in a row that two of the texts share today"
    texts = [f"Document {index}." for index in range(6)] + [shared, "Another.", f"{shared}. More of it."]
    dataset = {"texts": texts, "labels": ["b", 0, 1, "a", "1", "0", 0, 0, 1]}
    labels = Labels(None, ("a", "b"))
    recipe = Recipe.model_validate(
        {"stages": [GPTQ], "calibration": {"dataset": dataset}, "evaluation": {"dataset": dataset}}
    )
    write_texts(recipe, tmp_path, [], labels=labels)
    rows = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    # Which side a labelled text is on hangs on the text; the last one is evaluation's, but for what it shares.
    assert rows == [{"text": texts[4], "label": 1}, {"text": texts[5], "label": 0}]
    assert read(tmp_path, "calibration") == [texts[index] for index in (0, 1, 2, 3, 6, 7)]
    assert "label" not in (tmp_path / "calibration.jsonl").read_text()


def test_of_two_labelled_texts_evaluation_has_the_last(tmp_path: Path) -> None:
    dataset = {"texts": ["one two three", "four five six"], "labels": [0, 1]}
    recipe = Recipe.model_validate(
        {"stages": [GPTQ], "calibration": {"dataset": dataset}, "evaluation": {"dataset": dataset}}
    )
    write_texts(recipe, tmp_path, [], labels=Labels(None, ("a", "b")))
    assert read(tmp_path, "calibration") == ["one two three"]
    assert (tmp_path / "evaluation.jsonl").read_text() == '{"text": "four five six", "label": 1}\n'


def test_a_row_whose_label_is_no_class_ends_the_reading_by_name(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "one", "kind": "a"}\n{"text": "two", "kind": true}\n')
    recipe = Recipe.model_validate(
        {"stages": [ROUNDING], "evaluation": {"dataset": "file:rows.jsonl", "label_field": "kind"}}
    )
    with pytest.raises(UserError) as caught:
        write_texts(recipe, tmp_path, [tmp_path], labels=Labels("kind", ("a", "b")))
    assert (caught.value.code, caught.value.param) == ("unknown_label", "recipe.evaluation.label_field")
    assert "a, b" in str(caught.value.hint)


def test_what_stages_train_on_is_calibrated_with_where_no_text_is_named_for_it(tmp_path: Path) -> None:
    texts = [f"Document {index} says {index * index}." * 20 for index in range(12)]
    tune = {"technique": "fine_tuning", "num_steps": 1, "batch_size": 1, "max_seq_length": 64}
    recipe = Recipe.model_validate(
        {
            "stages": [tune, GPTQ],
            "training": {"dataset": inline(*texts)},
            "calibration": {"num_samples": 4, "max_seq_length": 64},
        }
    )
    described = write_texts(recipe, tmp_path, [])
    assert described["calibration"] is not None
    assert described["calibration"] == described["training"]
    assert not (tmp_path / "calibration.jsonl").exists()
    assert set(read(tmp_path, "training")) <= set(texts)
    assert recipe.num_training_tokens == 4 * 64  # what the hungrier of the two reads


def paragraphs(documents: list[str]) -> set[str]:
    return {" ".join(paragraph.split()) for text in documents for paragraph in text.split("\n\n")}


def write_apart(
    folder: Path, calibration: Any, evaluation: Any, stage: dict[str, Any] = GPTQ, num_tokens: int = 512
) -> Any:
    recipe = Recipe.model_validate(
        {
            "stages": [stage],
            "training": {"dataset": calibration},
            "calibration": {"dataset": calibration, "num_samples": 1024},
            "evaluation": {"dataset": evaluation, "num_tokens": num_tokens},
        }
    )
    return write_texts(recipe, folder, [folder], measures_apart=True)


def test_general_text_apart_is_what_an_evaluation_on_it_reads_and_never_calibrated_on(tmp_path: Path) -> None:
    builtin = "builtin:python-docs"
    described = write_apart(tmp_path, builtin, inline("Mine."))
    assert described["apart"]["dataset"] == builtin
    apart = read(tmp_path, "apart")
    assert not paragraphs(read(tmp_path, "calibration")) & paragraphs(apart)
    write_apart(tmp_path, builtin, builtin)
    assert not (tmp_path / "apart.jsonl").exists()
    assert read(tmp_path, "evaluation") == apart


def test_own_text_apart_is_no_more_than_is_measured_and_the_rest_is_trained_on(tmp_path: Path) -> None:
    documents = [f"Document {index} " + f"word{index} " * 40 for index in range(100)]
    write_apart(tmp_path, inline(*documents), "builtin:python-docs", {"technique": "fine_tuning"}, 64)
    apart = read(tmp_path, "apart")
    assert apart == [documents[9], documents[19], documents[29]]  # 64 tokens of 12 characters
    assert read(tmp_path, "training") == [text for text in documents if text not in apart]


def test_general_text_apart_leaves_out_what_own_calibration_text_has(tmp_path: Path) -> None:
    mine = inline(*[f"Document {index}." for index in range(9)])
    write_apart(tmp_path, mine, mine)
    passage = read(tmp_path, "apart")[0]
    copied = inline(passage, *mine["texts"])
    described = write_apart(tmp_path, copied, copied)
    assert described["apart"]["num_removed_characters"] > 0.9 * len(passage)
    assert not paragraphs(copied["texts"]) & paragraphs(read(tmp_path, "apart"))
