"""One linear layer on its way through the stages of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from workers.engine.statistics import InputStatistics
from workers.solvers.low_rank import product
from workers.solvers.quantization import Grid, QuantizedWeight
from workers.techniques.quantization_options import QuantizationOptions
from workers.techniques.schemes import usable_group_size

# Below it float16 has less than six bits left.
COARSE_SCALE = 2.0**-18


@dataclass
class Layer:
    """A weight and what the stages made of it so far."""

    name: str  # of the module, as in the checkpoint
    weight: Tensor  # float32, out_features × in_features
    stored_dtype: torch.dtype
    input_statistics: InputStatistics | None = None
    zeros: Tensor | None = None  # boolean, like weight: pruned, and to stay zero
    stores_codes: bool = True  # and not the values that codes stand for
    # Loaders that unpack while they read compute in the type of the scales; others in that of the model, here float32.
    unpacks_narrowly: bool = False
    quantized: QuantizedWeight | None = None
    input_scale: Tensor | None = None  # float32, in_features: what the layer reads comes divided by it
    fallbacks: list[dict[str, Any]] = field(default_factory=list)
    trained_codes: dict[str, Tensor] | None = None  # codes, scale and zero_point that it was trained as
    # float32, out_features × rank and rank × in_features: what stands for the weight, if it has become two.
    factors: tuple[Tensor, Tensor] | None = None

    @property
    def statistics(self) -> InputStatistics:
        """What calibration gathered; only for techniques that declare that they need it."""
        assert self.input_statistics is not None
        return self.input_statistics

    def grid(self, options: QuantizationOptions) -> Grid:
        """The codes that ``options`` ask for, with a group size that this layer can have."""
        in_features = self.weight.shape[1]
        grid = grid_of(options, in_features, self.stored_dtype)
        if options.group_size is not None and grid.group_size != options.group_size:
            self.fall_back(
                "group_size",
                f"group size {grid.group_size}: {options.group_size} does not divide its {in_features} columns",
            )
        return grid

    def can_be_scaled(self, scale: Tensor) -> bool:
        """Whether every column times ``scale`` (float32, in_features) can be stored."""
        largest = torch.linalg.vector_norm(self.weight, torch.inf, dim=0) * scale
        return bool((largest <= torch.finfo(self.stored_dtype).max).all())

    def can_store(self, weight: Tensor) -> bool:
        """Whether ``weight`` is finite in the type that the artifact stores values in."""
        return bool(torch.linalg.vector_norm(weight, torch.inf) <= torch.finfo(self.stored_dtype).max)

    def rescale(self, scale: Tensor, statistics: InputStatistics | None) -> None:
        """Read the input divided by ``scale`` (float32, in_features), whose statistics are ``statistics``."""
        self.weight = self.weight * scale
        self.input_scale = scale if self.input_scale is None else self.input_scale * scale
        self.input_statistics = statistics

    def prune(self, mask: Tensor) -> int:
        """Set the weights under ``mask`` to zero, for good; how many of them were not zero before."""
        return self.replace_pruned(self.weight, mask)

    def replace_pruned(self, weight: Tensor, mask: Tensor) -> int:
        """Take over ``weight`` with zeros under ``mask``, for good; how many of them were not zero before."""
        num_pruned = int((mask & (self.weight != 0)).sum())
        self.zeros = mask if self.zeros is None else self.zeros | mask
        self.weight = torch.where(self.zeros, 0.0, weight)
        return num_pruned

    def take_over_codes(self, grid: Grid) -> None:
        """Be quantized as it was trained."""
        assert self.trained_codes is not None
        parts = self.trained_codes
        self.quantized = QuantizedWeight(parts["codes"], parts["scale"], parts["zero_point"], grid)

    def note_coarse_scales(self) -> None:
        """Have the report say how many groups are coarser than asked for, as float16 hardly has their scales."""
        if self.quantized is None or self.quantized.grid.scale_dtype != torch.float16:
            return
        grid, scale = self.quantized.grid, self.quantized.scale.abs()
        if not bool((scale < COARSE_SCALE).any()):
            return
        weight = self.weight.reshape(*scale.shape, -1)
        error = (self.quantized.dequantize().view_as(weight) - weight).abs()
        step = weight.abs().amax(dim=-1, keepdim=True) / grid.largest_code
        asked_for = torch.maximum(weight.abs() / 16, step * 2**-10) if grid.is_float else step / 2
        # What a search has cut off lies beyond a scale that is no larger than was asked for.
        is_coarse = (error > 1.01 * asked_for).any(dim=-1) & (scale < COARSE_SCALE) & (scale > 1.05 * step.squeeze(-1))
        num_coarse = int(is_coarse.sum())
        if num_coarse:
            self.fall_back(
                "coarse_scales",
                f"{num_coarse} of its {scale.numel()} scales are too small for float16: its weights are coarser than "
                "asked for; those of a checkpoint in bfloat16 would not be",
            )

    def fall_back(self, code: str, message: str) -> None:
        """Note for the report that this layer got something else than what was asked for."""
        fallback = {"layer": self.name, "code": code, "message": message}
        if fallback not in self.fallbacks:
            self.fallbacks.append(fallback)

    def stored_weight(self) -> Tensor:
        """The weight in the type that the artifact stores values in."""
        weight = self.weight if self.quantized is None else self.quantized.dequantize()
        return weight.to(self.stored_dtype)

    def stored_factors(self) -> tuple[Tensor, Tensor]:
        """The factors in the type that the artifact stores values in."""
        assert self.factors is not None
        out_factor, in_factor = self.factors
        return out_factor.to(self.stored_dtype), in_factor.to(self.stored_dtype)

    def effective_weight(self) -> Tensor:
        """The weight that the artifact will compute with, in float32."""
        if self.factors is not None:
            return product(*self.stored_factors())
        if self.quantized is None or not self.stores_codes:
            return self.stored_weight().to(torch.float32)
        weight = self.quantized.dequantize()
        return weight.to(self.quantized.grid.scale_dtype).to(torch.float32) if self.unpacks_narrowly else weight


def grid_of(options: QuantizationOptions, in_features: int, stored_dtype: torch.dtype) -> Grid:
    """The codes that a layer of ``in_features`` columns gets, whose weight is stored in ``stored_dtype``."""
    facts = options.facts
    return Grid(
        facts.num_bits,
        usable_group_size(in_features, options.group_size, facts.group_sizes),
        options.symmetric,
        torch.float32 if facts.is_normal else stored_dtype,
        facts.is_float,
        facts.is_normal,
    )
