"""compressed-tensors: integer or float8 codes with scales, as transformers and vLLM read them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor, nn

from workers.recipe_rules import Packing
from workers.solvers.activations import round_tokens, token_scale
from workers.solvers.quantization import Grid, QuantizedWeight
from workers.techniques.schemes import ActivationGrid


def encode(quantized: QuantizedWeight, packing: Packing) -> dict[str, Tensor]:
    """The tensors that stand for one layer's weight, by their names within the layer.

    Raises:
        ValueError: The layer's codes do not survive the packing, which would be a defect of ours or of the library.
    """
    scheme = _scheme(quantized.grid, quantized.codes.shape[1], packing, activations=None)
    compressor = BaseCompressor.get_value_from_registry(packing)
    state = {
        "weight": quantized.dequantize(),
        "weight_scale": quantized.scale,
        "weight_zero_point": quantized.zero_point,
    }
    encoded: dict[str, Tensor] = compressor.compress(state, scheme)
    if not torch.equal(compressor.decompress(encoded, scheme)["weight"], state["weight"]):
        raise ValueError("the packed codes do not give back the weight")
    encoded["weight_scale"] = quantized.scale.to(quantized.grid.scale_dtype)
    return encoded


def decode(encoded: Mapping[str, Tensor], grid: Grid, in_features: int, packing: Packing) -> Tensor:
    """The float32 weight that the tensors of :func:`encode` stand for."""
    compressor = BaseCompressor.get_value_from_registry(packing)
    state = {**encoded, "weight_scale": encoded["weight_scale"].to(torch.float32)}
    scheme = _scheme(grid, in_features, packing, activations=None)
    weight: Tensor = compressor.decompress(state, scheme)["weight"]
    return weight


def stored_bytes(rows: int, columns: int, grid: Grid, packing: Packing) -> int:
    """Bytes of the tensors that :func:`encode` gives for a weight of rows × columns."""
    num_scales = rows * (columns // grid.group_size)
    scales = num_scales * (grid.scale_dtype.itemsize + (0 if grid.symmetric else 1))
    if packing != "pack-quantized":
        return rows * columns + scales
    words, shape = rows * -(-columns // (32 // grid.num_bits)), 2 * 8
    return 4 * words + scales + shape


def quantization_config(
    layers: Mapping[str, tuple[Grid, int]],
    linear_layers: list[str],
    packing: Packing,
    *,
    activations: ActivationGrid | None,
    unpacks_on_load: bool,
) -> dict[str, Any]:
    """The ``quantization_config`` of config.json.

    ``layers`` gives the grid and the number of input columns of each quantized layer; ``linear_layers`` names every
    linear layer of the model, of which the others are listed as ignored. ``unpacks_on_load`` has transformers unpack
    every weight while it reads the file, and not at the first use, so that embeddings may be packed, and shared with
    the head: it takes the first scheme for all of them.
    """
    by_scheme: dict[str, tuple[QuantizationScheme, list[str]]] = {}
    # A group as wide as its layer may be called a channel too; where all share one scheme, it stays a group.
    keeps_groups = unpacks_on_load and any(grid.group_size != in_features for grid, in_features in layers.values())
    for name, (grid, in_features) in layers.items():
        scheme = _scheme(grid, in_features, packing, activations=activations, keeps_groups=keeps_groups)
        by_scheme.setdefault(scheme.model_dump_json(), (scheme, []))[1].append(name)
    groups = {}
    for number, (scheme, names) in enumerate(by_scheme.values()):
        # "Linear" is what every loader knows; a second scheme has to name its layers.
        targets = ["Linear"] if len(by_scheme) == 1 else _patterns(names)
        if unpacks_on_load:
            if len(by_scheme) > 1:
                raise ValueError("packed embeddings have to be on the grid of all other layers")
            targets.append("Embedding")
        groups[f"group_{number}"] = scheme.model_copy(update={"targets": targets}).model_dump(mode="json")
    return {
        "quant_method": "compressed-tensors",
        "version": version("compressed-tensors"),
        "format": packing,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(set(linear_layers) - set(layers)),
        "kv_cache_scheme": None,
        "sparsity_config": {},
        **({"dequantize": True} if unpacks_on_load else {}),
    }


def input_quantizer(grid: ActivationGrid, divisor: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """What every loader does to the input of a layer whose activations are quantized: by token, and back.

    ``divisor`` (columns) is what the layer's weight was multiplied by. To the bit what the library's own functions
    give, which write a new tensor for each of their steps.
    """
    by_library = quantizer_of(_activations(grid))

    def quantize(inputs: Tensor) -> Tensor:
        if inputs.ndim == 3 and not grid.is_float:
            return round_tokens(inputs, divisor, symmetric=grid.symmetric)
        if divisor is not None:
            inputs = inputs / divisor
        # Where a model has folded sequences together, "by token" means something else to the library.
        return _float_tokens(inputs) if inputs.ndim == 3 else by_library(inputs)

    return quantize


def _float_tokens(inputs: Tensor) -> Tensor:
    limit = torch.finfo(torch.float8_e4m3fn).max
    scale = token_scale(inputs, limit)
    quantized = torch.div(inputs, scale).clamp_(-limit, limit)
    return quantized.copy_(quantized.to(torch.float8_e4m3fn)).mul_(scale)


def quantizer_of(arguments: QuantizationArgs) -> Callable[[Tensor], Tensor]:
    """What the library does to inputs by a scheme's ``input_activations``: the proof of what we computed with."""

    def quantize(inputs: Tensor) -> Tensor:
        scale, zero_point = compute_dynamic_scales_and_zp(value=inputs, args=arguments, module=nn.Identity())
        quantized: Tensor = fake_quantize(x=inputs, scale=scale, zero_point=zero_point, args=arguments)
        return quantized

    return quantize


def _activations(grid: ActivationGrid) -> QuantizationArgs:
    kind = "float" if grid.is_float else "int"
    return QuantizationArgs(num_bits=8, type=kind, strategy="token", dynamic=True, symmetric=grid.symmetric)


def _scheme(
    grid: Grid,
    in_features: int,
    packing: Packing,
    *,
    activations: ActivationGrid | None,
    keeps_groups: bool = False,
) -> QuantizationScheme:
    whole_row = grid.group_size == in_features and not keeps_groups
    strategy: dict[str, Any] = {"strategy": "group", "group_size": grid.group_size}
    if whole_row:
        strategy = {"strategy": "channel"}
    if packing == "pack-quantized" and not grid.symmetric:
        # Packed zero-points of groups and channels do not open in transformers 5.23: its skeleton expects them
        # unpacked. A block of one row is the same grid, and its zero-points are never packed.
        strategy = {"strategy": "block", "block_structure": [1, grid.group_size]}
    weights = QuantizationArgs(
        num_bits=grid.num_bits, type="float" if grid.is_float else "int", symmetric=grid.symmetric, **strategy
    )
    return QuantizationScheme(
        targets=["Linear"],
        weights=weights,
        input_activations=None if activations is None else _activations(activations),
        format=packing,
    )


def _patterns(names: list[str]) -> list[str]:
    """Regular expressions that match these layers: block numbers that share the rest of a name become one."""
    numbers: dict[tuple[str, str], list[str]] = {}
    for name in names:
        match = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
        key = (match[1], match[3]) if match else (name, "")
        numbers.setdefault(key, []).append(match[2] if match else "")
    return [
        f"re:^{re.escape(before)}({'|'.join(found)}){re.escape(after)}$" if after else f"re:^{re.escape(before)}$"
        for (before, after), found in numbers.items()
    ]
