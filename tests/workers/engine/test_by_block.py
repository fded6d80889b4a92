"""A model that is opened by block is the model that transformers opens whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import write_tiny_model
from tests.workers.attempts import compressed
from tests.workers.test_architectures import VARIANTS
from workers.engine.by_block import ByBlock
from workers.errors import UserError
from workers.formats.opening import open_checkpoint

CPU = torch.device("cpu")
GENEROUS_BYTES = 1 << 20
INT4 = {"technique": "round_to_nearest", "scheme": "W4A16", "group_size": 32}
EACH: dict[str, dict[str, Any]] = {
    "int4": {"stages": [{**INT4, "symmetric": False}]},
    "int4-embeddings": {"stages": [{**INT4, "embeddings": True}]},
    "int8": {"stages": [{"technique": "round_to_nearest", "scheme": "W8A16", "group_size": None}]},
    "w8a8": {"stages": [{"technique": "smoothquant", "ignore": ["*.0.self_attn.q_proj"]}]},
    "fp8": {"stages": [{"technique": "round_to_nearest", "scheme": "FP8"}]},
    "nf4": {"stages": [{"technique": "round_to_nearest", "scheme": "NF4"}]},
    "nf4-plain-scales": {
        "stages": [{"technique": "round_to_nearest", "scheme": "NF4", "double_quant": False, "group_size": 32}]
    },
    "mixed": {"stages": [{"technique": "mixed_precision", "average_bits": 5.0}]},
}


def logits_of(model: Any, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.inference_mode():
        waiting = model.read(batches, lambda _: None)
        return [*waiting(1), *waiting(len(batches) - 1)]


def assert_alike(folder: Path) -> None:
    whole, by_block = open_checkpoint(folder, CPU), ByBlock(folder, CPU, GENEROUS_BYTES)
    batches = [torch.randint(8, 300, (rows, 24), generator=torch.Generator().manual_seed(rows)) for rows in (1, 2, 1)]
    expected, found = logits_of(whole, batches), logits_of(by_block, batches)
    for one, other in zip(expected, found, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5 * float(one.abs().max()))
    assert all(parameter.is_meta for parameter in by_block._skeleton.model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_its_logits_are_those_of_the_whole_model(variant: str, tmp_path: Path) -> None:
    model_type, task, config = VARIANTS[variant]
    write_tiny_model(tmp_path, model_type, task=task, **config)
    assert_alike(tmp_path)


@pytest.mark.parametrize("recipe", EACH.values(), ids=EACH)
def test_an_artifact_is_decoded_as_its_loader_decodes_it(recipe: dict[str, Any], tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", "llama", num_key_value_heads=2, intermediate_size=128)
    assert_alike(compressed(tmp_path / "work", tmp_path / "model", recipe).artifact)


def test_codes_of_transposed_layers_are_decoded(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", "gpt2")
    assert_alike(compressed(tmp_path / "work", tmp_path / "model", EACH["nf4"]).artifact)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_it_generates_what_the_whole_model_generates(model_type: str, tmp_path: Path) -> None:
    write_tiny_model(tmp_path, model_type, **VARIANTS[model_type][2])
    ids = torch.randint(8, 300, (1, 12), generator=torch.Generator().manual_seed(0))
    texts = []
    for model in (open_checkpoint(tmp_path, CPU), ByBlock(tmp_path, CPU, GENEROUS_BYTES)):
        with model.running() as running:
            texts.append(running.generate(input_ids=ids, max_new_tokens=5, do_sample=False, repetition_penalty=1.2))
    assert texts[0].tolist() == texts[1].tolist()


def test_a_checkpoint_without_one_of_its_tensors_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_tiny_model(tmp_path, "llama", num_key_value_heads=2, intermediate_size=128)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors.*layers\.1\.mlp\.up_proj") as caught:
        ByBlock(tmp_path, CPU, GENEROUS_BYTES)
    assert caught.value.code == "checkpoint_mismatch"
