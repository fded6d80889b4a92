"""NF4 in the form of bitsandbytes: what is written, and what plain transformers makes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.models import write_tiny_llama, write_tiny_model
from tests.workers.attempts import certified, compressed, fetched
from workers.errors import UserError
from workers.formats import bitsandbytes
from workers.solvers.quantization import Grid, QuantizedWeight, quantize_to_normal_float

NF4 = {"technique": "round_to_nearest", "scheme": "NF4"}


def quantized(*, double_quant: bool, group_size: int = 64) -> QuantizedWeight:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    grid = Grid(4, group_size, symmetric=True, is_normal=True)
    return quantize_to_normal_float(weight, grid, double_quant=double_quant)


@pytest.mark.parametrize("double_quant", [True, False])
def test_what_is_written_is_read_back_by_us_and_by_bitsandbytes(double_quant: bool) -> None:
    wanted = quantized(double_quant=double_quant)
    encoded = bitsandbytes.encode(wanted, torch.bfloat16)
    assert torch.equal(bitsandbytes.decode(encoded, wanted.grid), wanted.dequantize())
    state = functional.QuantState.from_dict(
        {name.removeprefix("weight."): tensor for name, tensor in encoded.items() if name != "weight"},
        device=torch.device("cpu"),
    )
    assert (state.blocksize, state.dtype, state.nested) == (64, torch.bfloat16, double_quant)
    state.dtype = torch.float32
    read = functional.dequantize_4bit(encoded["weight"], state)
    torch.testing.assert_close(read, wanted.dequantize(), rtol=1e-6, atol=1e-7)


def test_the_first_of_a_pair_is_the_upper_half_of_its_byte() -> None:
    codes = torch.arange(16, dtype=torch.int8).view(1, 16)
    scale = torch.ones(1, 1)
    weight = QuantizedWeight(codes, scale, torch.zeros(1, 1, dtype=torch.int8), Grid(4, 16, True, is_normal=True))
    assert bitsandbytes.encode(weight, torch.float16)["weight"].view(-1).tolist() == [
        0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "config", "layer"),
    [
        ("llama", {"hidden_size": 128, "intermediate_size": 256}, "model.layers.1.mlp.up_proj"),
        ("gpt2", {"hidden_size": 64}, "transformer.h.1.mlp.c_fc"),
    ],
)
def test_plain_transformers_opens_it_and_in_its_own_type_stays_near(
    model_type: str, config: dict[str, Any], layer: str, tmp_path: Path
) -> None:
    """As a user does: in the type of the checkpoint, on whatever way bitsandbytes has on this machine."""
    write_tiny_model(tmp_path / "model", model_type, **config)
    attempt = certified(tmp_path / "work", tmp_path / "model", {"stages": [NF4]})
    probe = load_file(attempt.work / "probe.safetensors")
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(attempt.artifact)
    assert model.dtype == torch.bfloat16
    coded = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert coded == set(attempt.report["stages"][0]["layers"])
    with torch.inference_mode():
        logits = model(input_ids=probe["input_ids"].view(1, -1)).logits[0].float()
    largest = float(probe["logits"].abs().max())
    assert float((logits - probe["logits"]).abs().max()) < 0.05 * largest
    assert model.dequantize().get_submodule(layer).weight.shape == (256, config["hidden_size"])


def test_it_is_no_source_for_another_job(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "model")
    first = compressed(tmp_path / "first", tmp_path / "model", {"stages": [NF4]})
    with pytest.raises(UserError) as caught:
        fetched(tmp_path / "again", first.artifact, {"stages": [NF4]})
    assert (caught.value.code, caught.value.param) == ("unsupported_quantization", "model.id")


def test_layers_that_it_cannot_read_everywhere_are_stored_in_full(tmp_path: Path) -> None:
    """80 columns hold no whole number of blocks; 80 rows are no multiple of 32."""
    write_tiny_llama(tmp_path / "model", hidden_size=64, intermediate_size=80)
    attempt = certified(tmp_path / "work", tmp_path / "model", {"stages": [NF4]})
    stored = load_file(attempt.artifact / "model.safetensors")
    for layer in ("gate_proj", "up_proj", "down_proj"):
        assert stored[f"model.layers.0.mlp.{layer}.weight"].dtype == torch.bfloat16
    assert stored["model.layers.0.self_attn.q_proj.weight"].dtype == torch.uint8
    stage = attempt.report["stages"][0]
    assert {each["code"] for each in stage["fallbacks"]} == {"shape"}
    assert len(stage["fallbacks"]) == 6
    config = json.loads((attempt.artifact / "config.json").read_text())["quantization_config"]
    assert {"lm_head", "model.layers.1.mlp.up_proj"} <= set(config["llm_int8_skip_modules"])
    assert not any(re.search("self_attn", name) for name in config["llm_int8_skip_modules"])


def test_as_plain_values_such_layers_have_a_block_a_row(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "model", hidden_size=64, intermediate_size=80)
    recipe = {"stages": [NF4], "output": {"format": "safetensors"}}
    attempt = certified(tmp_path / "work", tmp_path / "model", recipe)
    stage = attempt.report["stages"][0]
    assert stage["layers"]["model.layers.0.mlp.down_proj"]["group_size"] == 80
    assert {each["code"] for each in stage["fallbacks"]} == {"group_size"}
    weight = load_file(attempt.artifact / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert max(len(row.unique()) for row in weight) <= 16


def test_a_block_never_spans_rows(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "model", hidden_size=64, intermediate_size=96)
    attempt = certified(tmp_path / "work", tmp_path / "model", {"stages": [NF4]})
    sizes = {name: layer["group_size"] for name, layer in attempt.report["stages"][0]["layers"].items()}
    assert sizes["model.layers.0.mlp.up_proj"] == 64
    assert sizes["model.layers.0.mlp.down_proj"] == 32
    assert len(attempt.report["stages"][0]["fallbacks"]) == 2


def test_double_quantization_saves_bytes_and_says_so(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "model", hidden_size=256, intermediate_size=512)
    once, twice = (
        compressed(
            tmp_path / str(double_quant), tmp_path / "model", {"stages": [{**NF4, "double_quant": double_quant}]}
        )
        for double_quant in (False, True)
    )
    sizes = [(attempt.artifact / "model.safetensors").stat().st_size for attempt in (once, twice)]
    assert sizes[1] < sizes[0]
    for attempt, is_double in ((once, False), (twice, True)):
        config = json.loads((attempt.artifact / "config.json").read_text())["quantization_config"]
        assert config["bnb_4bit_use_double_quant"] is is_double
        assert config["bnb_4bit_compute_dtype"] == "bfloat16"
