"""One matrix for the embedding and the head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import write_tiny_model
from tests.workers.attempts import certified, compressed, fetched
from tests.workers.techniques.small_tokenizers import logits_of, opened
from workers.architectures import ARCHITECTURES, Task
from workers.errors import UserError
from workers.pipeline import compress

IDS = list(range(5, 80))
UNTIED: dict[str, Any] = {"intermediate_size": 128, "tie_word_embeddings": False, "scale": 4.0}
MODELS: dict[str, tuple[Task, dict[str, Any]]] = {
    "llama": ("causal", {}),
    "gemma3_text": ("causal", {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16}),
    "gpt2": ("causal", {}),
    "gpt_neox": ("causal", {}),
    "opt": ("causal", {"ffn_dim": 128, "word_embed_proj_dim": 32}),
    "bert": ("masked", {}),
    "roberta": ("masked", {}),
    "distilbert": ("masked", {"dim": 64, "hidden_dim": 128, "n_heads": 4}),
}


def stage(keep: str) -> dict[str, Any]:
    return {"stages": [{"technique": "tie_embeddings", "keep": keep}]}


@pytest.mark.parametrize("keep", ["mean", "embedding", "head"])
@pytest.mark.parametrize("model_type", MODELS)
@torch.inference_mode()
def test_the_result_is_the_original_with_one_matrix(model_type: str, keep: str, tmp_path: Path) -> None:
    task, config = MODELS[model_type]
    write_tiny_model(tmp_path / "model", model_type, task=task, **{**UNTIED, **config})
    attempt = certified(tmp_path / "work", tmp_path / "model", stage(keep))
    model, _ = opened(tmp_path / "model", task)
    before, after = (model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone())
    wanted = {"mean": ((before + after) / 2).bfloat16().float(), "embedding": before, "head": after}[keep]
    model.get_input_embeddings().weight.copy_(wanted)
    model.get_output_embeddings().weight.copy_(wanted)
    found, _ = opened(attempt.artifact, task)
    assert found.get_input_embeddings().weight is found.get_output_embeddings().weight
    torch.testing.assert_close(logits_of(found, IDS), logits_of(model, IDS), rtol=1e-4, atol=1e-4)
    row, metrics = ARCHITECTURES[model_type, task], attempt.report["stages"][0]["metrics"]
    names = load_file(attempt.artifact / "model.safetensors").keys()
    assert {f"{row.embedding}.weight", f"{row.head}.weight"} & set(names) == {f"{row.embedding}.weight"}
    lost = metrics["original_num_parameters"] - metrics["num_parameters"]
    # Where an untied head has a bias beside the one that a tied head has, that goes too.
    assert lost - before.numel() in ({0} if row.tied_bias is None else {0, before.shape[0]})
    assert attempt.report["size"]["artifact_parameters"] == sum(each.numel() for each in found.parameters())
    cosine = torch.nn.functional.cosine_similarity(before, after).mean()
    assert metrics["cosine"] == pytest.approx(float(cosine), abs=1e-5)


def test_the_bias_that_an_untied_head_adds_stays_its_own(tmp_path: Path) -> None:
    """A checkpoint has two biases for BERT's head: the untied one's, and the one that a tied head would have."""
    write_tiny_model(tmp_path / "model", "bert", task="masked", **UNTIED)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["cls.predictions.decoder.bias"] = torch.linspace(-3, 3, 384).bfloat16()
    save_file(tensors, path, metadata={"format": "pt"})
    attempt = compressed(tmp_path / "work", tmp_path / "model", stage("head"))
    stored = load_file(attempt.artifact / "model.safetensors")
    model, _ = opened(tmp_path / "model", "masked")
    assert torch.equal(stored["cls.predictions.bias"].float(), model.get_output_embeddings().bias)


def test_other_stages_follow_on_the_one_matrix(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", "llama", **{**UNTIED, "num_hidden_layers": 3})
    stages = [
        {"technique": "tie_embeddings"},
        {"technique": "vocabulary_pruning", "min_count": 20},
        {"technique": "depth_pruning", "num_blocks": 1},
        {"technique": "round_to_nearest", "group_size": 32, "embeddings": True},
    ]
    attempt = certified(tmp_path / "work", tmp_path / "model", {"stages": stages})
    config = json.loads((attempt.artifact / "config.json").read_text())
    assert config["tie_word_embeddings"]
    assert config["vocab_size"] < 384
    names = load_file(attempt.artifact / "model.safetensors").keys()
    assert not [name for name in names if name.startswith("lm_head")]


def test_a_source_of_codes_is_tied_by_what_they_stand_for(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", "llama", **UNTIED)
    rounded = {"technique": "round_to_nearest", "group_size": 32, "embeddings": True}
    source = certified(tmp_path / "coded", tmp_path / "model", {"stages": [rounded]}).artifact
    attempt = compressed(tmp_path / "work", source, stage("mean"))
    model, _ = opened(source, "causal")
    wanted = (model.get_input_embeddings().weight + model.get_output_embeddings().weight) / 2
    found = load_file(attempt.artifact / "model.safetensors")["model.embed_tokens.weight"]
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "task", "config", "code"),
    [
        ("llama", "causal", {"tie_word_embeddings": True}, "nothing_changed"),
        ("opt", "causal", {"ffn_dim": 128, "word_embed_proj_dim": 64}, "nothing_changed"),
        ("bert", "classification", {}, "unsupported_task"),
    ],
)
def test_what_has_no_second_matrix_is_refused(
    model_type: str, task: Task, config: dict[str, Any], code: str, tmp_path: Path
) -> None:
    write_tiny_model(tmp_path / "model", model_type, task=task, **{"intermediate_size": 128, **config})
    attempt = fetched(tmp_path / "work", tmp_path / "model", stage("mean"))
    with pytest.raises(UserError) as caught:
        compress(attempt.work, attempt.request, attempt.events.append)
    assert (caught.value.code, caught.value.param) == (code, "recipe.stages[0].technique")
