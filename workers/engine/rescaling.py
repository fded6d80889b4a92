"""Hands a scale of some layers' input over to whatever makes that input."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import replace

import torch
from torch import Tensor

from workers.architectures import Producer
from workers.engine.layer import Layer

# The stored tensor of a name in the block: changed already, or as the checkpoint has it; None where there is none.
Stored = Callable[[str], Tensor | None]


def take_over(
    producer: Producer,
    name: str,
    scale: Tensor,
    stored: Stored,
    changed: MutableMapping[str, Tensor],
    made: Layer | None,
) -> Tensor:
    """Have the module ``name`` make its output divided by ``scale`` (float32, columns), and return the real scale.

    That is the one which the stored, rounded parameters give: it differs from ``scale`` where a parameter cannot
    be divided without rounding. New parameters go to ``changed``; a linear producer is ``made``, compressed before.
    """
    if producer.kind == "linear":
        assert made is not None
        scale = _divide_rows(made, scale)
    else:
        weight = stored(f"{name}.weight")
        assert weight is not None
        changed[f"{name}.weight"], scale = _divide_norm(weight, scale, plus_one=producer.kind == "norm_plus_one")
    bias = stored(f"{name}.bias")
    if bias is not None:
        changed[f"{name}.bias"] = (bias.to(scale) / scale).to(bias)
    return scale


def _divide_norm(weight: Tensor, scale: Tensor, *, plus_one: bool) -> tuple[Tensor, Tensor]:
    offset = 1.0 if plus_one else 0.0
    factor = weight.to(scale) + offset
    divided = (factor / scale - offset).to(weight)
    realized = divided.to(scale) + offset
    kept = (factor == 0) | (realized == 0) | ~torch.isfinite(realized)
    return torch.where(kept.to(weight.device), weight, divided), torch.where(kept, 1.0, factor / realized)


def _divide_rows(layer: Layer, scale: Tensor) -> Tensor:
    """Divide what each row of a compressed layer gives; rows whose scales or weights would be rounded stay."""
    quantized = layer.quantized
    values = layer.weight if quantized is None else quantized.scale
    dtype = layer.stored_dtype if quantized is None else quantized.grid.scale_dtype
    divided = values / scale.unsqueeze(-1)
    exact = ((divided.to(dtype).to(divided) * scale.unsqueeze(-1)) == values.to(dtype).to(values)).all(dim=-1)
    scale = torch.where(exact, scale, 1.0)
    divided = values / scale.unsqueeze(-1)
    if quantized is None:
        layer.weight = divided
    else:
        layer.quantized = replace(quantized, scale=divided)
    return scale
