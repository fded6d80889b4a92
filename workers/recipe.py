"""The recipe: everything that decides the bytes of an artifact."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from workers.recipe_rules import Packing, check_stages, check_training, packings_of
from workers.techniques import (
    TECHNIQUES,
    Iterate,
    LayerOptions,
    PruningOptions,
    QuantizationAwareFineTuning,
    QuantizationOptions,
    SlidingWindow,
    Stage,
    StageOptions,
    TrainingOptions,
)
from workers.techniques.options import Statistic
from workers.techniques.schemes import ActivationGrid, SchemeFacts

RECIPE_VERSION: Literal[1] = 1

Format = Literal["compressed-tensors", "bitsandbytes", "safetensors", "sparse-bitmask"]

_DATASET = re.compile(r"(builtin|hub|file):[^\x00-\x1f\x7f]{1,500}")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def at_most(limit: int) -> BeforeValidator:
    """Refuse a longer list or object before its items are looked at: each wrong one would cost an error of its own."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > limit:
            raise ValueError(f"at most {limit} are taken, and {len(value)} were sent")
        return value

    return BeforeValidator(check)


class InlineDataset(_Part):
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


class Calibration(_Part):
    """Text that is run through the model to gather statistics."""

    dataset: Dataset = BUILTIN_DATASET
    text_field: Annotated[str, Field(max_length=200)] = "text"
    num_samples: Annotated[int, Field(ge=1, le=65_536)] = 128
    max_seq_length: Annotated[int, Field(ge=8, le=131_072, description="Tokens a sample.")] = 512


class Training(_Part):
    """Text, and labels where there are any, for stages that train."""

    dataset: Dataset
    text_field: Annotated[str, Field(max_length=200)] = "text"
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


class Evaluation(_Part):
    """Held-out text on which the original and the result are measured."""

    dataset: Dataset = BUILTIN_DATASET
    text_field: Annotated[str, Field(max_length=200)] = "text"
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


class Output(_Part):
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


