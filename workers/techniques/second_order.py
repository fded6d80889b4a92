"""What techniques that quantize by the Hessian of the calibration have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from workers.techniques.options import AsymmetricCalibration, Damping, QuantizationOptions, Statistic

if TYPE_CHECKING:
    from workers.engine.layer import Layer


class SecondOrderOptions(QuantizationOptions):
    """Options of a technique that compensates each column's error in the columns not yet done."""

    statistics: ClassVar[frozenset[Statistic]] = frozenset({"hessian"})

    act_order: Annotated[
        bool,
        Field(
            description="Quantize the columns with the largest activations first. Groups stay where they are, so the "
            "stored format does not change."
        ),
    ] = True
    clip_search: Annotated[
        bool, Field(description="Search each scale for the least squared error, instead of covering the extremes.")
    ] = True
    damping: Damping = 0.01
    asymmetric_calibration: AsymmetricCalibration = False

    @property
    def needs(self) -> frozenset[Statistic]:
        """The Hessian, and the drift if the output is to be the original model's."""
        return self.statistics | {"drift"} if self.asymmetric_calibration else self.statistics

    def compress(self, layer: Layer) -> dict[str, Any]:
        """Quantize ``layer`` with the Hessian of its input."""
        from workers.solvers.gptq import gptq
        from workers.solvers.hessian import towards_original

        statistics = layer.statistics
        factor = statistics.inverse_factor(act_order=self.act_order, damping=self.damping)
        if factor is None:
            layer.fall_back("hessian_not_positive_definite", "rounded to nearest: no damping made the Hessian usable")
        elif self.asymmetric_calibration:
            layer.weight = towards_original(layer.weight, statistics.drift, factor)
        layer.quantized, outcome = gptq(
            layer.weight, statistics.hessian, factor, layer.grid(self), clip_search=self.clip_search, zeros=layer.zeros
        )
        return outcome.to_metrics()
