"""Mixed precision: each layer gets as many bits as the model's output needs of it, under one budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from workers.techniques.options import OptionError
from workers.techniques.schemes import PACKED_BITS, SCHEMES, SchemeFacts, WeightScheme
from workers.techniques.second_order import SecondOrderQuantization

_PACKED_SCHEMES: tuple[WeightScheme, ...] = ("W4A16", "W8A16")


class MixedPrecision(SecondOrderQuantization):
    """GPTQ at a width for every group of layers that read one input."""

    summary: ClassVar[str] = (
        "Choose the bits of each layer under a size or an average, by what they cost in divergence from the original."
    )

    technique: Literal["mixed_precision"] = "mixed_precision"
    scheme: Literal["mixed"] = "mixed"  # type: ignore[assignment]  # each layer has one of `schemes`
    schemes: Annotated[
        list[WeightScheme],
        Field(
            min_length=2,
            max_length=7,
            fail_fast=True,
            description="What to choose from. With 4 and 8 bits alone codes are stored packed; with other widths the "
            "values are stored, and the report states the packed size.",
        ),
    ] = list(_PACKED_SCHEMES)  # noqa: RUF012 - pydantic copies it
    average_bits: Annotated[
        float | None,
        Field(ge=2, le=8, description="Most bits a weight, on average over the layers, scales not counted."),
    ] = None
    max_size_bytes: Annotated[
        int | None,
        Field(ge=1, le=2**63 - 1, description="Most bytes of the result's weight files; needs packed codes."),
    ] = None

    @field_validator("schemes")
    @classmethod
    def _are_distinct(cls, value: list[WeightScheme]) -> list[WeightScheme]:
        if len(set(value)) < len(value):
            raise ValueError("must name every scheme once")
        return sorted(value, key=lambda scheme: SCHEMES[scheme].num_bits)

    @model_validator(mode="after")
    def _has_one_budget(self) -> Self:
        if (self.average_bits is None) == (self.max_size_bytes is None):
            raise OptionError(
                "average_bits", "or max_size_bytes must be given, and not both: bits are chosen under one budget"
            )
        widths = [SCHEMES[scheme].num_bits for scheme in self.schemes]
        if self.average_bits is not None and not widths[0] <= self.average_bits < widths[-1]:
            raise OptionError(
                "average_bits",
                f"must be at least {widths[0]} and below {widths[-1]}, as schemes has widths between these",
            )
        if self.max_size_bytes is not None and not set(widths) <= PACKED_BITS:
            raise OptionError(
                "schemes", "must be of 4 and 8 bits with max_size_bytes, as the codes of those are stored packed"
            )
        if self.embeddings:
            raise OptionError(
                "embeddings", "must be false: packed embeddings have to be on the grid of all other layers"
            )
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """The numbers of bits to choose from, fewest first."""
        return tuple(SCHEMES[scheme].num_bits for scheme in self.schemes)

    @property
    def facts(self) -> SchemeFacts:
        """Of the scheme that decides how codes can be stored."""
        return _deciding(self.schemes)

    @classmethod
    def facts_of(cls, stage: Mapping[str, Any]) -> SchemeFacts | None:
        """The same of a stage that is not yet validated; None where it names no scheme."""
        schemes = stage.get("schemes", list(_PACKED_SCHEMES))
        names = schemes[: len(SCHEMES)] if isinstance(schemes, list) else []
        known = [name for name in names if isinstance(name, str) and name in SCHEMES]
        return _deciding(known) if known else None

    @property
    def plan_share(self) -> float:
        """Every group of layers is tried alone."""
        return 0.5

    def at(self, choice: float) -> SecondOrderQuantization:
        """The stage as it is for a layer of so many bits."""
        shared = self.model_dump(include=set(SecondOrderQuantization.model_fields) - {"scheme"})
        return SecondOrderQuantization.model_validate({**shared, "scheme": f"W{int(choice)}A16"})


def _deciding(schemes: Sequence[str]) -> SchemeFacts:
    """The facts of a width that has no packed layout, if there is one, else of the narrowest."""
    found = sorted((SCHEMES[scheme] for scheme in schemes), key=lambda facts: facts.num_bits)
    return next((facts for facts in found if facts.num_bits not in PACKED_BITS), found[0])
