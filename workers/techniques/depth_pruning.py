"""Depth pruning: whole blocks are left out (Men et al. 2024; Kim et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from workers.techniques.options import Kind, OptionError, Statistic
from workers.techniques.structure_options import StructureOptions

Method = Literal["block_influence", "perplexity", "divergence", "list"]


class DepthPruning(StructureOptions):
    """Fewer blocks; arXiv:2403.03853 for their influence, arXiv:2402.02834 for their perplexity."""

    kind: ClassVar[Kind] = "pruning"
    summary: ClassVar[str] = "Leaves out whole blocks: smaller, and faster on any hardware, without a loader of ours."

    statistics: ClassVar[frozenset[Statistic]] = frozenset({"block_influence"})

    technique: Literal["depth_pruning"] = "depth_pruning"
    method: Annotated[
        Method,
        Field(
            description="Which blocks go. `block_influence`: those whose output is most like their input (cosine, mean "
            "over tokens), measured once. `perplexity`: one after another, each time the one without which perplexity "
            "on the calibration text is lowest; takes as many times longer as the model has blocks. `divergence`: the "
            "same for classifiers, by the KL divergence of the classes from what the whole model says of the training "
            "text, or else of the calibration text. `list`: `blocks`."
        ),
    ] = "block_influence"
    num_blocks: Annotated[
        int | None, Field(ge=1, le=10_000, description="How many blocks are left out; this or `fraction`.")
    ] = None
    fraction: Annotated[
        float | None, Field(gt=0, lt=1, description="The same as a fraction of the model's blocks, rounded down.")
    ] = None
    blocks: Annotated[
        list[Annotated[int, Field(ge=0, le=10_000)]] | None,
        Field(min_length=1, max_length=10_000, fail_fast=True, description="Which ones, from 0, if `method` is list."),
    ] = None
    keep_first: Annotated[int, Field(ge=0, le=10_000, description="Of the first blocks, so many stay.")] = 1
    keep_last: Annotated[int, Field(ge=0, le=10_000, description="Of the last blocks, so many stay.")] = 1

    @model_validator(mode="after")
    def _says_which(self) -> Self:
        if self.method == "list":
            if self.blocks is None:
                raise OptionError("blocks", "must list the blocks to leave out where method is list")
            if len(set(self.blocks)) < len(self.blocks):
                raise OptionError("blocks", "must name each block once")
            for name in ("num_blocks", "fraction"):
                if getattr(self, name) is not None:
                    raise OptionError(name, "must be left out where method is list")
            for name in ("keep_first", "keep_last"):
                if getattr(self, name) not in (0, type(self).model_fields[name].default):
                    raise OptionError(name, "must be left out where method is list, which says which blocks stay")
            return self
        if self.blocks is not None:
            raise OptionError("blocks", f"must be left out where method is {self.method}; give num_blocks or fraction")
        if (self.num_blocks is None) == (self.fraction is None):
            raise OptionError("num_blocks", "or fraction must be given, and not both")
        return self

    @property
    def needs(self) -> frozenset[Statistic]:
        """What tells blocks apart; nothing for a list."""
        needed: dict[Method, frozenset[Statistic]] = {
            "perplexity": frozenset({"losses"}), "divergence": frozenset({"divergence"}), "list": frozenset()
        }  # fmt: skip
        return needed.get(self.method, self.statistics)

    @property
    def relative_time(self) -> float:
        """One pass, or as many as there are blocks for each that is left out."""
        return {"block_influence": 0.4, "perplexity": 4.0, "divergence": 4.0, "list": 0.01}[self.method]

    def num_removed(self, num_blocks: int) -> int:
        """How many of a model's blocks are left out."""
        if self.blocks is not None:
            return len(self.blocks)
        if self.num_blocks is not None:
            return self.num_blocks
        return math.floor(num_blocks * (self.fraction or 0) + 1e-9)  # 0.29 of 100 are 29, whatever floats make of it

    def candidates(self, num_blocks: int) -> Sequence[int]:
        """The blocks of a model, from 0, that may be left out."""
        if self.blocks is not None:
            return sorted(self.blocks)
        return range(self.keep_first, max(self.keep_first, num_blocks - self.keep_last))

    def check(self, num_blocks: int) -> None:
        """Raise OptionError where a model of so many blocks cannot lose what is asked for."""
        removed, candidates = self.num_removed(num_blocks), self.candidates(num_blocks)
        if self.blocks is not None:
            if beyond := [index for index in self.blocks if index >= num_blocks]:
                raise OptionError("blocks", f"must be below {num_blocks}, the number of blocks, not {beyond[0]}")
            if removed == num_blocks:
                raise OptionError("blocks", f"must leave at least one of the model's {num_blocks} blocks")
            return
        option = "num_blocks" if self.num_blocks is not None else "fraction"
        if num_blocks == 1:
            raise OptionError("technique", "must be another: the model has one block, and none can go")
        if removed >= num_blocks:
            raise OptionError(option, f"must leave at least one of the model's {num_blocks} blocks")
        if not candidates:
            raise OptionError("keep_first", f"and keep_last must spare fewer than the model's {num_blocks} blocks")
        if removed == 0:
            least = f"at least {math.ceil(1000 / num_blocks) / 1000}"
            raise OptionError(option, f"must be {least}: of {num_blocks} blocks it leaves out none")
        if removed > len(candidates):
            raise OptionError(
                option,
                f"must leave out at most {len(candidates)} blocks: of {num_blocks}, keep_first and keep_last spare "
                f"{num_blocks - len(candidates)}",
            )
