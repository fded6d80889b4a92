"""What the options of techniques that quantize have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from workers.techniques.options import Kind, LayerOptions, OptionError
from workers.techniques.schemes import NORMAL_FLOAT_GROUP_SIZES, SCHEMES, ActivationGrid, Scheme, SchemeFacts

if TYPE_CHECKING:
    from workers.engine.layer import Layer


class QuantizationOptions(LayerOptions):
    """Options of a technique that stores linear layers as integers with scales."""

    kind: ClassVar[Kind] = "quantization"

    scheme: Annotated[
        Scheme,
        Field(
            description="Bits of weights and of activations. Widths other than 4 and 8 have no stable packed layout: "
            "their values are stored at the model's own width, and the report states the packed size. W8A8 and FP8 "
            "also quantize each token of a layer's input when the model runs. NF4 is 4-bit NormalFloat. FP16 and BF16 "
            "cast the whole model."
        ),
    ] = "W4A16"
    group_size: Annotated[
        int | None,
        Field(
            ge=1,
            le=1_048_576,
            description="Input columns that share a scale; null for one scale per output channel, as W8A8 and FP8 "
            "always have. NF4 takes powers of two from 32 to 1024, and 64 where nothing is said. A layer that it does "
            "not divide falls back to its largest usable divisor, and the report says so.",
        ),
    ] = 128
    symmetric: Annotated[bool, Field(description="No zero-points: code 0 is the value 0.")] = True
    embeddings: Annotated[
        bool,
        Field(
            description="Also round the token embedding and the output head, on the same grid; a matrix that both "
            "share is stored once. A fifth of a small model is its embedding."
        ),
    ] = False

    @model_validator(mode="before")
    @classmethod
    def _group_size_of_scheme(cls, data: Any) -> Any:
        if isinstance(data, dict) and "group_size" not in data:
            scheme = SCHEMES.get(str(data.get("scheme", cls.model_fields["scheme"].default)))
            if scheme is not None and (scheme.quantizes_activations or scheme.dtype):
                return {**data, "group_size": None}
            if scheme is not None and scheme.is_normal:
                return {**data, "group_size": 64}
        return data

    @model_validator(mode="after")
    def _fits_scheme(self) -> Self:
        if self.facts.quantizes_activations or self.facts.dtype:
            if self.group_size is not None:
                raise OptionError("group_size", f"must be null with {self.scheme}")
            if not self.symmetric:
                raise OptionError("symmetric", f"must be true with {self.scheme}")
            if self.embeddings:
                raise OptionError("embeddings", f"must be false with {self.scheme}, which does without")
        if self.facts.is_normal:
            if self.group_size not in NORMAL_FLOAT_GROUP_SIZES:
                sizes = ", ".join(map(str, NORMAL_FLOAT_GROUP_SIZES))
                raise OptionError("group_size", f"must be one of {sizes} with {self.scheme}")
            if not self.symmetric:
                raise OptionError("symmetric", f"must be true with {self.scheme}, whose blocks have no zero-points")
            if self.embeddings:
                raise OptionError(
                    "embeddings", f"must be false with {self.scheme}: transformers reads linear layers alone"
                )
        if self.facts.dtype and self.ignore:
            raise OptionError("ignore", f"must be empty with {self.scheme}, which casts the whole model")
        if self.embeddings and self.group_size is None and not self.symmetric:
            raise OptionError(
                "group_size",
                "must be a number where embeddings have zero-points, so that all matrices share one layout",
            )
        return self

    @property
    def facts(self) -> SchemeFacts:
        """What the scheme's name says."""
        return SCHEMES[self.scheme]

    @classmethod
    def facts_of(cls, stage: Mapping[str, Any]) -> SchemeFacts | None:
        """The same of a stage that is not yet validated; None where it names no scheme."""
        return SCHEMES.get(str(stage.get("scheme", cls.model_fields["scheme"].default)))

    @property
    def activations(self) -> ActivationGrid | None:
        """What a layer's input is rounded to whenever the model runs; None where it stays as it is."""
        return None

    def scale_bits(self, num_bits: int) -> float:
        """Bits that the scale of a group takes where codes of ``num_bits`` are packed, with its zero-point."""
        return 16 if self.symmetric else 16 + num_bits


class ActivationOptions(QuantizationOptions):
    """The same of one with schemes that quantize activations too."""

    symmetric_activations: Annotated[
        bool,
        Field(
            description="Of W8A8: spread the codes of each token evenly around zero, and not from its smallest value "
            "to its largest. Larger errors, for runtimes whose integer products know no zero-points."
        ),
    ] = False

    @model_validator(mode="after")
    def _has_activations_with_zero_points(self) -> Self:
        if self.symmetric_activations and (self.facts.is_float or not self.facts.quantizes_activations):
            raise OptionError("symmetric_activations", f"must be false with {self.scheme}; it belongs to W8A8")
        return self

    @property
    def activations(self) -> ActivationGrid | None:
        """Codes from the smallest value to the largest, where float8 is not the same on both sides already."""
        if not self.facts.quantizes_activations:
            return None
        return ActivationGrid(self.facts.is_float, self.facts.is_float or self.symmetric_activations)


class EightBitOptions(ActivationOptions):
    """The same of one that knows W8A8 alone, and rounds each weight to the nearest code."""

    scheme: Literal["W8A8"] = "W8A8"
    group_size: Annotated[None, Field(description="W8A8 has one scale per output channel.")] = None
    symmetric: Annotated[Literal[True], Field(description="The weights of W8A8 have no zero-points.")] = True
    embeddings: Annotated[Literal[False], Field(description="W8A8 does without: it is of linear layers.")] = False

    def compress(self, layer: Layer) -> dict[str, Any]:
        """Round the weights of ``layer``; its input is quantized by whoever runs the model."""
        from workers.solvers.quantization import quantize_to_nearest

        layer.quantized = quantize_to_nearest(layer.weight, layer.grid(self), clip_search=False, zeros=layer.zeros)
        return {}
