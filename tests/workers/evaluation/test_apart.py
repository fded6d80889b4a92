"""Quality on the user's own text and on general text, each apart, and never on what the stages have read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models import write_tiny_llama
from tests.workers.attempts import TEXTS, Attempt, certified
from workers.recipe import Recipe
from workers.recipe_parts import BUILTIN_DATASET

OWN = {"texts": TEXTS}
GENERAL = {"dataset": BUILTIN_DATASET, "num_tokens": 512, "max_seq_length": 128}
PRUNED = {"technique": "vocabulary_pruning"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roots") / "llama"
    write_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def on_own_text(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    """Evaluated on text of the user's, whose tokens are those that are left."""
    return certified(tmp_path_factory.mktemp("jobs") / "own", model, {"stages": [PRUNED]})


@pytest.fixture(scope="module")
def on_general_text(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    """The same, evaluated on what nobody named."""
    recipe = {"stages": [PRUNED], "calibration": {"dataset": OWN}, "evaluation": GENERAL}
    return certified(tmp_path_factory.mktemp("jobs") / "general", model, recipe)


def read(attempt: Attempt, name: str) -> list[str]:
    return [json.loads(line)["text"] for line in (attempt.work / "source" / f"{name}.jsonl").read_text().splitlines()]


def test_beside_own_text_there_is_general_text(on_own_text: Attempt) -> None:
    quality, apart = (on_own_text.report[name] for name in ("quality", "quality_apart"))
    assert (quality["text"], apart["text"]) == ("task", "general")
    assert on_own_text.report["environment"]["data"]["apart"]["dataset"] == BUILTIN_DATASET
    # What Python's documentation needs and the text has not is gone, and paid for.
    assert quality["num_retokenized"] == 0 < apart["num_retokenized"]
    assert apart["perplexity_ratio"] > 1.05 * quality["perplexity_ratio"]
    assert quality.keys() == apart.keys()
    assert 0 < apart["perplexity_ratio_standard_error"] < apart["perplexity_standard_error"]


def test_what_is_measured_apart_is_what_transformers_gives(on_own_text: Attempt, model: Path) -> None:
    apart, limits = on_own_text.report["quality_apart"], on_own_text.request["recipe"]["evaluation"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    opened = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor(tokenizer("\n\n".join(read(on_own_text, "apart")))["input_ids"])[: limits["num_tokens"]]
    losses = []
    with torch.inference_mode():
        for window in torch.split(ids, limits["max_seq_length"]):
            logits = opened(input_ids=window[None]).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    # Windows of two tokenizers begin where both have a border: nearly the same text.
    assert apart["original_perplexity"] == pytest.approx(math.exp(torch.cat(losses).mean()), rel=0.02)


def test_beside_general_text_there_is_own_text_that_no_stage_has_read(on_general_text: Attempt) -> None:
    quality, apart = (on_general_text.report[name] for name in ("quality", "quality_apart"))
    assert (quality["text"], apart["text"]) == ("general", "task")
    held_out, calibrated = read(on_general_text, "apart"), read(on_general_text, "calibration")
    assert held_out == TEXTS[9 : 10 * len(held_out) : 10]
    assert set(calibrated) == set(TEXTS) - set(held_out)
    assert apart["num_retokenized"] < quality["num_retokenized"]
    assert apart["perplexity_ratio"] < quality["perplexity_ratio"]
    card = (on_general_text.artifact / "README.md").read_text()
    assert f"| perplexity, the text of the task | {apart['original_perplexity']:.3f} ±" in card
    assert f"perplexity ratio {apart['perplexity_ratio']:.4f} ±" in card


def test_without_text_that_is_left_the_part_is_null_and_the_job_says_why(model: Path, tmp_path: Path) -> None:
    recipe = {"stages": [{"technique": "gptq"}], "calibration": {"dataset": {"texts": [TEXTS[0][:60]]}}}
    attempt = certified(tmp_path / "job", model, {**recipe, "evaluation": GENERAL})
    assert attempt.report["quality_apart"] is None
    [warning] = [each for each in attempt.events if each.get("code") == "quality_apart_missing"]
    assert "your own text" in warning["message"]


@pytest.mark.parametrize(
    ("stages", "calibration", "training", "evaluation", "dataset"),
    [
        (["gptq"], BUILTIN_DATASET, None, BUILTIN_DATASET, None),
        (["round_to_nearest"], OWN, None, BUILTIN_DATASET, None),  # nothing is calibrated
        (["gptq"], OWN, None, BUILTIN_DATASET, OWN),
        (["gptq"], "file:own.txt", None, "file:other.txt", BUILTIN_DATASET),
        (["round_to_nearest"], BUILTIN_DATASET, None, OWN, BUILTIN_DATASET),
        (["fine_tuning"], OWN, "file:own.txt", BUILTIN_DATASET, "file:own.txt"),
        (["fine_tuning", "gptq"], "file:own.txt", BUILTIN_DATASET, BUILTIN_DATASET, "file:own.txt"),
    ],
)
def test_the_text_apart_is_of_the_other_kind(
    stages: list[str], calibration: Any, training: Any, evaluation: Any, dataset: Any
) -> None:
    apart = Recipe.model_validate(
        {
            "stages": [{"technique": technique} for technique in stages],
            "calibration": {"dataset": calibration},
            "training": None if training is None else {"dataset": training},
            "evaluation": {"dataset": evaluation, "num_tokens": 100_000},
        }
    ).evaluation_apart
    if dataset is None:
        assert apart is None
    else:
        assert apart is not None
        assert apart.num_tokens == 4_096
        assert apart.model_dump(exclude_defaults=True).get("dataset", BUILTIN_DATASET) == dataset
