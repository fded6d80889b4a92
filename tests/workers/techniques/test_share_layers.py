"""Blocks that share parameters: stored once, trained as one, and computed with as if each had its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from tests.models import write_tiny_model
from tests.workers.attempts import TEXTS, Attempt, certified
from workers.errors import UserError
from workers.formats import load_compact
from workers.recipe import Recipe
from workers.shapes import config_after

PAIRS: dict[str, Any] = {"technique": "share_layers", "group_size": 2}
SMALL = {"evaluation": {"dataset": {"texts": TEXTS[150:]}, "num_tokens": 128, "max_seq_length": 64}}
TRAINING = {"training": {"dataset": {"texts": TEXTS[:60]}}}
TUNE = {"technique": "fine_tuning", "num_steps": 3, "batch_size": 4, "max_seq_length": 32, "learning_rate": 3e-3}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3, "hidden_size": 64}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("roots")
    sizes: dict[str, Any] = {"num_hidden_layers": 3, "scale": 4.0}
    write_tiny_model(folder / "llama", "llama", **sizes, num_key_value_heads=2, intermediate_size=128)
    write_tiny_model(folder / "gpt2", "gpt2", **sizes)
    write_tiny_model(folder / "bert", "bert", task="masked", **sizes, intermediate_size=128)
    return {name: folder / name for name in ("llama", "gpt2", "bert")}


@pytest.fixture(scope="module")
def llama(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    """Blocks 0 and 1 have those of 0; certification holds the logits against the engine's."""
    return certified(tmp_path_factory.mktemp("works") / "llama", models["llama"], {"stages": [PAIRS], **SMALL})


@torch.inference_mode()
def logits_of(model: Any, attempt: Attempt) -> Tensor:
    logits: Tensor = model(input_ids=load_file(attempt.work / "probe.safetensors")["input_ids"]).logits
    return logits


def test_a_group_has_the_parameters_of_its_first_block(models: dict[str, Path], llama: Attempt) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32)
    model.model.layers[1].load_state_dict(model.model.layers[0].state_dict())
    found = load_compact.load_model(llama.artifact, dtype=torch.float32)
    torch.testing.assert_close(logits_of(found, llama), logits_of(model, llama), rtol=1e-4, atol=1e-4)
    stored = load_file(llama.artifact / load_compact.WEIGHTS)
    assert not [name for name in stored if name.startswith("model.layers.1.")]
    shared = zip(found.model.layers[0].parameters(), found.model.layers[1].parameters(), strict=True)
    assert all(first is other for first, other in shared)
    size, [stage] = llama.report["size"], llama.report["stages"]
    assert size["artifact_parameters"] == sum(each.numel() for each in found.parameters())
    assert size["artifact_parameters"] == sum(each.numel() for each in stored.values())
    assert stage["metrics"]["groups"] == [[0, 1]]
    assert stage["metrics"]["num_stored_blocks"] == 2
    assert "load_compact" in llama.report["load_snippet"]


def test_the_mean_of_a_group_in_any_order(models: dict[str, Path], tmp_path: Path) -> None:
    stage = {"technique": "share_layers", "groups": [[2, 0]], "method": "mean"}
    attempt = certified(tmp_path / "work", models["bert"], {"stages": [stage], **SMALL})
    model: Any = AutoModelForMaskedLM.from_pretrained(models["bert"], dtype=torch.float32)
    blocks = model.bert.encoder.layer
    with torch.no_grad():
        for first, other in zip(blocks[0].parameters(), blocks[2].parameters(), strict=True):
            first.copy_(((first + other) / 2).bfloat16())
            other.copy_(first)
    found = load_compact.load_model(attempt.artifact, dtype=torch.float32)
    torch.testing.assert_close(logits_of(found, attempt), logits_of(model, attempt), rtol=1e-4, atol=1e-4)


def test_what_is_shared_is_trained_as_one_and_rounded_once(models: dict[str, Path], tmp_path: Path) -> None:
    nf4 = {"technique": "round_to_nearest", "scheme": "NF4", "group_size": 32}
    recipe = {"stages": [PAIRS, TUNE, nf4], **TRAINING, **SMALL}
    attempt = certified(tmp_path / "work", models["gpt2"], recipe)
    stored = load_file(attempt.artifact / load_compact.WEIGHTS)
    assert not [name for name in stored if name.startswith("transformer.h.1.")]
    _, training, rounding = attempt.report["stages"]
    assert training["metrics"]["held_out_loss"] < training["metrics"]["original_held_out_loss"]
    assert {name.split(".")[2] for name in rounding["layers"]} == {"0", "2"}


def test_a_later_job_trains_and_packs_what_is_shared(llama: Attempt, tmp_path: Path) -> None:
    packed = {"technique": "round_to_nearest", "scheme": "W4A16", "group_size": 32}
    attempt = certified(tmp_path / "work", llama.artifact, {"stages": [TUNE, packed], **TRAINING, **SMALL})
    stored = load_file(attempt.artifact / load_compact.WEIGHTS)
    packed_in = {name.split(".")[2] for name in stored if name.endswith("weight_packed")}
    assert packed_in == {"0", "2"}
    before = load_file(llama.artifact / load_compact.WEIGHTS)
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(stored[norm], before[norm])


@pytest.mark.parametrize(
    ("stages", "code", "param"),
    [
        ([PAIRS, {"technique": "gptq"}], "stages_conflict", "recipe.stages[1].technique"),
        ([PAIRS, {"technique": "wanda"}], "stages_conflict", "recipe.stages[1].technique"),
        ([PAIRS, {"technique": "magnitude", "allocation": "error"}], "stages_conflict", "recipe.stages[1].technique"),
        ([PAIRS, {"technique": "depth_pruning", "num_blocks": 1}], "stages_conflict", "recipe.stages[1].technique"),
        ([PAIRS, {"technique": "quantization_aware_finetuning", "num_steps": 1}], "stages_conflict", "recipe"),
        ([{**PAIRS, "group_size": None, "groups": [[0, 3]]}], "invalid_value", "recipe.stages[0].groups"),
    ],
)  # fmt: skip
def test_what_a_shared_model_cannot_go_through_is_refused(stages: list[dict[str, Any]], code: str, param: str) -> None:
    recipe = Recipe.model_validate({"stages": stages, **TRAINING})
    with pytest.raises(UserError) as caught:
        config_after(recipe.stages, LLAMA)
    assert caught.value.code == code
    assert str(caught.value.param).startswith(param)


@pytest.mark.parametrize(
    "config",
    [
        {
            "model_type": "gemma3_text",
            "architectures": ["Gemma3ForCausalLM"],
            "num_hidden_layers": 2,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_layer": 2,
            "scale_attn_by_inverse_layer_idx": True,
        },
    ],
    ids=["kinds", "scaled"],
)
def test_blocks_that_do_different_things_with_the_same_parameters_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        config_after(Recipe.model_validate({"stages": [PAIRS]}).stages, config)
    assert caught.value.code == "unsupported_architecture"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "group_size or groups must be given"),
        ({"group_size": 2, "groups": [[0, 1]]}, "and not both"),
        ({"groups": [[0, 1], [1, 2]]}, "must name each block once"),
        ({"groups": [[0]]}, "at least 2 items"),
        ({"group_size": 1}, "greater than or equal to 2"),
    ],
)
def test_groups_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({"stages": [{"technique": "share_layers", **options}]})
    assert said in str(caught.value)
