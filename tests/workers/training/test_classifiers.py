"""Encoders that become classifiers of a text's labels, and students of these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.models import write_tiny_model
from tests.workers.attempts import certified, compressed, fetched
from tests.workers.training.recipes import (
    CLASSIFYING,
    DISTIL,
    HELD_OUT,
    LABELLED,
    MAKE,
    URLS,
    curve_of,
    write_body,
)
from workers.errors import UserError


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta"])
def test_an_encoder_without_a_head_becomes_a_classifier(model_type: str, tmp_path: Path) -> None:
    write_body(tmp_path / "body", model_type)
    attempt = certified(tmp_path / "work", tmp_path / "body", {"stages": [MAKE], **CLASSIFYING})
    quality = attempt.report["quality"]
    assert quality["accuracy"] > 0.9 > quality["original_accuracy"]
    config = json.loads((attempt.artifact / "config.json").read_text())
    assert config["id2label"] == {"0": "legitimate", "1": "phishing"}
    opened: Any = AutoModelForSequenceClassification.from_pretrained(attempt.artifact)
    tokenizer = AutoTokenizer.from_pretrained(attempt.artifact)
    with torch.no_grad():
        logits = opened(**tokenizer(URLS[80][0], return_tensors="pt")).logits
    assert opened.config.id2label[int(logits.argmax())] == URLS[80][1]


def test_teacher_student_and_codes_in_one_job(tmp_path: Path) -> None:
    write_body(tmp_path / "body", "bert")
    stages = [
        MAKE,
        {"technique": "depth_pruning", "num_blocks": 1, "keep_last": 0},
        {**{key: value for key, value in MAKE.items() if key != "task"}, "technique": "logit_distillation"},
        {"technique": "round_to_nearest", "group_size": 32, "embeddings": True},
    ]
    attempt = certified(tmp_path / "work", tmp_path / "body", {"stages": stages, **CLASSIFYING})
    report = attempt.report
    assert report["quality"]["accuracy"] > 0.9
    assert [stage["technique"] for stage in report["stages"]] == [stage["technique"] for stage in stages]
    # The student's loss is that of what the first stage made, and not of the body with a head drawn by chance.
    losses = report["stages"][2]["metrics"]
    assert losses["curve"][-1]["held_out_accuracy"] > 0.9


def test_a_classifier_may_learn_from_text_without_labels(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", "bert", task="classification", intermediate_size=128, scale=8.0)
    recipe = {
        **CLASSIFYING,
        "stages": [{"technique": "depth_pruning", "num_blocks": 1, "keep_last": 0}, {**DISTIL, "alpha": 0.0}],
        "training": {"dataset": {"texts": LABELLED["texts"]}},
        "evaluation": {"dataset": {"texts": HELD_OUT["texts"]}, "num_tokens": 1024, "max_seq_length": 128},
    }
    attempt = compressed(tmp_path / "work", tmp_path / "model", recipe)
    losses = curve_of(attempt, 1)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("training", "evaluation", "code", "param"),
    [
        ({"texts": LABELLED["texts"]}, HELD_OUT, "label_field_missing", "recipe.training.label_field"),
        (
            {"texts": LABELLED["texts"], "labels": ["spam"] * 80},
            HELD_OUT,
            "one_class",
            "recipe.training.dataset",
        ),
        (
            LABELLED,
            {**HELD_OUT, "labels": ["spam"] * 40},
            "unknown_label",
            "recipe.evaluation.dataset.labels",
        ),
        (
            {"texts": LABELLED["texts"], "labels": [f"class-{number}" for number in range(80)]},
            {**HELD_OUT, "labels": ["class-1"] * 40},
            None,
            None,
        ),
    ],
    ids=["no labels", "one class", "a label that training does not have", "as many classes as texts"],
)
def test_labels_that_teach_nothing_are_refused(
    training: dict[str, Any], evaluation: dict[str, Any], code: str | None, param: str | None, tmp_path: Path
) -> None:
    write_body(tmp_path / "body", "bert")
    recipe = {
        "stages": [MAKE],
        "training": {"dataset": training},
        "evaluation": {**CLASSIFYING["evaluation"], "dataset": evaluation},
    }
    if code is None:
        fetched(tmp_path / "work", tmp_path / "body", recipe)
        return
    with pytest.raises(UserError) as raised:
        fetched(tmp_path / "work", tmp_path / "body", recipe)
    assert (raised.value.code, raised.value.param) == (code, param)
    assert raised.value.hint


def test_labels_may_be_any_numbers_and_one_file_has_one_field_of_them(tmp_path: Path) -> None:
    write_body(tmp_path / "body", "bert")
    rows = [{"text": text, "stars": 1 + 4 * (label == "phishing"), "other": "a"} for text, label in URLS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {"dataset": "file:rows.jsonl", "text_field": "text"}
    recipe: dict[str, Any] = {
        "stages": [MAKE],
        "training": {**named, "label_field": "stars"},
        "evaluation": {**named, "label_field": "stars", "num_tokens": 4096, "max_seq_length": 128},
    }
    attempt = certified(tmp_path / "work", tmp_path / "body", recipe)
    assert json.loads((attempt.artifact / "config.json").read_text())["id2label"] == {"0": "1", "1": "5"}
    assert attempt.report["quality"]["accuracy"] > 0.9
    without = {key: value for key, value in recipe["evaluation"].items() if key != "label_field"}
    attempt = fetched(tmp_path / "without", tmp_path / "body", {**recipe, "evaluation": without})
    lines = [json.loads(line) for line in (attempt.work / "source" / "training.jsonl").read_text().splitlines()]
    assert {line["label"] for line in lines} == {0, 1}
    with pytest.raises(UserError) as raised:
        fetched(
            tmp_path / "other",
            tmp_path / "body",
            {**recipe, "evaluation": {**recipe["evaluation"], "label_field": "other"}},
        )
    assert (raised.value.code, raised.value.param) == ("label_fields_differ", "recipe.evaluation.label_field")
