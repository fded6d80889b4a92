"""Width pruning: heads, FFN neurons and hidden channels are left out (Muralidharan et al. 2024)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from workers.techniques.options import Kind, OptionError, Statistic
from workers.techniques.structure_options import Importance, StructureOptions

# Each size and the same as a fraction of the model's own.
_PAIRS = (
    ("intermediate_size", "keep_intermediate"),
    ("num_key_value_heads", "keep_heads"),
    ("hidden_size", "keep_hidden"),
)
_MOST = 2**24


class WidthPruning(StructureOptions):
    """Narrower blocks: arXiv:2407.14679, section 2.2."""

    kind: ClassVar[Kind] = "pruning"
    summary: ClassVar[str] = (
        "Leaves out attention heads, FFN neurons or hidden channels: smaller, and faster on any hardware, without a "
        "loader of ours."
    )

    statistics: ClassVar[frozenset[Statistic]] = frozenset({"unit_norms"})

    technique: Literal["width_pruning"] = "width_pruning"
    importance: Annotated[
        Importance,
        Field(
            description="By what heads, neurons and channels are chosen. `activations`: by how large they are on the "
            "calibration text (L2 over the tokens of a sample, mean over samples), measured once for all. `magnitude`: "
            "by the norm of the weights that go with each; needs no text."
        ),
    ] = "activations"
    intermediate_size: Annotated[
        int | None,
        Field(ge=1, le=_MOST, description="How many FFN neurons of each block stay; this or `keep_intermediate`."),
    ] = None
    keep_intermediate: Annotated[
        float | None,
        Field(gt=0, lt=1, description="The same as a fraction of the model's, rounded to `multiple_of`."),
    ] = None
    num_key_value_heads: Annotated[
        int | None,
        Field(
            ge=1,
            le=_MOST,
            description="How many key-value heads of each block stay, each with all the query heads that read it; "
            "where every head has keys and values of its own, how many heads. This or `keep_heads`.",
        ),
    ] = None
    keep_heads: Annotated[
        float | None, Field(gt=0, lt=1, description="The same as a fraction of the model's, rounded to a whole number.")
    ] = None
    hidden_size: Annotated[
        int | None,
        Field(
            ge=1,
            le=_MOST,
            description="How many channels stay of what goes from block to block; this or `keep_hidden`.",
        ),
    ] = None
    keep_hidden: Annotated[
        float | None,
        Field(gt=0, lt=1, description="The same as a fraction of the model's, rounded to `multiple_of`."),
    ] = None
    multiple_of: Annotated[
        int,
        Field(
            ge=1,
            le=65_536,
            description="What `keep_intermediate` and `keep_hidden` are rounded to a multiple of, to the nearest and "
            "never to zero. Sizes that are given as numbers are taken as they are.",
        ),
    ] = 32

    @model_validator(mode="after")
    def _says_what_stays(self) -> Self:
        for size, fraction in _PAIRS:
            if getattr(self, size) is not None and getattr(self, fraction) is not None:
                raise OptionError(fraction, f"must be left out where {size} is given")
        if all(getattr(self, name) is None for pair in _PAIRS for name in pair):
            raise OptionError(
                "intermediate_size",
                "or another size must be given: intermediate_size, num_key_value_heads or hidden_size, or "
                "keep_intermediate, keep_heads or keep_hidden for a fraction",
            )
        is_rounded = self.keep_intermediate is not None or self.keep_hidden is not None
        if not is_rounded and self.multiple_of != type(self).model_fields["multiple_of"].default:
            raise OptionError(
                "multiple_of", "must be left out where neither keep_intermediate nor keep_hidden is given"
            )
        return self

    @property
    def needs(self) -> frozenset[Statistic]:
        """What tells heads, neurons and channels apart; nothing where their weights do."""
        return self.statistics if self.importance == "activations" else frozenset()

    @property
    def relative_time(self) -> float:
        """One pass, or the time it takes to read the weights."""
        return 0.4 if self.importance == "activations" else 0.05

    @property
    def intermediate_option(self) -> str | None:
        """The option that says how many FFN neurons stay; None where all do."""
        return self._given("intermediate_size", "keep_intermediate")

    @property
    def heads_option(self) -> str | None:
        """The option that says how many key-value heads stay; None where all do."""
        return self._given("num_key_value_heads", "keep_heads")

    @property
    def hidden_option(self) -> str | None:
        """The option that says how many hidden channels stay; None where all do."""
        return self._given("hidden_size", "keep_hidden")

    def size_left(self, option: str | None, before: int, step: int) -> int:
        """How many stay of ``before`` by what ``option`` says, a fraction rounded to a multiple of ``step``.

        Raises:
            OptionError: all would stay, or more.
        """
        if option is None:
            return before
        value: int | float = getattr(self, option)
        if isinstance(value, int):
            if value >= before:
                raise OptionError(option, f"must be below {before}, which the model has")
            return value
        left = max(1, round(before * value / step)) * step
        if left >= before:
            raise OptionError(
                option,
                f"must be less: rounded to a multiple of {step} it leaves {left} of the {before} that the model has",
            )
        return left

    def _given(self, *names: str) -> str | None:
        return next((name for name in names if getattr(self, name) is not None), None)
