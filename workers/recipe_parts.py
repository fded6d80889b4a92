"""What a recipe says beside its stages: texts to calibrate, train and evaluate with, and the form of the artifact."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from workers.recipe_rules import Packing

Format = Literal["compressed-tensors", "bitsandbytes", "safetensors", "sparse-bitmask"]

_DATASET = re.compile(r"(builtin|hub|file):[^\x00-\x1f\x7f]{1,500}")


class Part(BaseModel):
    """A part of a recipe: nothing in it is unknown, changed later, or of another type than it says."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def at_most(limit: int) -> BeforeValidator:
    """Refuse a longer list or object before its items are looked at: each wrong one would cost an error of its own."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > limit:
            raise ValueError(f"at most {limit} are taken, and {len(value)} were sent")
        return value

    return BeforeValidator(check)


class InlineDataset(Part):
    """Texts sent with the request."""

    texts: Annotated[
        list[Annotated[str, Field(max_length=1_000_000)]],
        Field(min_length=1, max_length=100_000, fail_fast=True),
    ]
    labels: Annotated[list[str | int], Field(max_length=100_000, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _has_text(self) -> InlineDataset:
        if not any(text.strip() for text in self.texts):
            raise PydanticCustomError("empty_dataset", "every text is empty; send at least one text with words in it")
        if self.labels is not None and len(self.labels) != len(self.texts):
            raise ValueError(f"{len(self.labels)} labels for {len(self.texts)} texts; send one label a text")
        return self


def _known_source(value: str) -> str:
    if not _DATASET.fullmatch(value):
        raise ValueError("must be builtin:NAME, hub:NAME[:CONFIG][:SPLIT], file:NAME, or an object with texts")
    if value.startswith("builtin:") and value != BUILTIN_DATASET:
        raise ValueError(f"unknown built-in dataset; the one there is: {BUILTIN_DATASET}")
    return value


BUILTIN_DATASET = "builtin:python-docs"
Dataset = Annotated[str, AfterValidator(_known_source)] | InlineDataset


def _checked_label_field(value: str | None, info: ValidationInfo) -> str | None:
    dataset = info.data.get("dataset")
    if value is not None and isinstance(dataset, InlineDataset) and dataset.labels is None:
        raise ValueError("inline texts have no fields; send `labels` beside them")
    return value


class NamedText(Part):
    """Text of documents, and of files with fields the one that holds it."""

    dataset: Dataset
    text_field: Annotated[str, Field(max_length=200)] = "text"


class Calibration(Part):
    """Text that is run through the model to gather statistics."""

    dataset: Annotated[
        Dataset | None,
        Field(description=f"Null for the training text where stages read one, and else {BUILTIN_DATASET}."),
    ] = None
    text_field: Annotated[str, Field(max_length=200)] = "text"
    num_samples: Annotated[int, Field(ge=1, le=65_536)] = 128
    max_seq_length: Annotated[int, Field(ge=8, le=131_072, description="Tokens a sample.")] = 512


class Training(NamedText):
    """Text, and labels where there are any, for stages that train."""

    label_field: Annotated[
        str | None,
        Field(
            max_length=200,
            description="Field of a row that holds its class, where a classifier is trained. Inline texts have "
            "`labels` beside them instead.",
        ),
    ] = None

    @field_validator("label_field")
    @classmethod
    def _names_a_field(cls, value: str | None, info: ValidationInfo) -> str | None:
        return _checked_label_field(value, info)

    @property
    def has_labels(self) -> bool:
        """Whether it is said where the labels of the text are."""
        beside = isinstance(self.dataset, InlineDataset) and self.dataset.labels is not None
        return beside or self.label_field is not None


class Evaluation(NamedText):
    """Held-out text on which the original and the result are measured."""

    dataset: Dataset = BUILTIN_DATASET
    num_tokens: Annotated[int, Field(ge=64, le=4_194_304)] = 16_384
    max_seq_length: Annotated[int, Field(ge=16, le=131_072, description="Tokens a window.")] = 1_024
    label_field: Annotated[
        str | None,
        Field(
            max_length=200,
            description="Field of a row that holds its class, by name or number: a classifier's accuracy is measured. "
            "Inline texts have `labels` beside them instead.",
        ),
    ] = None
    allow_overlap: Annotated[bool, Field(description="Keep text that calibration or training also uses.")] = False
    prompt: Annotated[
        str, Field(min_length=1, max_length=4_000, description="Continued by both models, side by side, in the report.")
    ] = "The capital of France is"

    @field_validator("label_field")
    @classmethod
    def _names_a_field(cls, value: str | None, info: ValidationInfo) -> str | None:
        return _checked_label_field(value, info)

    @property
    def is_general(self) -> bool:
        """Whether it is the text that comes with Attar, and not the user's own."""
        return self.dataset == BUILTIN_DATASET


class Output(Part):
    """The form of the artifact. A null format is chosen by the stages."""

    format: Annotated[
        Format | None,
        Field(
            description="compressed-tensors: codes of quantized layers; safetensors: every value; sparse-bitmask, if "
            "all stages prune: a bit for each weight and the values that are left, opened by the artifact's own loader."
        ),
    ] = None
    packing: Annotated[
        Packing | None,
        Field(
            description="How compressed-tensors stores codes: packed into 32-bit words, or one byte each (8 bits; "
            "FP8 as floats). Null for what the scheme is stored in."
        ),
    ] = None
