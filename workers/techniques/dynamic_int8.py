"""Dynamic 8-bit integers: weights rounded once, activations whenever the model runs (Dettmers et al. 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from workers.techniques.quantization_options import ActivationOptions

if TYPE_CHECKING:
    from workers.engine.layer import Layer


class DynamicInt8(ActivationOptions):
    """Weights with one scale a channel, activations with one a token; arXiv:2208.07339, section 2."""

    summary: ClassVar[str] = "8-bit weights and activations, for fast integer products. Needs no calibration text."

    technique: Literal["dynamic_int8"] = "dynamic_int8"
    scheme: Literal["W8A8"] = "W8A8"

    def compress(self, layer: Layer) -> dict[str, Any]:
        """Round the weights of ``layer``; its input is quantized by whoever runs the model."""
        from workers.solvers.quantization import quantize_to_nearest

        layer.quantized = quantize_to_nearest(layer.weight, layer.grid(self), clip_search=False, zeros=layer.zeros)
        return {}
