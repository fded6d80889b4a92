"""Rounds of pruning and training: the target is reached, zeros stay, and a killed job ends with the same bytes."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from tests.models import write_tiny_model
from tests.workers.attempts import TEXTS, certified, compressed, fetched
from workers.errors import UserError
from workers.pipeline import compress
from workers.recipe import Recipe
from workers.recipe_rules import RecipeError
from workers.techniques import Iterate
from workers.training.loop import Loop

TRAINING = {"dataset": {"texts": TEXTS[:150]}}
TUNE = {
    "technique": "logit_distillation", "num_steps": 3, "batch_size": 4, "max_seq_length": 32, "num_evaluations": 1,
    "precision": "float32", "learning_rate": 1e-3,
}  # fmt: skip
PRUNE = {"technique": "magnitude", "sparsity": 0.6}


class Stopped(BaseException):
    """The run ends here."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roots") / "deep"
    write_tiny_model(folder, "llama", num_hidden_layers=4, num_key_value_heads=2, intermediate_size=128, scale=4.0)
    return folder


def recipe_of(*stages: dict[str, Any]) -> dict[str, Any]:
    return {"stages": list(stages), "training": TRAINING}


def rounds(**changes: Any) -> dict[str, Any]:
    return {"technique": "iterate", "rounds": 3, "stages": [PRUNE, TUNE], **changes}


def zeros(folder: Path) -> dict[str, float]:
    weights = load_file(folder / "model.safetensors")
    return {
        name: float((weight == 0).float().mean())
        for name, weight in weights.items()
        if name.startswith("model.layers") and weight.dim() == 2
    }


@pytest.mark.parametrize("technique", ["magnitude", "wanda", "sparsegpt"])
def test_the_target_is_reached_in_rounds_that_train_what_is_left(technique: str, model: Path, tmp_path: Path) -> None:
    inner = {"technique": technique, "sparsity": 0.6}
    longer = {**TUNE, "num_steps": 10, "learning_rate": 3e-4}
    attempt = certified(tmp_path / "work", model, recipe_of(rounds(stages=[inner, longer])))
    assert all(found == pytest.approx(0.6, abs=0.01) for found in zeros(attempt.artifact).values())
    [stage] = attempt.report["stages"]
    fractions = [each["fraction"] for each in stage["metrics"]["rounds"]]
    assert fractions == pytest.approx([1 - (2 / 3) ** 3, 1 - (1 / 3) ** 3, 1])
    for each in stage["metrics"]["rounds"]:
        pruned, trained = each["stages"]
        assert (pruned["technique"], trained["technique"]) == (technique, "logit_distillation")
        assert trained["held_out_loss"] < trained["original_held_out_loss"]
    assert stage["metrics"]["sparsity"] == pytest.approx(0.6, abs=0.001)  # counted in the reopened artifact


def test_the_learning_rate_falls_once_over_all_rounds(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_rate, rates = Loop._rate, []  # asked for two groups of parameters in each step

    def noted(self: Loop, step: int) -> float:
        rates.append(own_rate(self, step))
        return rates[-1]

    monkeypatch.setattr(Loop, "_rate", noted)
    compressed(tmp_path / "work", model, recipe_of(rounds(stages=[PRUNE, {**TUNE, "warmup_fraction": 0.0}])))
    assert rates[::2] == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * step / 9)) for step in range(9)])
    rates.clear()
    compressed(tmp_path / "warm", model, recipe_of(rounds(stages=[PRUNE, {**TUNE, "warmup_fraction": 0.6}])))
    warm = [(0.1 + 0.45 * (1 + math.cos(math.pi * done / 3))) for done in range(3)]
    assert rates[::2] == pytest.approx([part * rate for rate in warm for part in (0.5, 1.0, 1.0)])


def test_each_round_has_text_of_its_own() -> None:
    recipe = Recipe.model_validate(recipe_of(rounds()))
    assert recipe.num_training_tokens == 3 * 3 * 4 * 32


def test_zeros_stay_and_all_else_moves(model: Path, tmp_path: Path) -> None:
    pruned = compressed(tmp_path / "pruned", model, recipe_of(PRUNE))
    trained = compressed(tmp_path / "trained", model, recipe_of(PRUNE, TUNE))
    before, after = (load_file(each.artifact / "model.safetensors") for each in (pruned, trained))
    for name, weight in before.items():
        if name.startswith("model.layers") and weight.dim() == 2:
            assert bool((after[name][weight == 0] == 0).all())
            assert float((after[name] != weight)[weight != 0].float().mean()) > 0.5


