"""Round-to-nearest: every weight to its nearest code, without calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from workers.techniques.options import QuantizationOptions

if TYPE_CHECKING:
    from workers.engine.layer import Layer


class RoundToNearest(QuantizationOptions):
    """Rounds each weight to the nearest code of its channel or group. Needs no calibration."""

    summary: ClassVar[str] = "Round every weight to its nearest code, integer or FP8. Fast, needs no calibration text."

    technique: Literal["round_to_nearest"] = "round_to_nearest"
    clip_search: Annotated[
        bool, Field(description="Search each scale for the least squared error, instead of covering the extremes.")
    ] = False

    @model_validator(mode="after")
    def _has_clips_to_search(self) -> Self:
        if self.clip_search and self.facts.is_float:
            raise ValueError(f"clip_search must be false with {self.scheme}, whose values lie denser near zero")
        return self

    def compress(self, layer: Layer) -> dict[str, Any]:
        """Quantize ``layer`` to its nearest codes; casts are done for the whole model, where it is read."""
        if self.facts.dtype is not None:
            return {}
        from workers.solvers.quantization import quantize_to_nearest

        layer.quantized = quantize_to_nearest(
            layer.weight,
            layer.grid(self),
            clip_search=self.clip_search,
            zeros=layer.zeros,
        )
        return {}
