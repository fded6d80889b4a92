"""Wanda: prune by weight times input norm, row by row (Sun et al. 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from workers.techniques.options import Statistic
from workers.techniques.pruning_options import PruningOptions

if TYPE_CHECKING:
    from workers.engine.layer import Layer


class Wanda(PruningOptions):
    """Sets to zero, in every row, what is smallest times the norm of its input; arXiv:2306.11695."""

    summary: ClassVar[str] = (
        "Set to zero the weights that matter least for the calibration text: by size times the norm of their input."
    )
    statistics: ClassVar[frozenset[Statistic]] = frozenset({"input_norms"})

    technique: Literal["wanda"] = "wanda"

    def compress(self, layer: Layer) -> dict[str, Any]:
        """Zero the least important weights of each row of ``layer``."""
        from workers.solvers.pruning import wanda_mask

        assert self.sparsity is not None
        mask = wanda_mask(layer.weight, layer.statistics.input_norms, self.sparsity, self.pattern)
        return {"num_pruned": layer.prune(mask), "sparsity": self.sparsity_of(layer)}
