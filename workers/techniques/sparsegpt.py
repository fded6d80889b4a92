"""SparseGPT: prune column by column, and let the columns not yet done make up for it (Frantar and Alistarh 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from workers.techniques.options import AsymmetricCalibration, Damping, PruningOptions, Statistic

if TYPE_CHECKING:
    from workers.engine.layer import Layer


class SparseGPT(PruningOptions):
    """Second-order pruning with calibration text; arXiv:2301.00774."""

    summary: ClassVar[str] = (
        "Set weights to zero column by column, compensating each in the rest by the Hessian of the calibration."
    )

    statistics: ClassVar[frozenset[Statistic]] = frozenset({"hessian"})

    technique: Literal["sparsegpt"] = "sparsegpt"
    damping: Damping = 0.01
    asymmetric_calibration: AsymmetricCalibration = False

    @property
    def needs(self) -> frozenset[Statistic]:
        """The Hessian, and the drift if the output is to be the original model's."""
        return self.statistics | {"drift"} if self.asymmetric_calibration else self.statistics

    def compress(self, layer: Layer) -> dict[str, Any]:
        """Prune ``layer`` with the Hessian of its input."""
        from workers.solvers.hessian import towards_original
        from workers.solvers.sparsegpt import sparsegpt

        assert self.sparsity is not None
        statistics = layer.statistics
        factor = statistics.inverse_factor(act_order=False, damping=self.damping)
        if factor is None:
            layer.fall_back("hessian_not_positive_definite", "pruned as Wanda does: no damping made the Hessian usable")
        elif self.asymmetric_calibration:
            layer.weight = towards_original(layer.weight, statistics.drift, factor)
        weight, mask, outcome = sparsegpt(
            layer.weight, statistics.hessian, factor, self.sparsity, self.pattern, zeros=layer.zeros
        )
        num_pruned = layer.replace_pruned(weight, mask)
        return {"num_pruned": num_pruned, "sparsity": self.sparsity, **outcome.to_metrics()}
