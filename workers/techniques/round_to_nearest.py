"""Round-to-nearest: every weight to its nearest code, without calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from workers.techniques.options import OptionError
from workers.techniques.quantization_options import ActivationOptions
from workers.techniques.schemes import SCHEMES, usable_group_size

if TYPE_CHECKING:
    from workers.engine.layer import Layer

# bitsandbytes' kernel for CPUs that multiply bf16 takes so many rows at a time, and blocks that end with a row.
_ROWS_MULTIPLE = 32


class RoundToNearest(ActivationOptions):
    """Rounds each weight to the nearest code of its channel or group. Needs no calibration."""

    summary: ClassVar[str] = (
        "Round every weight to its nearest code: integer, FP8 or NF4. Fast, needs no calibration text."
    )

    technique: Literal["round_to_nearest"] = "round_to_nearest"
    clip_search: Annotated[
        bool, Field(description="Search each scale for the least squared error, instead of covering the extremes.")
    ] = False
    double_quant: Annotated[
        bool,
        Field(
            description="Of NF4, and there the default: store the scales as 8-bit codes too, which takes a weight from "
            "4.5 bits to 4.13 in groups of 64."
        ),
    ] = False

    @model_validator(mode="before")
    @classmethod
    def _double_quant_of_scheme(cls, data: Any) -> Any:
        if isinstance(data, dict) and "double_quant" not in data:
            scheme = SCHEMES.get(str(data.get("scheme", cls.model_fields["scheme"].default)))
            return {**data, "double_quant": scheme is not None and scheme.is_normal}
        return data

    @model_validator(mode="after")
    def _has_clips_to_search(self) -> Self:
        if self.clip_search and (self.facts.is_float or self.facts.is_normal):
            raise OptionError("clip_search", f"must be false with {self.scheme}, whose values lie denser near zero")
        if self.double_quant and not self.facts.is_normal:
            raise OptionError("double_quant", f"must be false with {self.scheme}; it belongs to NF4")
        return self

    def scale_bits(self, num_bits: int) -> float:
        """Bits that the scale of a group takes where codes of ``num_bits`` are packed, with its zero-point."""
        if not self.facts.is_normal:
            return super().scale_bits(num_bits)
        return 8 + 32 / 256 if self.double_quant else 32  # a float32 scale for 256 codes, or for each group

    def compress(self, layer: Layer) -> dict[str, Any]:
        """Quantize ``layer`` to its nearest codes; casts are done for the whole model, where it is read."""
        if self.facts.dtype is not None:
            return {}
        from workers.solvers.quantization import quantize_to_nearest, quantize_to_normal_float

        if not self.facts.is_normal:
            layer.quantized = quantize_to_nearest(
                layer.weight, layer.grid(self), clip_search=self.clip_search, zeros=layer.zeros
            )
        elif layer.stores_codes and not self.has_blocks_for(*layer.weight.shape):
            rows, columns = layer.weight.shape
            layer.fall_back(
                "shape",
                f"stored in full: {rows} × {columns} weights do not fall into {_ROWS_MULTIPLE} rows and whole blocks",
            )
        else:
            layer.quantized = quantize_to_normal_float(layer.weight, layer.grid(self), double_quant=self.double_quant)
        return {}

    def has_blocks_for(self, rows: int, columns: int) -> bool:
        """Whether bitsandbytes reads the NF4 codes of such a layer on every CPU."""
        allowed = self.facts.group_sizes
        assert allowed is not None
        return rows % _ROWS_MULTIPLE == 0 and usable_group_size(columns, self.group_size, allowed) in allowed
