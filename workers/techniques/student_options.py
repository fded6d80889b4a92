"""The student of a distillation: which shape the model has that is to learn."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from workers.techniques.options import OptionError
from workers.techniques.structure_options import Importance

# Types of language models that follow from their sizes alone. Gemma scales its attention by a number of its own.
Attentive = Literal["llama", "mistral", "qwen2", "qwen3", "phi3", "opt", "gpt2", "gpt_neox"]
Recurrent = Literal["mamba", "mamba2"]
ModelType = Literal[Attentive, Recurrent]
_MOST = 2**24


class Student(BaseModel):
    """A smaller model than the one that the stage finds: some of its blocks and widths, or one of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model_type: Annotated[
        ModelType | None,
        Field(
            description="Of another type of language model, with the same tokenizer; mamba and mamba2 are recurrent. "
            "Null for the type that the model has."
        ),
    ] = None
    num_layers: Annotated[
        int | None,
        Field(
            ge=1,
            le=10_000,
            description="How many blocks: of the model's own type, evenly spaced among its blocks, the first and the "
            "last with them.",
        ),
    ] = None
    num_heads: Annotated[
        int | None,
        Field(
            ge=1,
            le=_MOST,
            description="How many attention heads. Of the model's own type they stay as wide as they are, and as many "
            "share keys and values.",
        ),
    ] = None
    intermediate_size: Annotated[
        int | None,
        Field(ge=1, le=_MOST, description="FFN neurons of each block; of another type 4 × `hidden_size` by default."),
    ] = None
    hidden_size: Annotated[
        int | None, Field(ge=1, le=_MOST, description="Channels of what goes from block to block.")
    ] = None
    initialization: Annotated[
        Literal["copy", "random"],
        Field(
            description="`copy`: what the model has that the student has too; of another type that is the embedding, "
            "and the head, if they are as wide. `random`: nothing."
        ),
    ] = "copy"
    importance: Annotated[
        Importance,
        Field(
            description="By what heads, neurons and channels are chosen that are copied: as `width_pruning` does, "
            "`activations` on the calibration text, or `magnitude` of weights."
        ),
    ] = "activations"

    @model_validator(mode="after")
    def _is_a_shape(self) -> Self:
        if self.model_type is None:
            if all(
                size is None for size in (self.num_layers, self.num_heads, self.intermediate_size, self.hidden_size)
            ):
                raise OptionError(
                    "num_layers", "or another size must be given: num_heads, intermediate_size or hidden_size"
                )
            return self
        for name in ("num_layers", "hidden_size"):
            if getattr(self, name) is None:
                raise OptionError(name, f"must be given with model_type {self.model_type}")
        if self.is_recurrent:
            for name in ("num_heads", "intermediate_size"):
                if getattr(self, name) is not None:
                    raise OptionError(name, f"must be left out: a {self.model_type} has no attention and no FFN")
        elif self.num_heads is None:
            raise OptionError("num_heads", f"must be given with model_type {self.model_type}")
        elif self.hidden_size is not None and self.hidden_size % (2 * self.num_heads):
            raise OptionError(
                "num_heads", f"must divide hidden_size, {self.hidden_size}, into heads of an even number of columns"
            )
        return self

    @model_validator(mode="after")
    def _copies_what_it_chooses(self) -> Self:
        if self.importance != type(self).model_fields["importance"].default and not self.chooses_units:
            raise OptionError("importance", "must be left out where no heads, neurons or channels are copied")
        return self

    @property
    def is_recurrent(self) -> bool:
        """Whether it is of a type without attention."""
        return self.model_type in get_args(Recurrent)

    @property
    def is_cut(self) -> bool:
        """Whether it consists of parts of the model."""
        return self.model_type is None and self.initialization == "copy"

    @property
    def chooses_units(self) -> bool:
        """Whether heads, neurons or channels of the model are chosen among."""
        return self.is_cut and self._has_widths

    @property
    def _has_widths(self) -> bool:
        return any(size is not None for size in (self.num_heads, self.intermediate_size, self.hidden_size))
