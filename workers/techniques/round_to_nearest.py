"""Round-to-nearest: every weight to its nearest code, without calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from workers.techniques.options import QuantizationOptions

if TYPE_CHECKING:
    from workers.engine.layer import Layer


class RoundToNearest(QuantizationOptions):
    """Rounds each weight to the nearest code of its channel or group. Needs no calibration."""

    summary: ClassVar[str] = "Round every weight to its nearest integer code. Fast, needs no calibration text."

    technique: Literal["round_to_nearest"] = "round_to_nearest"
    clip_search: Annotated[
        bool, Field(description="Search each scale for the least squared error, instead of covering the extremes.")
    ] = False

    def compress(self, layer: Layer) -> dict[str, Any]:
        """Quantize ``layer`` to its nearest codes."""
        from workers.solvers.quantization import quantize_to_nearest

        layer.quantized = quantize_to_nearest(
            layer.weight,
            layer.grid(self),
            clip_search=self.clip_search,
            zeros=layer.zeros,
        )
        return {}
