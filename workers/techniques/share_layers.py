"""Cross-layer sharing: several blocks have the same parameters (Dehghani et al. 2018; Lan et al. 2019)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from workers.techniques.options import Kind, OptionError
from workers.techniques.structure_options import StructureOptions

Method = Literal["first", "mean"]
BlockIndex = Annotated[int, Field(ge=0, le=10_000)]


class ShareLayers(StructureOptions):
    """Groups of blocks with one set of parameters; arXiv:1807.03819, arXiv:1909.11942."""

    kind: ClassVar[Kind] = "sharing"
    summary: ClassVar[str] = (
        "Gives groups of blocks one set of parameters, stored once; costs much without training. Opened by a loader "
        "that lies in the artifact."
    )

    technique: Literal["share_layers"] = "share_layers"
    group_size: Annotated[
        int | None,
        Field(
            ge=2,
            le=10_000,
            description="So many blocks, one after another, share: from the first block on, what is left over too. "
            "This or `groups`.",
        ),
    ] = None
    groups: Annotated[
        list[Annotated[list[BlockIndex], Field(min_length=2, max_length=10_000, fail_fast=True)]] | None,
        Field(
            min_length=1,
            max_length=5_000,
            fail_fast=True,
            description="Which blocks share, counted from 0: lists of two or more. Blocks in none keep their own.",
        ),
    ] = None
    method: Annotated[
        Method,
        Field(description="What a group has: the parameters of its `first` block, or the `mean` of all its blocks'."),
    ] = "first"

    @model_validator(mode="after")
    def _says_which(self) -> Self:
        if (self.group_size is None) == (self.groups is None):
            raise OptionError("group_size", "or groups must be given, and not both")
        named = [block for group in self.groups or [] for block in group]
        if len(set(named)) < len(named):
            raise OptionError("groups", "must name each block once")
        return self

    def groups_of(self, num_blocks: int) -> list[list[int]]:
        """The groups of a model's blocks that share, in order.

        Raises:
            OptionError: a model of so many blocks has none such.
        """
        if self.groups is not None:
            if beyond := [block for group in self.groups for block in group if block >= num_blocks]:
                raise OptionError("groups", f"must name blocks below {num_blocks}, the number of blocks: {beyond[0]}")
            return sorted(sorted(group) for group in self.groups)
        assert self.group_size is not None
        blocks = list(range(num_blocks))
        groups = [blocks[first : first + self.group_size] for first in range(0, num_blocks, self.group_size)]
        groups = [group for group in groups if len(group) > 1]
        if not groups:
            raise OptionError("group_size", "has to leave groups of two: the model has one block")
        return groups
