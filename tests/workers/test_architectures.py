"""Every technique on every architecture: certification compares the reopened artifact's logits with the engine's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import write_tiny_model
from tests.workers.attempts import certified
from workers.architectures import ARCHITECTURES, Task

KV = {"num_key_value_heads": 2, "intermediate_size": 128}
ENCODER = {"intermediate_size": 128, "scale": 8.0}  # post-norms would hide what small linear layers do
DISTILBERT = {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "scale": 8.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": KV,
    "mistral": {**KV, "sliding_window": 16},
    "qwen2": KV,
    "qwen3": {**KV, "head_dim": 32},
    "gemma3_text": {**KV, "head_dim": 16, "sliding_window": 16},
    "phi3": KV,
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt_neox": {"intermediate_size": 128},
    "gpt2": {},
    "mamba": {"scale": 4.0},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 2, "state_size": 16, "chunk_size": 32},
}
# Layers of the usual spread would change the logits of a model whose norms come after them by less than their rounding.
OPT_350M = {"ffn_dim": 128, "word_embed_proj_dim": 32, "do_layer_norm_before": False, "init_std": 0.1}
ENCODER_CONFIGS: dict[str, dict[str, Any]] = {"bert": ENCODER, "roberta": ENCODER, "distilbert": DISTILBERT}
VARIANTS: dict[str, tuple[str, Task, dict[str, Any]]] = {
    **{name: (name, "causal", config) for name, config in CONFIGS.items()},
    "llama-untied": ("llama", "causal", {**KV, "tie_word_embeddings": False}),
    "llama-bias": ("llama", "causal", {**KV, "attention_bias": True, "mlp_bias": True}),
    "opt-350m": ("opt", "causal", OPT_350M),
    "gpt_neox-serial": ("gpt_neox", "causal", {"intermediate_size": 128, "use_parallel_residual": False}),
    **{f"{name}-masked": (name, "masked", config) for name, config in ENCODER_CONFIGS.items()},
    **{
        f"{name}-classes": (name, "classification", {**config, "num_labels": 3})
        for name, config in ENCODER_CONFIGS.items()
    },
    "bert-untied": ("bert", "masked", {**ENCODER, "tie_word_embeddings": False}),
    "roberta-untied": ("roberta", "masked", {**ENCODER, "tie_word_embeddings": False}),
    "bert-chunked": ("bert", "classification", {**ENCODER, "chunk_size_feed_forward": 1}),
}
# The rest of the tests run on Llamas, and these go the same ways.
LIKE_OTHERS = {
    "llama", "llama-untied", "llama-bias", "qwen2", "gpt_neox-serial",
    "mamba2", "roberta-classes", "distilbert-masked", "bert-untied", "roberta-untied", "bert-chunked",
}  # fmt: skip
SPARSE_INT4: list[dict[str, Any]] = [
    {"technique": "sparsegpt", "sparsity": 0.3},
    {"technique": "gptq", "scheme": "W4A16", "group_size": 32},
]
SMOOTH: list[dict[str, Any]] = [{"technique": "smoothquant"}]
EACH: list[dict[str, Any]] = [
    {"technique": "round_to_nearest", "scheme": "W8A16", "group_size": None},
    {"technique": "round_to_nearest", "scheme": "W4A16", "group_size": 32, "symmetric": False},
    {"technique": "gptq", "scheme": "W4A16", "group_size": 32},
    {"technique": "magnitude", "sparsity": 0.5},
    {"technique": "wanda", "mask_structure": "2:4"},
    {"technique": "sparsegpt", "sparsity": 0.5},
    {"technique": "awq", "scheme": "W4A16", "group_size": 32},
    {"technique": "dynamic_int8"},
    {"technique": "round_to_nearest", "scheme": "FP8"},
    {"technique": "round_to_nearest", "scheme": "NF4"},
    {"technique": "gptq", "scheme": "W3A16", "group_size": 32},
    {"technique": "round_to_nearest", "scheme": "W4A16", "group_size": 32, "embeddings": True},
]


def test_every_architecture_is_tried() -> None:
    assert {(model_type, task) for model_type, task, _ in VARIANTS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize(
    "stages",
    [
        SPARSE_INT4,
        SMOOTH,
        *(pytest.param([stage], marks=pytest.mark.long, id=" ".join(map(str, stage.values()))) for stage in EACH),
    ],
)
@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.long] if name in LIKE_OTHERS else []) for name in VARIANTS]
)
def test_a_result_gives_the_logits_that_were_computed(
    variant: str, stages: list[dict[str, Any]], tmp_path: Path
) -> None:
    model_type, task, config = VARIANTS[variant]
    row = ARCHITECTURES[model_type, task]
    recipe: dict[str, Any] = {"stages": stages}
    has_words = any(stage.get("scheme") in ("W4A16", "W8A16") for stage in stages)
    if not row.opens_packed and has_words:
        recipe["output"] = {"format": "safetensors"}
    if row.is_transposed and stages[0].get("scheme") != "NF4":
        recipe["output"] = {"format": "safetensors"}
        if stages[0]["technique"] in ("smoothquant", "dynamic_int8") or stages[0].get("scheme") == "FP8":
            pytest.skip("a format without codes cannot say that activations are quantized")
    write_tiny_model(tmp_path / "model", model_type, task=task, **config)
    attempt = certified(tmp_path / "work", tmp_path / "model", recipe)
    layers = attempt.report["stages"][0]["layers"]
    assert len([name for name in layers if name.startswith(row.blocks)]) == 2 * len(row.linear_layers)
    assert set(layers) - {name for name in layers if name.startswith(row.blocks)} <= set(row.vocabulary_matrices)
    quality = attempt.report["quality"]
    assert quality["perplexity"] is None if task == "classification" else quality["perplexity"] > 1
    assert quality["kl_divergence"] > 0


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.long] if name in LIKE_OTHERS else []) for name in VARIANTS]
)
def test_the_loader_of_an_archive_opens_it(variant: str, tmp_path: Path) -> None:
    model_type, task, config = VARIANTS[variant]
    write_tiny_model(tmp_path / "model", model_type, task=task, **config)
    recipe = {"stages": [{"technique": "magnitude", "sparsity": 0.5}], "output": {"format": "sparse-bitmask"}}
    attempt = certified(tmp_path / "work", tmp_path / "model", recipe)
    assert attempt.report["size"]["compression_ratio"] > 1


def test_a_checkpoint_of_the_bare_body_with_its_old_buffers_is_read(tmp_path: Path) -> None:
    """As the first GPT-2 is stored: names without their prefix, and masks beside the weights."""
    write_tiny_model(tmp_path / "model", "gpt2")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones((1, 1, 8, 8), dtype=torch.bool)
    save_file(bare, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    recipe = {"stages": [{"technique": "wanda", "sparsity": 0.5}]}
    attempt = certified(tmp_path / "work", tmp_path / "model", recipe)
    stored = load_file(attempt.artifact / "model.safetensors")
    assert set(stored) == set(tensors)
    assert attempt.outcome["result"]["original_size_bytes"] == sum(
        tensor.numel() * tensor.element_size() for tensor in tensors.values()
    )
