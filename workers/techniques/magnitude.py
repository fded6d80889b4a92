"""Magnitude pruning: the smallest weights of each layer become zero."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from workers.techniques.options import Kind, StageOptions

if TYPE_CHECKING:
    from workers.engine.layer import Layer

_N_OF_M = re.compile(r"([1-9]\d{0,2}):([1-9]\d{0,2})")


class Magnitude(StageOptions):
    """Sets the weights with the least absolute value to zero. Needs no calibration."""

    kind: ClassVar[Kind] = "pruning"
    summary: ClassVar[str] = "Set the smallest weights of each layer to zero. Fast, needs no calibration text."

    technique: Literal["magnitude"] = "magnitude"
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
    def _sparsity_agrees(self) -> Magnitude:
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

    def compress(self, layer: Layer) -> dict[str, Any]:
        """Zero the smallest weights of ``layer``."""
        from workers.solvers.pruning import magnitude_mask

        assert self.sparsity is not None
        return {"num_pruned": layer.prune(magnitude_mask(layer.weight, self.sparsity, self.pattern))}
