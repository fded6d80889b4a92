"""What the options of techniques that set weights to zero have in common, whether at once or while they train."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from workers.techniques.options import ChosenLayers, Kind, OptionError

_N_OF_M = re.compile(r"([1-9][0-9]{0,2}):([1-9][0-9]{0,2})")


class SparsityOptions(ChosenLayers):
    """How many weights of linear layers become zero, and in which pattern."""

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

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(N, M): N weights kept in every M, as in Zhou et al. 2021 (arXiv:2102.04010); None when unstructured."""
        match = _N_OF_M.fullmatch(self.mask_structure)
        return (int(match[1]), int(match[2])) if match else None

    @property
    def is_uniform(self) -> bool:
        """Whether every layer gets exactly ``sparsity``."""
        return self.pattern is None

    def sparsity_of_columns(self, columns: int) -> tuple[float, str | None]:
        """What a layer of so many columns gets, and what is to be said of it where that is less than asked for.

        An N:M mask leaves columns that do not fill a group of M as they are.
        """
        assert self.sparsity is not None
        if self.pattern is None:
            return self.sparsity, None
        n, m = self.pattern
        rest = columns % m
        reason = f"{rest} of its {columns} columns stay as they are: {m} does not divide" if rest else None
        return (columns - rest) / columns * (1 - n / m), reason
