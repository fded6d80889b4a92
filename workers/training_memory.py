"""What trainings take of a machine's memory, from a model's config and headers: torch-free, so that both sides ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workers.architectures import architecture_of
from workers.errors import CrashError
from workers.recipe import Recipe
from workers.shapes import config_after
from workers.shapes.matrices import sizes_between_layers
from workers.shapes.parameters import fewest_parameters
from workers.sources.facts import ModelFacts
from workers.techniques import DistillationOptions, Iterate, LoraRecovery, Stage, TrainingOptions, VocabularyPruning

_FLOAT32_BYTES = 4
# Of each parameter, in float32: itself, its gradient, and the two moments of Adam.
_COPIES_IN_TRAINING = 4
# Of each token in a block, what is kept for the way back: states that are as wide as the model, and as its neurons.
_HIDDEN_STATES_KEPT, _INNER_STATES_KEPT = 11, 5
# Rows of logits that are there at a time, and how often: logits, probabilities, gradients, those of the teacher.
_ROWS_OF_LOGITS, _COPIES_OF_LOGITS = 512, 4
# The gradient of the head is summed over those rows, one part at a time.
_COPIES_OF_HEAD = 2


@dataclass(frozen=True)
class TrainingMemory:
    """Of one stage, in one of its processes: bytes at least, for stages before it may leave more than is known yet."""

    param: str  # where the stage is in the recipe
    num_processes: int
    state_bytes: int  # weights, gradients, moments, the best weights and the teacher's: there the whole time
    passing_bytes: int  # activations and logits of a micro-batch, roughly

    @property
    def num_bytes(self) -> int:
        """Of all its processes."""
        return self.num_processes * (self.state_bytes + self.passing_bytes)


def training_memory(recipe: Recipe, facts: ModelFacts) -> list[TrainingMemory]:
    """What each stage of ``recipe`` that trains takes, for the model of ``facts``.

    Raises:
        UserError: as :func:`workers.shapes.config_after` says.
    """
    found = []
    for index, stage in enumerate(recipe.stages):
        inner = stage.stages if isinstance(stage, Iterate) else [stage]
        for number, each in enumerate(inner):
            if isinstance(each, TrainingOptions):
                param = recipe.param(index) + (f".stages[{number}]" if isinstance(stage, Iterate) else "")
                found.append(_memory_of(each, param, recipe.stages[: index + 1], facts))
    return found


def check_training_memory(recipe: Recipe, facts: ModelFacts, free_bytes: int, *, is_shared: bool) -> None:
    """Fail before anything is computed where a stage cannot hold what it trains in ``free_bytes``.

    Processes of a training share these where ``is_shared``: on the CPU. Activations, which are not known as well, do
    not count.

    Raises:
        CrashError: ``out_of_memory``, as where memory runs out later.
    """
    for each in training_memory(recipe, facts):
        num_processes = each.num_processes if is_shared else 1
        wanted = num_processes * each.state_bytes
        if wanted > free_bytes:
            raise CrashError(
                "out_of_memory",
                f"Training holds weights, gradients and the optimizer's state, {wanted:,} bytes at least, and "
                f"{free_bytes:,} are free.",
                param=each.param,
                hint="Use a worker with more memory. Fewer num_processes, no patience, and a teacher whose logits are "
                "kept on disk (teacher_top_k) take less; so does a model that was made smaller before.",
            )


def _memory_of(stage: TrainingOptions, param: str, stages: Sequence[Stage], facts: ModelFacts) -> TrainingMemory:
    """``stages`` are those up to it."""
    config = config_after(stages, facts.config)
    num_parameters = sum(fewest_parameters(stages, facts))
    num_taught = 0
    if isinstance(stage, DistillationOptions) and stage.has_teacher and stage.teacher_top_k is None:
        # The teacher loses tokens with the student, and nothing else.
        shared = [each for each in stages if isinstance(each, VocabularyPruning)]
        num_taught = sum(fewest_parameters(shared, facts))
    # Of adapters there are as many copies, but they are a few hundredths of the weights.
    num_copies = 1 if isinstance(stage, LoraRecovery) else _COPIES_IN_TRAINING + (stage.patience is not None)
    return TrainingMemory(
        param,
        stage.num_processes,
        _FLOAT32_BYTES * (num_copies * num_parameters + num_taught),
        _passing_bytes(stage, config),
    )


def _passing_bytes(stage: TrainingOptions, config: Mapping[str, Any]) -> int:
    """Activations that one micro-batch leaves for the way back, and its logits: float32, with all blocks."""
    architecture, (hidden_size, inner_size) = architecture_of(config), sizes_between_layers(config)
    length = min(stage.max_seq_length, architecture.max_positions(config) or stage.max_seq_length)
    num_tokens = length * min(stage.samples_at_a_time, stage.batch_size)
    num_blocks = int(config[architecture.size("num_hidden_layers")])
    a_token = _HIDDEN_STATES_KEPT * hidden_size + _INNER_STATES_KEPT * inner_size
    if architecture.task != "causal":
        return _FLOAT32_BYTES * num_tokens * num_blocks * a_token
    vocabulary_size = int(config["vocab_size"])
    logits = _COPIES_OF_LOGITS * min(num_tokens, _ROWS_OF_LOGITS) * vocabulary_size
    head = _COPIES_OF_HEAD * vocabulary_size * hidden_size
    return _FLOAT32_BYTES * (num_tokens * num_blocks * a_token + logits + head)
