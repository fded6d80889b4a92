"""Magnitude pruning: the smallest weights of each layer become zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from workers.techniques.pruning_options import PruningOptions

if TYPE_CHECKING:
    from workers.engine.layer import Layer


class Magnitude(PruningOptions):
    """Sets the weights with the least absolute value to zero. Needs no calibration."""

    summary: ClassVar[str] = "Set the smallest weights of each layer to zero. Fast, needs no calibration text."

    technique: Literal["magnitude"] = "magnitude"

    def compress(self, layer: Layer) -> dict[str, Any]:
        """Zero the smallest weights of ``layer``."""
        from workers.solvers.pruning import magnitude_mask

        assert self.sparsity is not None
        mask = magnitude_mask(layer.weight, self.sparsity, self.pattern)
        return {"num_pruned": layer.prune(mask), "sparsity": self.sparsity_of(layer)}
