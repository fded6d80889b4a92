"""The recipe: everything that decides the bytes of an artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PrivateAttr,
    model_validator,
)

from workers.recipe_parts import (
    BUILTIN_DATASET,
    Calibration,
    Dataset,
    Evaluation,
    NamedText,
    Output,
    Part,
    Training,
    at_most,
)
from workers.recipe_rules import check_stages, check_training, packings_of
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
    placed,
)
from workers.techniques.options import Statistic
from workers.techniques.schemes import ActivationGrid, SchemeFacts

# Of text that nobody asked to be measured on.
_MOST_TOKENS_APART = 4_096


class Recipe(Part):
    """Ordered stages and all that decides the bytes of the artifact."""

    version: Literal[1] = 1
    stages: Annotated[list[Stage], Field(min_length=1, max_length=32), at_most(32)]
    calibration: Calibration = Calibration()
    training: Training | None = None
    evaluation: Evaluation = Evaluation()
    output: Output = Output()
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0

    _params: list[str] = PrivateAttr(default_factory=list)  # of a part of a recipe: where its stages are

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
        while end and isinstance(stage := self.stages[end - 1], LayerOptions) and not stage.leaves_model:
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
        return self.with_stages([(self.param(index), self.stages[index]) for index in range(first, end)])

    def with_stages(self, stages: Sequence[tuple[str, StageOptions]]) -> Recipe:
        """The recipe with these stages alone, each with where it is in the whole recipe."""
        part = self.model_copy(update={"stages": [stage for _, stage in stages]})
        part._params = [param for param, _ in stages]
        return part

    def param(self, index: int) -> str:
        """Where a stage is in the whole recipe, for errors."""
        return self._params[index] if self._params else f"recipe.stages[{index}]"

    @property
    def training_stages(self) -> list[TrainingOptions]:
        """The stages that train, contained ones too."""
        return [stage for _, stage in placed(self.stages) if isinstance(stage, TrainingOptions)]

    @property
    def reads_training_text(self) -> bool:
        """Whether a stage trains on the recipe's training text, and not on what its teacher writes."""
        return any(getattr(stage, "synthetic", None) is None for stage in self.training_stages)

    @property
    def calibrates_on_training_text(self) -> bool:
        """Whether the text that stages train on is calibrated with as well: it says what the model is used for."""
        return self.calibration.dataset is None and self.training is not None and self.reads_training_text

    @property
    def reads_calibration_text(self) -> bool:
        """Whether a text is read for calibration alone."""
        return self.needs_calibration and not self.calibrates_on_training_text

    @property
    def calibration_text(self) -> NamedText:
        """That text, whether or not it is read."""
        calibration = self.calibration
        return NamedText(dataset=calibration.dataset or BUILTIN_DATASET, text_field=calibration.text_field)

    @property
    def texts_read(self) -> dict[str, NamedText]:
        """What the model sees, by the part of the recipe that names it."""
        read: dict[str, NamedText] = {}
        if self.training is not None and self.reads_training_text:
            read["training"] = self.training
        if self.reads_calibration_text:
            read["calibration"] = self.calibration_text
        return read

    @property
    def num_training_tokens(self) -> int | None:
        """How many tokens of the training text are read at most; None where that is decided by its length."""
        if self._counts_tokens or (self.training is not None and self.training.has_labels):
            return None
        wanted = [stage.num_tokens for stage in self.stages if isinstance(stage, TrainingOptions | Iterate)]
        if self.needs_calibration and self.calibrates_on_training_text:
            wanted.append(self.num_read_tokens)
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
        if self.reads_training_text:  # what is asked of the task's own text is measured there
            needed -= {"token_counts", "divergence"}
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
        if not self.reads_calibration_text:
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
        planning = [stage for _, stage in placed(self.stages) if isinstance(stage, LayerOptions)]
        return max((stage.plan_share for stage in planning), default=0.0)

    @property
    def evaluation_apart(self) -> Evaluation | None:
        """What a causal language model is measured on apart from `evaluation`: text of the other kind.

        General text where the evaluation is on the user's own; where that is on general text, the user's own that
        stages read, unless `allow_overlap` has them read all of it. None where the job has no text of the other kind.
        """
        dataset: Dataset = BUILTIN_DATASET
        text_field = "text"
        if self.evaluation.is_general:
            own = next((text for text in self.texts_read.values() if text.dataset != BUILTIN_DATASET), None)
            if own is None or self.evaluation.allow_overlap:
                return None
            dataset, text_field = own.dataset, own.text_field
        return Evaluation(
            dataset=dataset,
            text_field=text_field,
            num_tokens=min(self.evaluation.num_tokens, _MOST_TOKENS_APART),
            max_seq_length=self.evaluation.max_seq_length,
        )

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
