"""SmoothQuant: move the outliers of activations into the weights, then quantize both (Xiao et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from workers.techniques.options import QuantizationOptions, Statistic

if TYPE_CHECKING:
    from torch import Tensor

    from workers.engine.layer import Layer


class SmoothQuant(QuantizationOptions):
    """8-bit weights and activations, smoothed; arXiv:2211.10438."""

    summary: ClassVar[str] = (
        "8-bit weights and activations, after outliers of the activations were moved into the weights."
    )
    statistics: ClassVar[frozenset[Statistic]] = frozenset({"input_absmax"})

    technique: Literal["smoothquant"] = "smoothquant"
    scheme: Literal["W8A8"] = "W8A8"
    smoothing_strength: Annotated[
        float, Field(ge=0, le=1, description="How much of the difficulty goes from the activations to the weights.")
    ] = 0.5

    def input_scale(self, layers: Sequence[Layer]) -> Tensor:
        """The scale between the input's and the weights' largest values."""
        from workers.solvers.scaling import smoothing_scale

        return smoothing_scale(
            layers[0].statistics.input_absmax, [layer.weight for layer in layers], self.smoothing_strength
        )

    def compress(self, layer: Layer) -> dict[str, Any]:
        """Round the weights of ``layer``; its input is quantized by whoever runs the model."""
        from workers.solvers.quantization import quantize_to_nearest

        layer.quantized = quantize_to_nearest(layer.weight, layer.grid(self), clip_search=False, zeros=layer.zeros)
        return {}
