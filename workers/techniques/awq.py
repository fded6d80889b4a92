"""AWQ: scale up the columns that large inputs meet, then round to nearest (Lin et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from workers.techniques.options import Statistic
from workers.techniques.quantization_options import QuantizationOptions
from workers.techniques.schemes import WeightScheme

if TYPE_CHECKING:
    from torch import Tensor

    from workers.architectures import Producer
    from workers.engine.layer import Layer


class AWQ(QuantizationOptions):
    """Activation-aware weight quantization; arXiv:2306.00978."""

    summary: ClassVar[str] = (
        "Scale columns by the size of the calibration text's activations before rounding, so that those that matter "
        "lose least."
    )
    statistics: ClassVar[frozenset[Statistic]] = frozenset({"hessian"})
    rescales_inputs: ClassVar[bool] = True

    technique: Literal["awq"] = "awq"
    scheme: Annotated[WeightScheme, Field(description=QuantizationOptions.model_fields["scheme"].description)] = "W4A16"
    clip_search: Annotated[
        bool, Field(description="Search each scale for the least error, weighted by the activations.")
    ] = True

    def input_scale(self, layers: Sequence[Layer], producer: Producer) -> Tensor:  # noqa: ARG002
        """The scale that errs least over all ``layers`` together."""
        from workers.solvers.quantization import quantize_to_nearest
        from workers.solvers.scaling import activation_aware_scale

        def rounding(layer: Layer) -> Callable[[Tensor], Tensor]:
            grid = layer.grid(self)
            return lambda weight: quantize_to_nearest(weight, grid, clip_search=False, zeros=layer.zeros).dequantize()

        return activation_aware_scale(
            [layer.weight for layer in layers],
            layers[0].statistics.hessian,
            [rounding(layer) for layer in layers],
        )

    def compress(self, layer: Layer) -> dict[str, Any]:
        """Round ``layer``, each scale chosen by the error that its group makes on the calibration text."""
        from workers.solvers.hessian import Outcome, energy_of
        from workers.solvers.quantization import quantize_to_nearest

        hessian = layer.statistics.hessian
        layer.quantized = quantize_to_nearest(
            layer.weight,
            layer.grid(self),
            clip_search=self.clip_search,
            importance=hessian.diagonal().contiguous(),
            zeros=layer.zeros,
        )
        change = layer.weight - layer.quantized.dequantize()
        return Outcome.uncompensated(change, energy_of(layer.weight, hessian), hessian).to_metrics()
