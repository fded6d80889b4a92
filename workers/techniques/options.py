"""What the options of every technique have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from workers.engine.layer import Layer

Kind = Literal["pruning", "quantization", "distillation", "factorization", "sharing", "training"]
Scheme = Literal["W4A16", "W8A16"]
Statistic = Literal["hessian"]

SCHEME_BITS: dict[str, int] = {"W4A16": 4, "W8A16": 8}

# Smaller groups would store more scale than code, and packed words hold eight 4-bit codes.
SMALLEST_GROUP = 16
GROUP_MULTIPLE = 8


def group_size_fits(in_features: int, size: int) -> bool:
    """Whether a layer of ``in_features`` columns can be stored in groups of ``size``."""
    return size >= SMALLEST_GROUP and size % GROUP_MULTIPLE == 0 and in_features % size == 0


def usable_group_size(in_features: int, requested: int | None) -> int:
    """The group size that a layer of ``in_features`` columns gets.

    ``requested`` if it divides the layer, else the largest smaller divisor that the format allows, else one group
    for the whole row; None asks for the latter.
    """
    if requested is None:
        return in_features
    sizes = range(min(requested, in_features), SMALLEST_GROUP - 1, -1)
    return next((size for size in sizes if group_size_fits(in_features, size)), in_features)


class StageOptions(BaseModel):
    """Options that every stage has. A technique adds its own, and says what it is and what it needs."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: ClassVar[Kind]
    summary: ClassVar[str]
    statistics: ClassVar[frozenset[Statistic]] = frozenset()

    ignore: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=200)]],
        Field(
            description="Names or shell-style patterns of linear layers to leave as they are, for example "
            "`model.layers.0.*` or `*.down_proj`.",
            max_length=1000,
        ),
    ] = []

    def compress(self, layer: Layer) -> dict[str, Any]:
        """Change ``layer`` in place and return what the report says of it."""
        raise NotImplementedError


class QuantizationOptions(StageOptions):
    """Options of a technique that stores linear layers as integers with scales."""

    kind: ClassVar[Kind] = "quantization"

    scheme: Annotated[Scheme, Field(description="Bits of weights and of activations.")] = "W4A16"
    group_size: Annotated[
        int | None,
        Field(
            ge=1,
            le=1_048_576,
            description="Input columns that share a scale; null for one scale per output channel. A layer that it "
            "does not divide falls back to its largest usable divisor, and the report says so.",
        ),
    ] = 128
    symmetric: Annotated[bool, Field(description="No zero-points: code 0 is the value 0.")] = True

    @property
    def num_bits(self) -> int:
        """Bits of one weight."""
        return SCHEME_BITS[self.scheme]
