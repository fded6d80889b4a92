"""Weights that are trained as the codes that they will be stored as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from workers.architectures.compact import is_transposed
from workers.engine.layer import grid_of
from workers.solvers.quantization import Grid, choose_scales
from workers.techniques import QuantizationAwareFineTuning
from workers.training.model import Whole

LOG_SCALE = "log_scale"
# How far from a code, in steps, a weight may be and is surely rounded to it: short of a half.
_ROOM = 0.45


class Rounded(nn.Module):
    """Rounds a weight to codes whenever it is read; the logarithms of its scales are trained with it."""

    sign: Tensor
    zero_point: Tensor

    def __init__(
        self, weight: Tensor, grid: Grid, *, is_transposed: bool, scales: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Begin with these ``scales`` and zero-points, or those of least squared error.

        ``weight`` is as its module has it.
        """
        super().__init__()
        self.grid = grid
        self._is_transposed = is_transposed
        found = scales or choose_scales(self.turned(weight.detach()), grid, clip_search=True)
        scale, zero_point = (each.to(weight.device) for each in found)
        # A scale may be negative, where the one code more is needed on the other side.
        self.register_buffer("sign", scale.sign(), persistent=False)
        self.register_buffer("zero_point", zero_point.float(), persistent=False)
        self.log_scale = nn.Parameter(scale.abs().clamp(min=torch.finfo(grid.scale_dtype).tiny).log())

    def forward(self, weight: Tensor) -> Tensor:
        """The values that the codes stand for; gradients pass as if nothing was rounded, but for what is cut off."""
        codes, scale = self._codes(self.turned(weight), self.log_scale)
        # The same number, with the gradient of what it was before it was rounded.
        rounded = codes + (codes.round() - codes).detach()
        return self.turned((rounded * scale).view(codes.shape[0], -1))

    def codes(self, weight: Tensor, log_scale: Tensor) -> dict[str, Tensor]:
        """Codes (int8, rows × columns), scales and zero-points (rows × groups) of a weight as its module has it."""
        codes, scale = self._codes(self.turned(weight), log_scale)
        zero_point = self.zero_point.unsqueeze(-1)
        whole = (codes.round() + zero_point).to(torch.int8).view(codes.shape[0], -1)
        return {"codes": whole, "scale": scale.squeeze(-1), "zero_point": self.zero_point.to(torch.int8)}

    def _codes(self, weight: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Codes less their zero-points, not yet whole, and scales: rows × groups × columns of a group."""
        exact = log_scale.exp()
        stored = exact + (exact.to(self.grid.scale_dtype).float() - exact).detach()
        scale = (self.sign * stored).unsqueeze(-1)
        zero_point = self.zero_point.unsqueeze(-1)
        groups = weight.reshape(weight.shape[0], -1, self.grid.group_size) / scale
        return torch.clamp(groups, self.grid.lowest - zero_point, self.grid.highest - zero_point), scale

    def turned(self, weight: Tensor) -> Tensor:
        """From the way that the module has it to out_features × in_features, or back."""
        return weight.T if self._is_transposed else weight


@dataclass(frozen=True)
class RoundedLayer:
    """A layer of a model in training, and the names of what is trained of it."""

    rounded: Rounded
    weight: str
    log_scale: str


def round_weights(
    student: Whole, stage: QuantizationAwareFineTuning, first_codes: Path | None
) -> dict[str, RoundedLayer]:
    """From now on, have the layers that ``stage`` quantizes read rounded weights; by name of the layer.

    They begin with the codes in ``first_codes``, a folder of parts, or with the nearest.
    """
    skeleton, found = student.skeleton, {}
    codes = {} if first_codes is None else _read(first_codes)
    for layer in skeleton.block_layers:
        if stage.ignores(layer):
            continue
        module: Any = skeleton.module(layer)
        grid = grid_of(stage, skeleton.linear_shape(layer)[1], skeleton.checkpoint.stored_dtype(f"{layer}.weight"))
        turned = is_transposed(skeleton.architecture, layer)
        rounded = Rounded(module.weight, grid, is_transposed=turned, scales=_scales_of(codes, layer))
        if codes:
            _move_near(module.weight, rounded, codes, layer)
        parametrize.register_parametrization(module, "weight", rounded, unsafe=True)
        prefix = f"{layer}.parametrizations.weight"
        found[layer] = RoundedLayer(rounded, f"{prefix}.original", f"{prefix}.0.{LOG_SCALE}")
    return found


def _read(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def _scales_of(codes: Mapping[str, Tensor], layer: str) -> tuple[Tensor, Tensor] | None:
    return (codes[f"{layer}.scale"], codes[f"{layer}.zero_point"]) if codes else None


@torch.no_grad()
def _move_near(weight: Tensor, rounded: Rounded, codes: Mapping[str, Tensor], layer: str) -> None:
    """Move weights as little as it takes for them to be rounded to these codes."""
    whole, scale, zero_point = (
        codes[f"{layer}.{part}"].to(weight.device, torch.float32) for part in ("codes", "scale", "zero_point")
    )
    rows, groups = scale.shape
    scale = scale.unsqueeze(-1)
    values = (whole.view(rows, groups, -1) - zero_point.unsqueeze(-1)) * scale
    room = _ROOM * scale.abs()
    moved = rounded.turned(weight).reshape(values.shape).clamp(values - room, values + room)
    weight.copy_(rounded.turned(moved.view(rows, -1)))


@torch.no_grad()
def stored_values(layers: Mapping[str, RoundedLayer], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a checkpoint, those that were trained as codes with the values of these."""
    trained = {name for layer in layers.values() for name in (layer.weight, layer.log_scale)}
    stored = {name: value for name, value in values.items() if name not in trained}
    for name, layer in layers.items():
        parts = layer.rounded.codes(values[layer.weight], values[layer.log_scale])
        rows = parts["codes"].shape[0]
        codes = parts["codes"].float().view(rows, -1, layer.rounded.grid.group_size)
        weight = ((codes - parts["zero_point"].float().unsqueeze(-1)) * parts["scale"].unsqueeze(-1)).view(rows, -1)
        stored[f"{name}.weight"] = layer.rounded.turned(weight).contiguous()
    return stored


@torch.no_grad()
def codes_of(layers: Mapping[str, RoundedLayer], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The codes, scales and zero-points of all layers, by ``LAYER.codes`` and so on."""
    return {
        f"{name}.{part}": tensor.contiguous()
        for name, layer in layers.items()
        for part, tensor in layer.rounded.codes(values[layer.weight], values[layer.log_scale]).items()
    }
