"""Vocabulary pruning: tokens that a text never uses are left out, and with them their rows of the model."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from workers.techniques.options import Kind, OptionError, Statistic
from workers.techniques.structure_options import StructureOptions


class VocabularyPruning(StructureOptions):
    """Fewer tokens: a smaller tokenizer, embedding and head, as vocabulary trimming does it; arXiv:2305.15020."""

    kind: ClassVar[Kind] = "pruning"
    summary: ClassVar[str] = "Leaves out tokens that your text never uses: it is read as before, by a smaller model."

    statistics: ClassVar[frozenset[Statistic]] = frozenset({"token_counts"})

    technique: Literal["vocabulary_pruning"] = "vocabulary_pruning"
    min_count: Annotated[
        int, Field(ge=1, le=2**31 - 1, description="Tokens that occur at least so often in the calibration text stay.")
    ] = 1
    num_tokens: Annotated[
        int | None,
        Field(
            ge=1,
            le=2**24,
            description="At most so many tokens stay, the most frequent first. Null for no limit.",
        ),
    ] = None
    keep: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1000)]],
        Field(
            max_length=100_000,
            fail_fast=True,
            description="Tokens that stay always, as the vocabulary spells them.",
        ),
    ] = []  # noqa: RUF012 - pydantic copies it
    multiple_of: Annotated[
        int,
        Field(
            ge=1,
            le=1024,
            description="Fill the tokens up to a multiple of this with the next ones: some hardware likes 64 or 128.",
        ),
    ] = 1

    @model_validator(mode="after")
    def _limits_fit(self) -> Self:
        if self.num_tokens is not None and self.num_tokens % self.multiple_of:
            raise OptionError("num_tokens", f"must be a multiple of multiple_of, {self.multiple_of}")
        return self

    @property
    def relative_time(self) -> float:
        """The text is tokenized three times; nothing is computed."""
        return 0.1