class Recipe(_Part):
    """Ordered stages and all that decides the bytes of the artifact."""

    version: Literal[1] = 1
    stages: Annotated[list[Stage], Field(min_length=1, max_length=32), at_most(32)]
    calibration: Calibration = Calibration()
    training: Training | None = None
    evaluation: Evaluation = Evaluation()
    output: Output = Output()
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0

    _first_stage: int = PrivateAttr(0)  # of a part of a recipe: where it begins

    @model_validator(mode="before")
    @classmethod
    def _resolve_output(cls, data: Any) -> Any:
        """Fill in the format and packing, so that a stored recipe says them."""
        if not isinstance(data, Mapping):
            return data
        output = data.get("output", {})
        stages = data.get("stages")
        if not isinstance(output, Mapping) or not isinstance(stages, list):
            return data
        output = dict(output)
        schemes = [scheme for scheme in map(_scheme_of, stages) if scheme is not None]
        packings = [packing for scheme in schemes for packing in packings_of(scheme)[:1]]
        if output.get("format") is None:
            codes = "bitsandbytes" if any(scheme.is_normal for scheme in schemes) else "safetensors"
            output["format"] = "compressed-tensors" if packings else codes
        if output["format"] == "compressed-tensors" and output.get("packing") is None:
            output["packing"] = packings[0] if packings else "pack-quantized"
        return {**data, "output": output}

    @model_validator(mode="after")
    def _stages_fit(self) -> Recipe:
        check_stages(self.stages, self.output)
        check_training(self.stages, self.training)
        return self

    @property
    def early_stages(self) -> Sequence[Stage]:
        """The stages before the last run of those that compress layers: each run of them leaves a whole model."""
        end = len(self.stages)
        if self.trains_codes:
            return self.stages[: end - 1]
        while end and isinstance(self.stages[end - 1], LayerOptions):
            end -= 1
        return self.stages[:end]

    @property
    def trains_codes(self) -> bool:
        """Whether the last stage trains weights as the codes that it then stores."""
        return any(isinstance(stage, QuantizationAwareFineTuning) for stage in self.stages[-1:])

    @property
    def late(self) -> Recipe:
        """The recipe of the stages after those, which compress layers while the artifact is written."""
        return self.part(len(self.early_stages), len(self.stages))

    def part(self, first: int, end: int) -> Recipe:
        """The recipe of some of the stages alone."""
        return self.with_stages(self.stages[first:end], first)

    def with_stages(self, stages: Sequence[StageOptions], first: int) -> Recipe:
        """The recipe with other stages, in place of those from ``first`` on."""
        part = self.model_copy(update={"stages": list(stages)})
        part._first_stage = first
        return part

    def param(self, index: int) -> str:
        """Where a stage is in the whole recipe, for errors."""
        return f"recipe.stages[{self._first_stage + index}]"

    @property
    def training_stages(self) -> list[TrainingOptions]:
        """The stages that train, contained ones too."""
        contained = [inner for stage in self.stages if isinstance(stage, Iterate) for inner in stage.training]
        return [stage for stage in self.stages if isinstance(stage, TrainingOptions)] + contained

    @property
    def reads_training_text(self) -> bool:
        """Whether a stage trains on the recipe's training text, and not on what its teacher writes."""
        return any(getattr(stage, "synthetic", None) is None for stage in self.training_stages)

    @property
    def num_training_tokens(self) -> int | None:
        """How many tokens of the training text are read at most; None where that is decided by its length."""
        wanted = [stage.num_tokens for stage in self.training_stages]
        if self._counts_tokens or (self.training is not None and self.training.has_labels):
            return None
        return None if None in wanted else max((num for num in wanted if num is not None), default=0)

    @property
    def layer_stages(self) -> list[LayerOptions]:
        """The stages after them, which compress linear layers, all in one pass."""
        return [stage for stage in self.stages if isinstance(stage, LayerOptions)]

    @property
    def statistics(self) -> frozenset[Statistic]:
        """What the stages want to know of every layer's input."""
        return frozenset[Statistic]().union(*(stage.needs for stage in self.layer_stages))

    @property
    def needs_calibration(self) -> bool:
        """Whether text is run through the model: for the stages, or for a plan of how to treat each layer."""
        needed = frozenset[Statistic]().union(self.statistics, *(stage.needs for stage in self.early_stages))
        if self.reads_training_text:  # text of the task is counted there
            needed -= {"token_counts"}
        return bool(needed or self.plan_share or self._begins_with_gptq)

    @property
    def _begins_with_gptq(self) -> bool:
        stage = self.quantization
        return isinstance(stage, QuantizationAwareFineTuning) and stage.initialization == "gptq"

    @property
    def _counts_tokens(self) -> bool:
        return any("token_counts" in stage.needs for stage in self.early_stages)

    @property
    def num_calibration_tokens(self) -> int | None:
        """As many tokens of calibration text are enough; None where a stage counts those of all there is."""
        if not self.needs_calibration:
            return 0
        if self._counts_tokens and not self.reads_training_text:
            return None
        return self.num_read_tokens

    @property
    def num_read_tokens(self) -> int:
        """As many tokens of calibration text are run through the model, if any are."""
        return self.calibration.num_samples * self.calibration.max_seq_length

    @property
    def calibrates_on_original(self) -> bool:
        """Whether calibration text goes through the layers as they were, and not through those compressed before.

        Where norms of inputs are all that is asked for, nothing makes up for what earlier layers have lost, and at 50 %
        the original's choose better. For N:M masks, which cost more, they do not (docs/performance.md).
        """
        has_patterns = any(isinstance(stage, PruningOptions) and stage.pattern is not None for stage in self.stages)
        return self.statistics == {"input_norms"} and not has_patterns

    @property
    def plan_share(self) -> float:
        """What part of the time goes into a plan of how to treat each layer; 0 where there is none."""
        contained = [stage.pruning for stage in self.stages if isinstance(stage, Iterate)]
        planning = [stage for stage in (*self.stages, *contained) if isinstance(stage, LayerOptions)]
        return max((stage.plan_share for stage in planning), default=0.0)

    @property
    def stores_codes(self) -> bool:
        """Whether quantized layers are stored as codes, and not as the values that those stand for."""
        return self.output.format in ("compressed-tensors", "bitsandbytes")

    @property
    def stores_bitmasks(self) -> bool:
        """Whether pruned weights are stored as a bitmask and the values that are left."""
        return self.output.format == "sparse-bitmask"

    @property
    def cast(self) -> str | None:
        """The type of torch's that every tensor is stored in, if the recipe casts the model."""
        return None if self.quantization is None else self.quantization.facts.dtype

    @property
    def quantizes_embeddings(self) -> bool:
        """Whether the token embedding and the head are rounded too."""
        return self.quantization is not None and self.quantization.embeddings

    @property
    def activations(self) -> ActivationGrid | None:
        """What quantized layers round their input to whenever the model runs; None where it stays as it is."""
        return None if self.quantization is None else self.quantization.activations

    @property
    def window(self) -> int | None:
        """How many tokens attention sees once all stages are done, if a stage gives it a window."""
        windows = [stage.window for stage in self.stages if isinstance(stage, SlidingWindow)]
        return windows[-1] if windows else None

    @property
    def quantization(self) -> QuantizationOptions | None:
        """The stage that quantizes, if there is one."""
        return next((stage for stage in self.stages if isinstance(stage, QuantizationOptions)), None)


def _scheme_of(stage: object) -> SchemeFacts | None:
    """What the scheme of a stage, not yet validated, says; None where there is none."""
    technique = TECHNIQUES.get(str(stage.get("technique"))) if isinstance(stage, Mapping) else None
    if technique is None or not issubclass(technique, QuantizationOptions):
        return None
    assert isinstance(stage, Mapping)
    return technique.facts_of(stage)
