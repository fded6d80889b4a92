"""bitsandbytes' 4-bit form: NF4 codes in pairs, with their scales, as transformers reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from workers.solvers.normal_float import NF4, SCALES_PER_BLOCK, QuantizedScales, dynamic8
from workers.solvers.quantization import Grid, QuantizedWeight

# The tensor whose bytes are JSON: what of a weight's quantization is no tensor. Its name says which type of 4 bits.
_STATE = "weight.quant_state.bitsandbytes__nf4"
_COMPUTE_DTYPES = (torch.float16, torch.bfloat16)


def encode(quantized: QuantizedWeight, stored_dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that stand for one layer's weight, by their names within the layer.

    ``stored_dtype`` is the checkpoint's: what dequantizing gives, where nobody asks for another type.
    """
    codes = quantized.codes.to(torch.uint8).view(-1)
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": quantized.grid.group_size,
        "dtype": compute_dtype(stored_dtype),
        "shape": list(quantized.codes.shape),
    }
    # The first of a pair is the upper half of its byte.
    encoded = {"weight": (codes[0::2] << 4 | codes[1::2]).view(-1, 1), "weight.quant_map": NF4.clone()}
    scales = quantized.quantized_scales
    if scales is None:
        encoded["weight.absmax"] = quantized.scale.reshape(-1)
    else:
        encoded["weight.absmax"] = scales.codes
        encoded["weight.nested_absmax"] = scales.scale
        encoded["weight.nested_quant_map"] = dynamic8()
        state |= {
            "nested_blocksize": SCALES_PER_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": scales.offset,
        }
    encoded[_STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return encoded


def stored_bytes(rows: int, columns: int, grid: Grid, *, double_quant: bool) -> int:
    """Bytes of the tensors that :func:`encode` gives for a weight of rows × columns, but for the JSON among them."""
    num_scales = rows * (columns // grid.group_size)
    scales = 4 * num_scales
    if double_quant:
        scales = num_scales + 4 * -(-num_scales // SCALES_PER_BLOCK) + dynamic8().nbytes
    return rows * columns // 2 + NF4.nbytes + scales


def decode(encoded: Mapping[str, Tensor], grid: Grid) -> Tensor:
    """The float32 weight that the tensors of :func:`encode` stand for."""
    state = json.loads(bytes(encoded[_STATE].tolist()))
    scale = encoded["weight.absmax"]
    if "weight.nested_absmax" in encoded:
        scale = QuantizedScales(scale, encoded["weight.nested_absmax"], state["nested_offset"]).dequantize()
    pairs = encoded["weight"].view(-1)
    codes = torch.stack((pairs >> 4, pairs & 0xF), dim=-1).to(torch.int8).view(state["shape"])
    scale = scale.view(codes.shape[0], -1)
    return QuantizedWeight(codes, scale, torch.zeros_like(scale, dtype=torch.int8), grid).dequantize()


def quantization_config(
    layers: Mapping[str, tuple[Grid, int]], linear_layers: list[str], stored_dtype: torch.dtype, *, double_quant: bool
) -> dict[str, Any]:
    """The ``quantization_config`` of config.json.

    ``layers`` are those that are stored as codes, ``linear_layers`` all of the model. Loaders multiply in the type of
    the checkpoint, ``stored_dtype``, as they do the rest of the model.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": compute_dtype(stored_dtype),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(set(linear_layers) - set(layers)),
    }


def compute_dtype(stored_dtype: torch.dtype) -> str:
    """The type that a checkpoint's layers are multiplied in, as bitsandbytes names it."""
    return str(stored_dtype if stored_dtype in _COMPUTE_DTYPES else torch.float32).removeprefix("torch.")


def to_float32(model: Any) -> None:
    """Have an opened model, if it has 4-bit layers, compute in float32 throughout.

    Asked for float32, transformers still leaves all that is called ``weight`` in the type of the file, and bitsandbytes
    rounds inputs to ``bnb_4bit_compute_dtype``, or on CPUs that multiply bf16 inputs and scales to that. Has to be
    called before the model's first use, which lays out weights anew for such CPUs.
    """
    if not getattr(model, "is_loaded_in_4bit", False):
        return
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = torch.float32
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32)


def weight_of(module: Any) -> Tensor:
    """The weight of an opened model's linear layer as its module has it; of a 4-bit one what its codes stand for."""
    weight: Tensor = module.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)
