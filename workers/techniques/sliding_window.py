"""Sliding-window attention: each token sees those right before it alone (Beltagy et al. 2020; Jiang et al. 2023)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from workers.techniques.options import Kind, OptionError
from workers.techniques.structure_options import StructureOptions


class SlidingWindow(StructureOptions):
    """A local window in place of full attention, as in arXiv:2004.05150 and, for language models, arXiv:2310.06825."""

    kind: ClassVar[Kind] = "attention"
    summary: ClassVar[str] = "Lets each token see a window of the last ones alone: the KV cache grows no larger."

    technique: Literal["sliding_window"] = "sliding_window"
    window: Annotated[
        int, Field(ge=8, le=16_777_216, description="Tokens that a token sees in one block, itself among them.")
    ] = 4_096
    full_blocks: Annotated[
        list[Annotated[int, Field(ge=0, le=10_000)]] | None,
        Field(
            max_length=10_000,
            fail_fast=True,
            description="Blocks, from 0, that go on seeing everything, where the model's type can say so (qwen2, "
            "qwen3). Null for those that do now if blocks differ already, else none.",
        ),
    ] = None

    @model_validator(mode="after")
    def _names_each_once(self) -> Self:
        if self.full_blocks is not None and len(set(self.full_blocks)) < len(self.full_blocks):
            raise OptionError("full_blocks", "must name each block once")
        return self
