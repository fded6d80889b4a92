"""What the report and the config need of a compression, beside the weights on disk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from workers.solvers.quantization import Grid


@dataclass
class PartResult:
    """Of one finished block, or of what lies outside the blocks."""

    metrics: list[dict[str, dict[str, Any]]]  # of each stage, by layer
    fallbacks: list[list[dict[str, Any]]]  # of each stage
    grids: dict[str, tuple[Grid, int]] = field(default_factory=dict)  # of quantized layers, with in_features

    @classmethod
    def empty(cls, num_stages: int) -> PartResult:
        """Nothing yet."""
        return cls([{} for _ in range(num_stages)], [[] for _ in range(num_stages)])

    def to_json(self) -> dict[str, Any]:
        """As the journal keeps it."""
        grids = {
            name: [{**asdict(grid), "scale_dtype": str(grid.scale_dtype)}, in_features]
            for name, (grid, in_features) in self.grids.items()
        }
        return {"metrics": self.metrics, "fallbacks": self.fallbacks, "grids": grids}

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> PartResult:
        """From what :meth:`to_json` gave."""
        grids = {
            name: (
                Grid(**{**grid, "scale_dtype": getattr(torch, grid["scale_dtype"].removeprefix("torch."))}),
                in_features,
            )
            for name, (grid, in_features) in kept["grids"].items()
        }
        return cls(kept["metrics"], kept["fallbacks"], grids)


@dataclass
class Streamed:
    """Of all."""

    outer: PartResult
    blocks: list[PartResult] = field(default_factory=list)
    # float32, sequences × tokens × vocabulary, or sequences × classes: what the artifact has to give on the probe
    probe_logits: Tensor = field(default_factory=lambda: torch.empty(0))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def metrics(self, stage: int) -> dict[str, dict[str, Any]]:
        """What was measured in a stage, by layer."""
        return {name: metrics for part in self._parts() for name, metrics in part.metrics[stage].items()}

    def fallbacks(self, stage: int) -> list[dict[str, Any]]:
        """Which layers of a stage got something else than what was asked for."""
        return [fallback for part in self._parts() for fallback in part.fallbacks[stage]]

    @property
    def grids(self) -> dict[str, tuple[Grid, int]]:
        """The grids of all quantized layers, with their numbers of input columns."""
        return {name: grid for part in self._parts() for name, grid in part.grids.items()}

    def _parts(self) -> Iterator[PartResult]:
        return chain((self.outer,), self.blocks)