def test_blocks_go_over_the_rounds(model: Path, tmp_path: Path) -> None:
    inner = {"technique": "depth_pruning", "num_blocks": 2}
    attempt = certified(
        tmp_path / "work", model, recipe_of(rounds(rounds=2, schedule=[0.5, 1.0], stages=[inner, TUNE]))
    )
    config = json.loads((attempt.artifact / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    [stage] = attempt.report["stages"]
    assert [each["stages"][0]["num_blocks"] for each in stage["metrics"]["rounds"]] == [3, 2]


def test_it_goes_before_codes_and_masks(model: Path, tmp_path: Path) -> None:
    gptq = {"technique": "gptq", "group_size": 32}
    report = certified(tmp_path / "work", model, recipe_of(rounds(), gptq)).report
    assert [stage["technique"] for stage in report["stages"]] == ["iterate", "gptq"]
    assert report["size"]["compression_ratio"] > 1.5


ROUNDS_AND_CODES = recipe_of(rounds(), {"technique": "gptq", "group_size": 32})


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights that ROUNDS_AND_CODES ends with."""
    return compressed(tmp_path_factory.mktemp("whole") / "work", model, ROUNDS_AND_CODES).artifact / "model.safetensors"


@pytest.mark.parametrize("num_events", [2, 4, 7, 11, 14])
def test_killed_anywhere_it_ends_with_the_same_bytes(
    num_events: int, undisturbed: Path, model: Path, tmp_path: Path
) -> None:
    attempt = fetched(tmp_path / "work", model, ROUNDS_AND_CODES)
    heard = 0

    def emit(event: dict[str, Any]) -> None:
        nonlocal heard
        heard += event["event"] == "stage" or event.get("step") == "train" or "down_proj" in str(event.get("step"))
        if heard == num_events:
            heard += 1
            raise Stopped

    with pytest.raises(Stopped):
        compress(attempt.work, attempt.request, emit)
    compress(attempt.work, attempt.request, attempt.events.append)
    digests = [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in (undisturbed, attempt.artifact / "model.safetensors")
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [TUNE, PRUNE]}, "end with one that trains"),
        ({"stages": [PRUNE, PRUNE, TUNE]}, "one stage that prunes"),
        ({"stages": [TUNE, TUNE]}, "one stage that prunes"),
        ({"stages": [{"technique": "wanda", "mask_structure": "2:4"}, TUNE]}, r"stages\[0\].mask_structure"),
        ({"stages": [TUNE, {"technique": "depth_pruning", "fraction": 0.5}, TUNE]}, r"stages\[1\].num_blocks"),
        ({"rounds": 3, "schedule": [0.5, 1.0]}, "as schedule has it"),
        ({"schedule": [0.5, 0.4, 1.0]}, "must rise"),
        ({"schedule": [0.5, 0.9, 0.95]}, "end with 1"),
    ],
)
def test_rounds_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Iterate.model_validate(rounds(**changes))


@pytest.mark.parametrize(
    ("changes", "code", "option"),
    [
        ({"stages": [{**PRUNE, "ignore": ["*"]}, TUNE]}, "nothing_changed", "stages[0].ignore"),
        (
            {"stages": [PRUNE, {**TUNE, "patience": 1, "learning_rate": 1.0}]},
            "nothing_learned",
            "stages[1].learning_rate",
        ),
    ],
)
def test_what_goes_wrong_inside_is_named_there(
    changes: dict[str, Any], code: str, option: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        compressed(tmp_path / "work", model, recipe_of({**PRUNE, "sparsity": 0.1}, rounds(**changes)))
    assert (caught.value.code, caught.value.param) == (code, f"recipe.stages[1].{option}")


def test_a_target_that_was_reached_before_is_named_inside() -> None:
    with pytest.raises(ValidationError, match=r"stages\[0\] leaves 0.6 of the weights zero already") as caught:
        Recipe.model_validate(recipe_of(PRUNE, rounds(stages=[{**PRUNE, "sparsity": 0.5}, TUNE])))
    [error] = caught.value.errors()
    assert error["ctx"]["error"].param == "stages[1].stages[0].sparsity"


def test_text_is_asked_for(model: Path) -> None:
    with pytest.raises((RecipeError, ValueError), match="trains and needs text"):
        Recipe.model_validate({"stages": [rounds()]})


def test_the_model_of_an_earlier_stage_is_not_touched(model: Path, tmp_path: Path) -> None:
    before = load_file(model / "model.safetensors")
    compressed(tmp_path / "work", model, recipe_of(rounds(rounds=1)))
    assert all(torch.equal(before[name], each) for name, each in load_file(model / "model.safetensors").items())
