"""Where a job does something else than was asked, or nothing at all: what it leaves, says and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.models import write_tiny_llama, write_tiny_model
from tests.workers.attempts import TEXTS, certified, compressed, fetched
from workers.certify import certify
from workers.errors import UserError
from workers.pipeline import compress

GPTQ = {"technique": "gptq", "scheme": "W4A16", "group_size": 32}
NEAREST = {"technique": "round_to_nearest", "scheme": "W4A16", "group_size": 32}
INT8 = {"technique": "round_to_nearest", "scheme": "W8A16", "group_size": None}


def test_an_ignored_layer_takes_over_no_scale_either(tiny_llama: Path, tmp_path: Path) -> None:
    stage = {"technique": "awq", "scheme": "W4A16", "group_size": 32, "ignore": ["*.up_proj"]}
    attempt = compressed(tmp_path / "work", tiny_llama, {"stages": [stage]})
    before, after = load_file(tiny_llama / "model.safetensors"), load_file(attempt.artifact / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(before[name], after[name])
    fallbacks = json.loads((attempt.work / "compressed.json").read_text())["stages"][0]["fallbacks"]
    # The gate reads the same input, and the down-projection reads what the ignored layer makes.
    assert {each["layer"] for each in fallbacks if each["code"] == "input_scale"} == {
        f"model.layers.{block}.mlp.{layer}" for block in (0, 1) for layer in ("gate_proj", "down_proj")
    }


def test_ignored_layers_keep_their_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    attempt = compressed(tmp_path / "work", tiny_llama, {"stages": [{**NEAREST, "ignore": ["*.0.*", "*.down_proj"]}]})
    before, after = load_file(tiny_llama / "model.safetensors"), load_file(attempt.artifact / "model.safetensors")
    assert torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(before["model.layers.1.mlp.down_proj.weight"], after["model.layers.1.mlp.down_proj.weight"])
    assert "model.layers.1.mlp.up_proj.weight_packed" in after


@pytest.mark.parametrize("technique", ["magnitude", "wanda", "sparsegpt"])
def test_columns_that_a_mask_does_not_cover_are_said_and_not_counted(technique: str, tmp_path: Path) -> None:
    model = tmp_path / "uneven"
    write_tiny_llama(model, hidden_size=64, intermediate_size=96)
    stage = {"technique": technique, "mask_structure": "1:48"}
    attempt = certified(tmp_path / "work", model, {"stages": [stage]})
    report = attempt.report["stages"][0]
    assert report["layers"]["model.layers.0.mlp.down_proj"]["sparsity"] == pytest.approx(47 / 48)
    assert report["layers"]["model.layers.0.mlp.up_proj"]["sparsity"] == pytest.approx(48 / 64 * 47 / 48)
    fallbacks = {each["layer"]: each for each in report["fallbacks"]}
    assert "model.layers.0.mlp.down_proj" not in fallbacks
    assert fallbacks["model.layers.0.mlp.up_proj"]["code"] == "mask_structure"
    assert "16 of its 64 columns" in fallbacks["model.layers.0.mlp.up_proj"]["message"]


def test_a_size_that_divides_only_some_layers_falls_back_and_says_so(tmp_path: Path) -> None:
    model = tmp_path / "uneven"
    write_tiny_llama(model, hidden_size=64, intermediate_size=96)
    attempt = certified(tmp_path / "work", model, {"stages": [{**GPTQ, "group_size": 64}]})
    fallbacks = attempt.report["stages"][0]["fallbacks"]
    assert {each["layer"] for each in fallbacks} == {f"model.layers.{block}.mlp.down_proj" for block in (0, 1)}
    assert all("48" in each["message"] for each in fallbacks)


def write_float16_llama(folder: Path, scaled: dict[str, float]) -> None:
    """In float16, weights of ``scaled`` layers times a factor."""
    write_tiny_llama(folder)
    path = folder / "model.safetensors"
    tensors = {name: tensor.to(torch.float16) for name, tensor in load_file(path).items()}
    for name, factor in scaled.items():
        tensors[f"{name}.weight"] *= factor
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("stage", [INT8, {"technique": "dynamic_int8"}], ids=str)
def test_scales_that_float16_hardly_has_are_said(stage: dict[str, Any], tmp_path: Path) -> None:
    """The result is what was asked for as well as the type can, and is certified as such; the report says where."""
    layer = "model.layers.0.mlp.gate_proj"
    write_float16_llama(tmp_path / "model", {layer: 2.0**-11})
    attempt = certified(tmp_path / "work", tmp_path / "model", {"stages": [stage]})
    fallbacks = attempt.report["stages"][0]["fallbacks"]
    assert [(each["layer"], each["code"]) for each in fallbacks] == [(layer, "coarse_scales")]
    assert "of its 128 scales" in fallbacks[0]["message"]


@pytest.mark.parametrize("stage", [INT8, {**INT8, "scheme": "FP8"}], ids=str)
def test_weights_that_one_step_of_float16_gives_exactly_are_no_trouble(stage: dict[str, Any], tmp_path: Path) -> None:
    layer = "model.layers.0.mlp.gate_proj"
    write_float16_llama(tmp_path / "model", {layer: 2.0**-15})
    attempt = certified(tmp_path / "work", tmp_path / "model", {"stages": [stage]})
    assert attempt.report["stages"][0]["fallbacks"] == []


def test_coarse_scales_of_an_embedding_are_said_too(tmp_path: Path) -> None:
    write_float16_llama(tmp_path / "model", {"model.embed_tokens": 2.0**-13})
    attempt = certified(tmp_path / "work", tmp_path / "model", {"stages": [{**NEAREST, "embeddings": True}]})
    fallbacks = attempt.report["stages"][0]["fallbacks"]
    assert [(each["layer"], each["code"]) for each in fallbacks] == [("model.embed_tokens", "coarse_scales")]


@pytest.mark.parametrize("is_float16", [True, False])
def test_a_float16_model_has_even_codes_for_its_activations(is_float16: bool, tmp_path: Path) -> None:
    """In float16 a token's smallest value less its largest may be infinity, where certification has float32."""
    if is_float16:
        write_float16_llama(tmp_path / "model", {})
    else:
        write_tiny_llama(tmp_path / "model")
    attempt = certified(tmp_path / "work", tmp_path / "model", {"stages": [{"technique": "dynamic_int8"}]})
    config = json.loads((attempt.artifact / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["input_activations"]["symmetric"] == is_float16
    recipe = json.loads((attempt.artifact / "recipe.json").read_text())["recipe"]
    assert recipe["stages"][0]["symmetric_activations"] == is_float16
    warnings = [event["code"] for event in attempt.events if event["event"] == "warning"]
    assert ("even_activations" in warnings) == is_float16


def test_what_makes_nothing_smaller_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    first = certified(tmp_path / "first", tiny_llama, {"stages": [NEAREST]})
    (tmp_path / "roots").mkdir()
    first.artifact.rename(tmp_path / "roots" / "int4")
    attempt = compressed(tmp_path / "again", tmp_path / "roots" / "int4", {"stages": [INT8]})
    with pytest.raises(UserError, match="nothing was gained") as caught:
        certify(attempt.work, attempt.request, attempt.events.append)
    assert caught.value.code == "not_smaller"


@pytest.mark.parametrize(
    ("constraints", "violated"),
    [
        ({"max_perplexity_ratio": 100.0, "max_size_bytes": 10_000_000}, []),
        ({"max_perplexity_ratio": 0.5}, ["max_perplexity_ratio"]),
        ({"max_size_bytes": 1000, "min_accuracy": 0.9}, ["max_size_bytes"]),
    ],
)
def test_constraints_are_held_against_what_was_measured(
    constraints: dict[str, float], violated: list[str], tiny_llama: Path, tmp_path: Path
) -> None:
    # How large a bitmask's values are is known at the end alone; a limit that other formats cannot keep is refused.
    recipe = {"stages": [{"technique": "magnitude"}], "output": {"format": "sparse-bitmask"}}
    attempt = certified(tmp_path / "work", tiny_llama, recipe, constraints=constraints)
    assert [each["name"] for each in attempt.outcome["constraints_violated"]] == violated
    statuses = {each["name"]: each["status"] for each in attempt.report["constraints"]}
    assert statuses.get("min_accuracy", "not_applicable") == "not_applicable"


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])  # one computes its positions, one has stored them
def test_a_prompt_beyond_the_models_positions_ends_the_job_before_it_computes(model_type: str, tmp_path: Path) -> None:
    model = tmp_path / model_type
    write_tiny_model(model, model_type, max_position_embeddings=128)
    evaluation = {"dataset": {"texts": TEXTS}, "num_tokens": 512}
    stages = [{"technique": "magnitude"}]
    longest = _prompt_of(model, 128 - 31)
    attempt = compressed(tmp_path / "fits", model, {"stages": stages, "evaluation": {**evaluation, "prompt": longest}})
    certify(attempt.work, attempt.request, attempt.events.append)
    longer = _prompt_of(model, 128 - 30)
    attempt = fetched(tmp_path / "long", model, {"stages": stages, "evaluation": {**evaluation, "prompt": longer}})
    with pytest.raises(UserError, match="98 tokens") as caught:
        compress(attempt.work, attempt.request, attempt.events.append)
    assert (caught.value.code, caught.value.param) == ("prompt_too_long", "recipe.evaluation.prompt")
    assert caught.value.hint == "Shorten it to 97 tokens."
    assert not (attempt.work / "journal").exists()


