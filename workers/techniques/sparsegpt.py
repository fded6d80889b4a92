"""SparseGPT: prune column by column, and let the columns not yet done make up for it (Frantar and Alistarh 2023)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from workers.techniques.pruning_options import PruningOptions
from workers.techniques.second_order import SecondOrder

if TYPE_CHECKING:
    from workers.engine.layer import Layer


class SparseGPT(SecondOrder, PruningOptions):
    """Second-order pruning with calibration text; arXiv:2301.00774."""

    summary: ClassVar[str] = (
        "Set weights to zero column by column, compensating each in the rest by the Hessian of the calibration."
    )

    technique: Literal["sparsegpt"] = "sparsegpt"

    def compress(self, layer: Layer) -> dict[str, Any]:
        """Prune ``layer`` with the Hessian of its input."""
        from workers.solvers.sparsegpt import sparsegpt

        assert self.sparsity is not None
        otherwise = "pruned as Wanda does"
        factor = self.prepare(layer, act_order=False, otherwise=otherwise)
        prune = partial(sparsegpt, sparsity=self.sparsity, pattern=self.pattern, zeros=layer.zeros)
        weight, mask, outcome = prune(layer.weight, layer.statistics.hessian, factor)
        if not layer.can_store(weight):
            weight, mask, outcome = prune(layer.weight, layer.statistics.hessian, None)
        self.note_overflow(layer, factor, outcome, otherwise=otherwise)
        num_pruned = layer.replace_pruned(weight, mask)
        return {"num_pruned": num_pruned, "sparsity": self.sparsity_of(layer), **outcome.to_metrics()}
