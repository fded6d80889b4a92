"""Hands a scale of some layers' input over to whatever makes that input."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from workers.architectures import Producer
from workers.engine.layer import Layer
from workers.engine.skeleton import Skeleton
from workers.techniques import LayerOptions

# The stored tensor of a name in the block: changed already, or as the checkpoint has it; None where there is none.
Stored = Callable[[str], Tensor | None]


class Rescaling:
    """Of the running block: parameters that make an input otherwise, and which layers read it so."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton = skeleton
        self._changed: dict[str, Tensor] = {}

    def apply(
        self, stage: LayerOptions, block: str, group: Sequence[str], layers: Sequence[Layer], done: Sequence[Layer]
    ) -> None:
        """Move a scale that ``stage`` asks for from the input of ``layers``, the ``group``, to whatever makes it.

        ``done`` are the block's layers before them. Where the input cannot be rescaled, layers say so.
        """
        producer = self._skeleton.producer(block, group)
        if producer is None:
            return
        name = f"{block}.{producer.name}"
        taken = [layer for layer in layers if not stage.ignores(layer.name)]
        if len(taken) < len(layers) or (producer.kind == "linear" and stage.ignores(name)):
            for layer in taken:
                layer.fall_back("input_scale", "its input is not rescaled: `ignore` spares a layer that would change")
            return
        scale = stage.input_scale(layers, producer)
        if not all(layer.can_be_scaled(scale) for layer in layers):
            for layer in layers:
                layer.fall_back("input_scale", "its input is not rescaled: a weight would be beyond its type's range")
            return
        made = next((layer for layer in done if layer.name == name), None)
        scale = take_over(producer, name, scale, self._stored, self._changed, made)
        statistics = layers[0].statistics.scaled(scale)
        for layer in layers:
            layer.rescale(scale, statistics)

    def take(self, name: str) -> Tensor:
        """A parameter of the block as the artifact stores it, unless it is a compressed weight; once."""
        changed = self._changed.pop(name, None)
        return self._skeleton.checkpoint.as_stored(name) if changed is None else changed

    def _stored(self, name: str) -> Tensor | None:
        checkpoint = self._skeleton.checkpoint
        if name in self._changed:
            return self._changed[name]
        return checkpoint.as_stored(name) if name in checkpoint.parameters(name) else None


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
