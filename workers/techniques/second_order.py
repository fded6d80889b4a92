"""What techniques that use the Hessian of the calibration have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from workers.techniques.options import LayerOptions, Statistic
from workers.techniques.quantization_options import QuantizationOptions

if TYPE_CHECKING:
    from workers.engine.layer import Layer
    from workers.solvers.hessian import InverseFactor, Outcome


class SecondOrder(LayerOptions):
    """Options of a technique that makes up for each column's error in the columns not yet done."""

    statistics: ClassVar[frozenset[Statistic]] = frozenset({"hessian"})

    damping: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="Added to the Hessian's diagonal, as a fraction of its mean; grown until the Cholesky "
            "factorization succeeds.",
        ),
    ] = 0.01
    asymmetric_calibration: Annotated[
        bool,
        Field(
            description="Aim at what the original model's layer gives on the original model's input, and not on the "
            "input that the layers compressed before it have changed. Runs the calibration text through both models."
        ),
    ] = False

    @property
    def needs(self) -> frozenset[Statistic]:
        """The Hessian, and the drift if the output is to be the original model's."""
        return self.statistics | {"drift"} if self.asymmetric_calibration else self.statistics

    def prepare(self, layer: Layer, *, act_order: bool, otherwise: str) -> InverseFactor | None:
        """The factor to solve ``layer`` with, whose weight now is what is aimed at.

        None if no damping makes the Hessian usable; the report then says that the layer is ``otherwise``.
        """
        from workers.solvers.hessian import towards_original

        factor = layer.statistics.inverse_factor(act_order=act_order, damping=self.damping)
        if factor is None:
            layer.fall_back("hessian_not_positive_definite", f"{otherwise}: no damping made the Hessian usable")
        elif self.asymmetric_calibration:
            moved = towards_original(layer.weight, layer.statistics.drift, factor)
            if layer.can_store(moved):
                layer.weight = moved
            else:
                layer.fall_back("overflow", "aimed at the output on its own input: the other is beyond its type")
        return factor

    def note_overflow(self, layer: Layer, factor: InverseFactor | None, outcome: Outcome, *, otherwise: str) -> None:
        """Have the report say if the solver had ``factor`` and made up for no errors all the same."""
        if factor is not None and outcome.damping is None:
            layer.fall_back("overflow", f"{otherwise}: errors that were carried on are beyond its type")


class SecondOrderQuantization(SecondOrder, QuantizationOptions):
    """The same of one that quantizes."""

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

    def compress(self, layer: Layer) -> dict[str, Any]:
        """Quantize ``layer`` with the Hessian of its input."""
        from workers.solvers.gptq import gptq

        otherwise = "rounded to nearest"
        factor = self.prepare(layer, act_order=self.act_order, otherwise=otherwise)
        layer.quantized, outcome = gptq(
            layer.weight,
            layer.statistics.hessian,
            factor,
            layer.grid(self),
            clip_search=self.clip_search,
            zeros=layer.zeros,
        )
        self.note_overflow(layer, factor, outcome, otherwise=otherwise)
        return outcome.to_metrics()
