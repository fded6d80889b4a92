"""One stage of a recipe that trains: from a model, and what it learns from, to a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.engine.device import keeping_freed_memory, release_memory
from workers.engine.journal import Journal
from workers.engine.skeleton import Skeleton
from workers.errors import UserError
from workers.recipe import Recipe
from workers.techniques import DistillationOptions, QuantizationAwareFineTuning, TrainingOptions
from workers.techniques.training_options import Augmentation
from workers.texts import Texts
from workers.training.loop import TOKENS_A_MICRO_BATCH, Corpus, Loop, thinned
from workers.training.model import CHECKPOINT, Whole, open_whole, write_checkpoint
from workers.training.objective import Objective, Weights, matched_blocks
from workers.training.rounding import codes_of, round_weights, stored_values
from workers.training.samples import (
    Augmented,
    Order,
    Samples,
    collate,
    divide,
    read_training_text,
    write_sequences,
    write_windows,
)
from workers.training.step_journal import Curve, StepJournal
from workers.training.synthesis import write_synthetic
from workers.training.teachers import CachedTeacher, OnlineTeacher, Teacher

Progress = Callable[[str, int, int, float], None]  # what is done, step, number of steps, fraction of the stage


@dataclass(frozen=True)
class TrainingStage:
    """A stage that trains, as the job finds it."""

    stage: TrainingOptions
    index: int  # in the recipe
    recipe: Recipe
    student: Skeleton
    teacher: Skeleton  # the model that the student was made from
    texts: Texts
    journal: Journal  # the stage's own
    progress: Progress
    measured: Callable[[dict[str, Any]], None]  # hears of each point of the loss curve
    keeps_zeros: bool = False  # whether weights of linear layers that are zero have to stay so
    first_codes: Path | None = None  # a folder of parts: what layers that are trained as codes begin with

    def run(self) -> dict[str, Any]:
        """Train, leave the checkpoint in the journal's folder, and return what the report says of it.

        Raises:
            UserError: ``too_little_text``, ``non_finite_loss`` or another that says what to change.
        """
        metrics: dict[str, Any] = self.journal.once("trained", self._train)
        for path in self.journal.folder.iterdir():
            if path.is_dir() and path.name != CHECKPOINT:
                shutil.rmtree(path)
        return metrics

    def _train(self) -> dict[str, Any]:
        stage, folder = self.stage, self.journal.folder
        tokenizer = self.texts.tokenizer(self.student)
        teacher = open_whole(self.teacher, trains=False) if self._has_teacher() else None
        samples = self._samples(tokenizer, teacher)
        division = divide(samples, stage.held_out_fraction, self.recipe.seed)
        padding = _padding(tokenizer)
        student = open_whole(self.student, trains=True)
        if isinstance(stage, DistillationOptions) and stage.initialization == "random":
            student.begin_anew(self.recipe.seed)
        rounded = (
            round_weights(student, stage, self.first_codes) if isinstance(stage, QuantizationAwareFineTuning) else {}
        )
        soft = None if teacher is None else self._soft_targets(teacher, samples, padding)
        pairs = matched_blocks(self.student.num_blocks, self.teacher.num_blocks)
        objective = Objective(student, soft, self._weights(), pairs)
        if self._weights().hidden:
            assert teacher is not None
            teacher.keep_states([block for _, block in pairs])
            objective.add_projections(self.teacher.hidden_size, self.student.device)
        first = self._first_epoch(samples, division.training, teacher or student, padding)
        corpus = Corpus(
            samples, division, Order(division.training, self.recipe.seed, first), padding, self._augmented(tokenizer)
        )
        masks = student.masks() if self.keeps_zeros else {}
        steps = StepJournal(folder / "steps", self.journal.fingerprint)
        loop = Loop(
            student, objective, corpus, stage, self.index, self.recipe.seed, masks, steps, self._told, self.measured
        )
        with keeping_freed_memory():
            curve, weights = loop.run()
        self.journal.decided_under.extend(steps.fingerprints)
        write_checkpoint(student, stored_values(rounded, weights), folder / CHECKPOINT, codes_of(rounded, weights))
        release_memory()
        return _metrics(curve, loop.num_steps, samples, division.training.numel())

    def _has_teacher(self) -> bool:
        stage = self.stage
        return isinstance(stage, DistillationOptions) and (stage.alpha < 1 or bool(stage.hidden_weight))

    def _weights(self) -> Weights:
        stage = self.stage
        return Weights(stage.alpha, stage.hidden_weight) if isinstance(stage, DistillationOptions) else Weights()

    def _told(self, curve: Curve, fraction: float) -> None:
        self.progress("train", curve.step, round(curve.step / fraction) if fraction else 0, fraction)

    def _samples(self, tokenizer: Any, teacher: Whole | None) -> Samples:
        """The text as token ids: made once, and found again by an attempt that goes on."""
        stage, folder = self.stage, self.journal.folder / "samples"
        length = min(stage.max_seq_length, self.student.checkpoint.max_positions)
        if not self.journal.has("samples"):
            folder.mkdir(exist_ok=True)
            synthetic = stage.synthetic if isinstance(stage, DistillationOptions) else None
            if synthetic is not None:
                source = teacher or open_whole(self.teacher, trains=False)
                seed = self.recipe.seed * 1_000_003 + self.index
                write_synthetic(
                    source, tokenizer, synthetic, length, seed, folder, lambda done: self.progress("sample", 0, 0, done)
                )
            elif self.student.architecture.task == "causal":
                texts = (text for text, _ in read_training_text(self.texts.training_path))
                write_windows(texts, tokenizer, length, folder)
            else:
                write_sequences(read_training_text(self.texts.training_path), tokenizer, length, folder)
            self.journal.once("samples", lambda: True)
        return Samples(folder)

    def _soft_targets(self, teacher: Whole, samples: Samples, padding: int) -> Teacher:
        stage, causal = self.stage, self.student.architecture.task == "causal"
        assert isinstance(stage, DistillationOptions)
        if stage.teacher_top_k is None:
            return OnlineTeacher(teacher, stage.temperature, causal=causal)
        top_k = min(stage.teacher_top_k, self._num_outcomes())
        folder = self.journal.folder / "teacher"
        cached = CachedTeacher(folder, samples, top_k, stage.temperature, causal=causal)
        size = max(1, TOKENS_A_MICRO_BATCH // stage.max_seq_length)
        cached.fill(teacher, padding, size, stage.precision, lambda done: self.progress("teacher", 0, 0, done))
        return cached

    def _num_outcomes(self) -> int:
        """How many logits there are."""
        head: Tensor = self.teacher.module(self.teacher.architecture.head).get_parameter("weight")
        return head.shape[0]

    def _augmented(self, tokenizer: Any) -> Callable[[int], Augmented] | None:
        options = self.stage.augmentation
        if options == Augmentation():
            return None
        mask_token = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else tokenizer.unk_token_id
        if mask_token is None and options.mask_probability:
            raise UserError(
                "invalid_value",
                "The tokenizer has no token that stands for a masked one, nor one for unknown text.",
                param=f"recipe.stages[{self.index}].augmentation.mask_probability",
                hint="Leave tokens out by delete_probability alone.",
            )
        seed, special = self.recipe.seed * 1_000_003 + self.index, tokenizer.all_special_ids
        return lambda step: Augmented(options, mask_token or 0, special, seed * 1_000_003 + step)

    @torch.no_grad()
    def _first_epoch(self, samples: Samples, numbers: Tensor, judge: Whole, padding: int) -> Tensor | None:
        """The order of the first epoch, where it is not by chance."""
        stage = self.stage
        if stage.curriculum == "none":
            return None
        if stage.curriculum == "shortest_first":
            lengths = torch.tensor([samples.length(number) for number in numbers.tolist()])
            return numbers[torch.argsort(lengths, stable=True)]
        judging, causal = Objective(judge, None, Weights(), ()), judge.skeleton.architecture.task == "causal"

        def losses() -> list[float]:
            was_training = judge.model.training
            judge.model.eval()
            found = []
            for done, number in enumerate(numbers.tolist()):
                batch = collate(samples, [number], padding, None, causal=causal).to(self.student.device)
                loss = judging(batch)
                found.append(float(loss.total) / max(1, loss.num_targets))
                self.progress("order", 0, 0, done / numbers.numel())
            judge.model.train(was_training)
            return found

        return numbers[torch.argsort(torch.tensor(self.journal.once("easiness", losses)), stable=True)]


def _padding(tokenizer: Any) -> int:
    """A token for the ends of shorter samples, which no loss reads."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


def _metrics(curve: Curve, num_steps: int, samples: Samples, num_training: int) -> dict[str, Any]:
    first, last = curve.points[0], curve.points[-1]
    return {
        "num_steps": curve.step,
        "planned_num_steps": num_steps,
        "num_samples": len(samples),
        "num_training_samples": num_training,
        "num_tokens": curve.num_tokens,
        "seconds": round(curve.seconds, 3),
        "tokens_per_second": curve.num_tokens / curve.seconds if curve.seconds else None,
        "original_held_out_loss": first["held_out_loss"],
        "held_out_loss": last["held_out_loss"],
        "lowest_held_out_loss": curve.lowest_held_out,
        "lowest_step": curve.lowest_step,
        "curve": thinned(curve.points),
    }
