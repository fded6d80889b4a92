"""A lesson, taken up: the models are opened, trained, and what became of the student is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from workers.engine.device import keeping_freed_memory
from workers.techniques import DistillationOptions, LoraRecovery, QuantizationAwareFineTuning
from workers.training.adapters import Adapted, adapt
from workers.training.lesson import Lesson
from workers.training.loop import Listener, Loop
from workers.training.model import CHECKPOINT, Whole, write_checkpoint
from workers.training.objective import Objective, matched_blocks
from workers.training.ranks import Ranks
from workers.training.rounding import codes_of, round_weights, stored_values
from workers.training.samples import Samples
from workers.training.step_journal import Curve
from workers.training.teachers import OnlineTeacher


@dataclass(frozen=True)
class Learned:
    """What a training tells of itself when it is over."""

    curve: Curve
    num_steps: int  # that were planned
    fingerprints: list[dict[str, Any]]  # that earlier attempts made steps under
    num_trained_parameters: int
    num_layers: int | None  # that were treated, where that is decided for each
    layers: dict[str, dict[str, Any]]  # those that were pruned
    fallbacks: list[dict[str, Any]]


def learn(lesson: Lesson, ranks: Ranks, listener: Listener) -> Learned:
    """Do this process's part of ``lesson``; the first process hears, and leaves the checkpoint in the lesson's folder.

    Raises:
        UserError: ``non_finite_loss``, ``nothing_changed``, and what opening a model may raise.
    """
    corpus = lesson.corpus()
    stage, student = lesson.stage, lesson.student.open(trains=True)
    if isinstance(stage, DistillationOptions) and stage.initialization == "random":
        student.begin_anew(lesson.seed)
    rounded, adapted, param = {}, Adapted({}, []), lesson.param
    if isinstance(stage, QuantizationAwareFineTuning):
        rounded = round_weights(student, stage, lesson.first_codes)
    elif isinstance(stage, LoraRecovery):
        adapted = adapt(student, stage, lesson.seed, param, keeps_zeros=lesson.keeps_zeros)
    objective = _objective(lesson, student, corpus.samples)
    loop = Loop(student, objective, corpus, lesson, ranks, listener)
    with keeping_freed_memory():
        curve, weights = loop.run()
    layers, fallbacks = loop.masks.report(param)
    if ranks.is_first:
        values, codes = adapted.merged(stored_values(rounded, weights)), codes_of(rounded, weights)
        write_checkpoint(student, values, lesson.folder / CHECKPOINT, codes)
    return Learned(
        curve,
        loop.num_steps,
        loop.journal.fingerprints,
        loop.num_trained_parameters,
        len(layers) or len(adapted.layers) or None,
        layers,
        [*fallbacks, *adapted.fallbacks],
    )


def _objective(lesson: Lesson, student: Whole, samples: Samples) -> Objective:
    """What is minimised; it holds the teacher, where that runs at every step."""
    cached = lesson.cached_teacher(samples)
    if lesson.teacher is None or cached is not None:
        return Objective(student, cached, lesson.weights, ())
    assert isinstance(lesson.stage, DistillationOptions)
    teacher = lesson.teacher.open(trains=False)
    pairs = matched_blocks(student.skeleton.num_blocks, teacher.skeleton.num_blocks)
    soft = OnlineTeacher(teacher, lesson.stage.temperature, causal=lesson.is_causal)
    objective = Objective(student, soft, lesson.weights, pairs)
    if lesson.weights.hidden:
        teacher.keep_states([block for _, block in pairs])
        objective.add_projections(teacher.skeleton.hidden_size, student.skeleton.device)
    return objective
