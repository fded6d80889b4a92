"""Checkpoints that are odd or damaged in ways that only show while they are worked on: read, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.models import write_tiny_llama, write_tiny_model, write_tokenizer
from tests.workers.attempts import Attempt, certified, compressed, fetched
from workers.engine.checkpoint import Checkpoint
from workers.errors import JobError, UserError
from workers.pipeline import compress

GPTQ = {"technique": "gptq", "scheme": "W4A16", "group_size": 32}
NEAREST = {"technique": "round_to_nearest", "scheme": "W4A16", "group_size": 32}
INT8 = {"technique": "round_to_nearest", "scheme": "W8A16", "group_size": None}


def damage(attempt: Attempt, name: str, value: float) -> None:
    """Give the attempt a model of its own, with one weight changed behind the checks."""
    link = attempt.work / "source" / "model" / "model.safetensors"
    tensors = load_file(link)
    tensors[name].view(-1)[0] = value
    link.unlink()
    save_file(tensors, link, {"format": "pt"})


def test_settings_that_generate_stumbles_over_are_left_out_and_it_is_said(tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    (model / "generation_config.json").write_text('{"do_sample": true, "temperature": -3.0, "top_p": 50}')
    attempt = certified(tmp_path / "work", model, {"stages": [INT8]})
    assert "generation_config_dropped" in [event.get("code") for event in attempt.events]
    loaded: Any = AutoModelForCausalLM.from_pretrained(attempt.artifact)
    assert loaded.generate(torch.tensor([[1, 2]]), max_new_tokens=2).shape[1] <= 4


@pytest.mark.parametrize(("name", "is_dropped"), [("inv_freq", True), ("foo", False)])
def test_only_buffers_that_the_model_computes_itself_are_dropped(
    name: str, is_dropped: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tensors = load_file(model / "model.safetensors")
    tensors[f"model.layers.0.self_attn.rotary_emb.{name}"] = torch.ones(8)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    if is_dropped:
        attempt = certified(tmp_path / "work", model, {"stages": [INT8]})
        assert not any("rotary" in key for key in load_file(attempt.artifact / "model.safetensors"))
        return
    with pytest.raises(UserError) as caught:
        compressed(tmp_path / "work", model, {"stages": [INT8]})
    assert caught.value.code == "checkpoint_mismatch"


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("model.layers.1.mlp.up_proj.weight", float("nan"), "non_finite_weights"),
        ("model.embed_tokens.weight", float("inf"), "non_finite_weights"),
        ("model.layers.0.input_layernorm.weight", 3e38, "non_finite_activations"),
    ],
)
def test_numbers_that_are_not_finite_end_a_job_by_name(
    name: str, value: float, code: str, tiny_llama: Path, tmp_path: Path
) -> None:
    attempt = fetched(tmp_path / "work", tiny_llama, {"stages": [GPTQ]})
    damage(attempt, name, value)
    with pytest.raises(JobError) as caught:
        compress(attempt.work, attempt.request, attempt.events.append)
    assert caught.value.code == code
    assert not attempt.artifact.exists()


def test_a_model_that_changes_during_the_job_ends_it(tmp_path: Path) -> None:
    model = tmp_path / "changing"
    write_tiny_llama(model)
    attempt = fetched(tmp_path / "work", model, {"stages": [NEAREST]})
    write_tiny_llama(model, seed=1)
    with pytest.raises(UserError) as caught:
        compress(attempt.work, attempt.request, attempt.events.append)
    assert caught.value.code == "model_changed"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"hidden_act": "boom"}, "invalid_config"),
        ({"rms_norm_eps": "a"}, "invalid_config"),
        ({"num_key_value_heads": 0}, "invalid_config"),
        ({"pad_token_id": 99_999}, "invalid_config"),
        ({"head_dim": 8}, "checkpoint_mismatch"),
        ({"num_hidden_layers": 1}, "checkpoint_mismatch"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "non_finite_activations"),
    ],
)
def test_a_config_that_does_not_describe_the_weights_is_the_users_to_mend(
    changes: dict[str, Any], code: str, tiny_llama: Path, tmp_path: Path
) -> None:
    attempt = fetched(tmp_path / "work", tiny_llama, {"stages": [NEAREST]})
    path = attempt.work / "source" / "model" / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.unlink()
    path.write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        compress(attempt.work, attempt.request, attempt.events.append)
    assert caught.value.code == code


def test_a_tensor_without_a_place_is_refused_before_anything_is_computed(tiny_llama: Path, tmp_path: Path) -> None:
    attempt = fetched(tmp_path / "work", tiny_llama, {"stages": [NEAREST]})
    link = attempt.work / "source" / "model" / "model.safetensors"
    tensors = {**load_file(link), "model.layers.0.extra.weight": torch.zeros(2)}
    link.unlink()
    save_file(tensors, link, {"format": "pt"})
    with pytest.raises(UserError) as caught:
        compress(attempt.work, attempt.request, attempt.events.append)
    assert caught.value.code == "checkpoint_mismatch"
    assert not (attempt.work / "parts").exists()


def test_two_names_of_one_parameter_are_refused(tmp_path: Path) -> None:
    model = tmp_path / "gpt2"
    write_tiny_model(model, "gpt2")
    tensors = load_file(model / "model.safetensors")
    tensors["h.0.mlp.c_fc.weight"] = 2 * tensors["transformer.h.0.mlp.c_fc.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError) as caught:
        fetched(tmp_path / "work", model, {"stages": [{"technique": "magnitude"}]})
    assert (caught.value.code, caught.value.param) == ("checkpoint_mismatch", "model.id")
    assert "h.0.mlp.c_fc.weight" in caught.value.message


def test_a_tied_head_that_is_another_matrix_is_refused(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"].clone()
    head[0, 0] += 1
    save_file({**tensors, "lm_head.weight": head}, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"ties the head to the embedding") as raised:
        compressed(tmp_path / "work", tmp_path / "model", {"stages": [INT8]})
    assert raised.value.code == "checkpoint_mismatch"


def test_a_tied_head_that_is_stored_twice_counts_once(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    twice = certified(tmp_path / "twice", tmp_path / "model", {"stages": [INT8]}).report["size"]
    once = certified(tmp_path / "once", tiny_llama, {"stages": [INT8]}).report["size"]
    for key in ("original_parameters", "original_bytes", "artifact_bytes", "compression_ratio"):
        assert twice[key] == once[key]


def test_sizes_that_only_the_config_claims_are_refused_before_anything_is_computed(
    tiny_llama: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "head_dim": 2**16}))
    with pytest.raises(UserError, match="calls for") as raised:
        compressed(tmp_path / "work", tmp_path / "model", {"stages": [INT8]})
    assert raised.value.code == "checkpoint_mismatch"


def test_a_scale_without_codes_is_a_tensor_without_a_place(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    stray = {"model.layers.0.mlp.down_proj.weight_scale": torch.ones(1)}
    save_file({**load_file(path), **stray}, path, {"format": "pt"})
    with pytest.raises(UserError) as raised:
        compressed(tmp_path / "work", tmp_path / "model", {"stages": [INT8]})
    assert raised.value.code == "checkpoint_mismatch"


def test_the_models_own_generation_settings_change_no_speed(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "model")
    generation = tmp_path / "model" / "generation_config.json"
    settings = {"max_time": 0.0, "num_beams": 4, "stop_strings": ["\n\n"]}
    generation.write_text(json.dumps({**json.loads(generation.read_text()), **settings}))
    attempt = certified(tmp_path / "work", tmp_path / "model", {"stages": [INT8]})
    for side in ("original", "artifact"):
        assert 0 < attempt.report["speed"][side]["tokens_per_second"] < 100_000


def test_a_tokenizer_of_another_model_is_the_users_to_mend(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "model", vocab_size=300)
    write_tokenizer(tmp_path / "model", 384)
    with pytest.raises(UserError) as raised:
        certified(tmp_path / "work", tmp_path / "model", {"stages": [INT8]})
    assert raised.value.code == "model_unusable"


def test_untied_heads_are_kept(tmp_path: Path) -> None:
    model = tmp_path / "untied"
    write_tiny_llama(model, tie=False)
    attempt = certified(tmp_path / "work", model, {"stages": [INT8]})
    with safe_open(attempt.artifact / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" in file.keys()  # noqa: SIM118


def test_a_checkpoint_in_shards_reads_like_one_in_a_piece(tiny_llama: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    one, many = Checkpoint(tiny_llama), Checkpoint(sharded)
    assert one.names() == many.names()
    assert all(torch.equal(one.parameter(name), many.parameter(name)) for name in one.parameters())