def _prompt_of(model: Path, num_tokens: int) -> str:
    """A prompt of so many tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = "xyzq" * 4 * num_tokens
    return next(
        text[:end] for end in range(num_tokens, len(text)) if len(tokenizer(text[:end])["input_ids"]) == num_tokens
    )


@pytest.mark.parametrize(
    "stages",
    [
        [{**NEAREST, "ignore": ["*"]}],
        [{"technique": "magnitude", "sparsity": 0.5, "ignore": ["model.*"]}, NEAREST],
        [{"technique": "magnitude", "sparsity": 1e-9}],
        [{"technique": "magnitude", "allocation": "error", "ignore": ["*"]}],
    ],
)
def test_a_stage_that_changes_nothing_ends_the_job(
    stages: list[dict[str, Any]], tiny_llama: Path, tmp_path: Path
) -> None:
    attempt = fetched(tmp_path / "work", tiny_llama, {"stages": stages})
    with pytest.raises(UserError) as caught:
        compress(attempt.work, attempt.request, attempt.events.append)
    assert caught.value.code == "nothing_changed"
    assert not attempt.artifact.exists()


@pytest.mark.parametrize("group_size", [64, 32])
def test_rounding_to_values_that_are_there_already_ends_the_job(
    group_size: int, tiny_llama: Path, tmp_path: Path
) -> None:
    rounding = {"technique": "round_to_nearest", "scheme": "NF4", "group_size": 64, "double_quant": False}
    output = {"format": "safetensors"}
    first = compressed(tmp_path / "first", tiny_llama, {"stages": [rounding], "output": output})
    (tmp_path / "roots").mkdir()
    first.artifact.rename(tmp_path / "roots" / "nf4")
    recipe = {"stages": [{**rounding, "group_size": group_size}], "output": output}
    attempt = fetched(tmp_path / "again", tmp_path / "roots" / "nf4", recipe)
    if group_size == 32:  # half a block may have another largest value
        compress(attempt.work, attempt.request, attempt.events.append)
        return
    with pytest.raises(UserError, match="had before") as caught:
        compress(attempt.work, attempt.request, attempt.events.append)
    assert (caught.value.code, caught.value.param) == ("nothing_changed", "recipe.stages[0]")
    assert not attempt.artifact.exists()
    # Codes are smaller than the values: that is a change.
    compressed(tmp_path / "codes", tmp_path / "roots" / "nf4", {"stages": [rounding]})


def test_pruning_what_is_pruned_already_ends_the_job(tiny_llama: Path, tmp_path: Path) -> None:
    pruning = {"technique": "magnitude", "mask_structure": "2:4"}
    first = certified(tmp_path / "first", tiny_llama, {"stages": [pruning]})
    (tmp_path / "roots").mkdir()
    first.artifact.rename(tmp_path / "roots" / "sparse")
    attempt = fetched(tmp_path / "again", tmp_path / "roots" / "sparse", {"stages": [pruning]})
    with pytest.raises(UserError) as caught:
        compress(attempt.work, attempt.request, attempt.events.append)
    assert caught.value.code == "nothing_changed"


def test_patterns_that_name_no_layer_are_said(tiny_llama: Path, tmp_path: Path) -> None:
    stage = {**NEAREST, "ignore": ["*.donw_proj", "lm_head", "model.layers.0.*"]}
    attempt = compressed(tmp_path / "work", tiny_llama, {"stages": [stage]})
    (warning,) = (event for event in attempt.events if event.get("code") == "ignores_nothing")
    assert warning["param"] == "recipe.stages[0].ignore"
    assert warning["message"].startswith("1 of the patterns")
    assert "*.donw_proj" in warning["message"]


def test_short_calibration_text_is_used_and_said(tiny_llama: Path, tmp_path: Path) -> None:
    short = {"dataset": {"texts": ["Language models are made smaller by pruning."]}, "num_samples": 8}
    attempt = certified(tmp_path / "work", tiny_llama, {"stages": [GPTQ], "calibration": short})
    assert "short_calibration" in {event.get("code") for event in attempt.events}


def test_a_result_that_is_larger_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    first = compressed(tmp_path / "first", tiny_llama, {"stages": [NEAREST]})
    (tmp_path / "roots").mkdir()
    shutil.copytree(first.artifact, tmp_path / "roots" / "int4")
    again = certified(tmp_path / "again", tmp_path / "roots" / "int4", {"stages": [{"technique": "magnitude"}]})
    codes = [event["code"] for event in again.events if event["event"] == "warning"]
    assert "larger_than_original" in codes
    assert "times smaller" not in (again.artifact / "README.md").read_text()
