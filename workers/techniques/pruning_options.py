"""What the options of techniques that set single weights to zero have in common."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from workers.techniques.options import Kind, LayerOptions, OptionError

if TYPE_CHECKING:
    from workers.engine.layer import Layer

Allocation = Literal["uniform", "error"]
_N_OF_M = re.compile(r"([1-9][0-9]{0,2}):([1-9][0-9]{0,2})")


class PruningOptions(LayerOptions):
    """Options of a technique that sets single weights of linear layers to zero."""

    kind: ClassVar[Kind] = "pruning"

    sparsity: Annotated[
        float | None,
        Field(
            gt=0,
            lt=1,
            description="Fraction of weights that become zero. Left out: what an N:M mask gives, else 0.5.",
        ),
    ] = None
    mask_structure: Annotated[
        str,
        Field(
            description="`unstructured`, or `N:M`: at most N of every M consecutive input columns are not zero, "
            "for example `2:4`."
        ),
    ] = "unstructured"

    allocation: Annotated[
        Allocation,
        Field(
            description="`uniform`: every layer has the same sparsity. `error`: layers that lose more get less, and "
            "others more, at the same number of zeros in every block. What a layer loses is measured beforehand, in a "
            "pass of the uncompressed model over a part of the calibration text."
        ),
    ] = "uniform"

    @field_validator("mask_structure", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError("must be text; in YAML quote it, as in `'2:4'`, which is a number without")  # noqa: TRY004
        return value

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
                raise OptionError(
                    "sparsity", f"must be {1 - n / m:g} with mask_structure {self.mask_structure}; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _mask_leaves_a_choice(self) -> Self:
        if self.pattern is not None and self.allocation != "uniform":
            raise OptionError(
                "allocation",
                f"must be uniform with mask_structure {self.mask_structure}, which gives all layers one sparsity",
            )
        return self

    @property
    def plan_share(self) -> float:
        """A short pass, where layers have sparsities of their own."""
        return 0.1 if self.allocation == "error" else 0.0

    def sparsity_of(self, layer: Layer) -> float:
        """What ``layer`` gets: less than is asked for where an N:M mask does not cover all of its columns."""
        assert self.sparsity is not None
        if self.pattern is None:
            return self.sparsity
        columns, (n, m) = layer.weight.shape[1], self.pattern
        rest = columns % m
        if rest:
            layer.fall_back("mask_structure", f"{rest} of its {columns} columns stay as they are: {m} does not divide")
        return (columns - rest) / columns * (1 - n / m)

    def at(self, choice: float) -> Self:
        """The stage with the sparsity of one layer."""
        return self.model_copy(update={"sparsity": choice})

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(N, M): N weights kept in every M, as in Zhou et al. 2021 (arXiv:2102.04010); None when unstructured."""
        match = _N_OF_M.fullmatch(self.mask_structure)
        return (int(match[1]), int(match[2])) if match else None
