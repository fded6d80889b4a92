"""What the options of techniques that set single weights to zero as the stream comes past have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from workers.techniques.options import LayerOptions, OptionError
from workers.techniques.sparsity_options import SparsityOptions

if TYPE_CHECKING:
    from workers.engine.layer import Layer

Allocation = Literal["uniform", "error"]


class PruningOptions(SparsityOptions, LayerOptions):
    """Options of a technique that sets single weights of linear layers to zero."""

    allocation: Annotated[
        Allocation,
        Field(
            description="`uniform`: every layer has the same sparsity. `error`: layers that lose more get less, and "
            "others more, at the same number of zeros in every block. What a layer loses is measured beforehand, in a "
            "pass of the uncompressed model over a part of the calibration text."
        ),
    ] = "uniform"

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

    @property
    def is_uniform(self) -> bool:
        """Whether every layer gets exactly ``sparsity``."""
        return super().is_uniform and self.allocation == "uniform"

    def sparsity_of(self, layer: Layer) -> float:
        """What ``layer`` gets: less than is asked for where an N:M mask does not cover all of its columns."""
        sparsity, reason = self.sparsity_of_columns(layer.weight.shape[1])
        if reason is not None:
            layer.fall_back("mask_structure", reason)
        return sparsity

    def at(self, choice: float) -> Self:
        """The stage with the sparsity of one layer."""
        return self.model_copy(update={"sparsity": choice})
