"""What the options of every technique have in common."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

if TYPE_CHECKING:
    from workers.engine.layer import Layer

Kind = Literal["pruning", "quantization", "distillation", "factorization", "sharing", "training"]
Scheme = Literal["W4A16", "W8A16"]
Statistic = Literal["hessian", "input_norms"]

SCHEME_BITS: dict[str, int] = {"W4A16": 4, "W8A16": 8}

# Smaller groups would store more scale than code, and packed words hold eight 4-bit codes.
SMALLEST_GROUP = 16
GROUP_MULTIPLE = 8
_N_OF_M = re.compile(r"([1-9]\d{0,2}):([1-9]\d{0,2})")


Damping = Annotated[
    float,
    Field(
        gt=0,
        le=1,
        description="Added to the Hessian's diagonal, as a fraction of its mean; grown until the Cholesky "
        "factorization succeeds.",
    ),
]


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
            fail_fast=True,
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


class PruningOptions(StageOptions):
    """Options of a technique that sets single weights of linear layers to zero."""

    kind: ClassVar[Kind] = "pruning"

    sparsity: Annotated[
        float | None,
        Field(gt=0, lt=1, description="Fraction of weights that become zero; with N:M it follows from the mask."),
    ] = None
    mask_structure: Annotated[
        str,
        Field(
            description="`unstructured`, or `N:M`: at most N of every M consecutive input columns are not zero, "
            "for example `2:4`."
        ),
    ] = "unstructured"

    @field_validator("mask_structure")
    @classmethod
    def _known_structure(cls, value: str) -> str:
        match = _N_OF_M.fullmatch(value)
        if value != "unstructured" and (match is None or int(match[1]) >= int(match[2])):
            raise ValueError("must be `unstructured` or `N:M` with N below M, for example `2:4`")
        return value

    @model_validator(mode="before")
    @classmethod
    def _sparsity_of_mask(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("sparsity") is None:
            match = _N_OF_M.fullmatch(str(data.get("mask_structure", "unstructured")))
            fraction = 1 - int(match[1]) / int(match[2]) if match and int(match[1]) < int(match[2]) else 0.5
            return {**data, "sparsity": fraction}
        return data

    @model_validator(mode="after")
    def _sparsity_agrees(self) -> Self:
        if self.pattern is not None and self.sparsity is not None:
            n, m = self.pattern
            if abs(self.sparsity - (1 - n / m)) > 1e-6:
                raise ValueError(
                    f"sparsity must be {1 - n / m:g} with mask_structure {self.mask_structure}; leave it out"
                )
        return self

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(N, M): N weights kept in every M, as in Zhou et al. 2021 (arXiv:2102.04010); None when unstructured."""
        match = _N_OF_M.fullmatch(self.mask_structure)
        return (int(match[1]), int(match[2])) if match else None
