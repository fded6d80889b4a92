"""One stage of a recipe that trains: from a model, and what it learns from, to a checkpoint."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.engine.device import release_memory
from workers.engine.journal import Journal
from workers.engine.skeleton import Skeleton
from workers.errors import UserError
from workers.recipe import Recipe
from workers.techniques import DistillationOptions, TrainingOptions
from workers.techniques.training_options import Augmentation
from workers.texts import Texts
from workers.training import loop
from workers.training.learning import learn
from workers.training.lesson import Lesson, Source, samples_folder
from workers.training.loop import Listener, thinned
from workers.training.model import CHECKPOINT, Whole
from workers.training.objective import Objective, Weights
from workers.training.processes import check_accelerators, learn_in_processes
from workers.training.ranks import Ranks
from workers.training.samples import (
    Augmented,
    Samples,
    collate,
    divide,
    read_training_text,
    write_sequences,
    write_windows,
)
from workers.training.step_journal import Curve
from workers.training.synthesis import write_synthetic

Progress = Callable[[str, int, int, float], None]  # what is done, step, number of steps, fraction of the stage


@dataclass(frozen=True)
class TrainingStage:
    """A stage that trains, as the job finds it."""

    stage: TrainingOptions
    index: int  # in the recipe
    recipe: Recipe
    student: Skeleton  # what lies on disk is opened anew: no weight of these is loaded or changed
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
        stage = self.stage
        check_accelerators(stage.num_processes, f"recipe.stages[{self.index}].num_processes")
        lesson = self._lesson()
        # What models this process had to open for the lesson is gone before any is opened to learn; they hold cycles.
        gc.collect()
        release_memory()
        listener = Listener(self._told, self.measured)
        if stage.num_processes == 1:
            learned = learn(lesson, Ranks(), listener)
        else:
            learned = learn_in_processes(lesson, stage.num_processes, listener)
        self.journal.decided_under.extend(learned.fingerprints)
        samples = Samples(samples_folder(lesson.folder))
        return _metrics(learned.curve, learned.num_steps, samples, lesson.division.training.numel())

    def _lesson(self) -> Lesson:
        """What is to be learned, with all that is written before the first step, or found where it was written."""
        stage, tokenizer = self.stage, self.texts.tokenizer(self.student)
        student, teacher = (Source(each.checkpoint, each.architecture) for each in (self.student, self.teacher))
        opened = cache(partial(Source.open, trains=False))
        judge = partial(opened, teacher if self._has_teacher() else student)
        samples = self._samples(tokenizer, partial(opened, teacher))
        division = divide(samples, stage.held_out_fraction, self.recipe.seed)
        padding = _padding(tokenizer)
        lesson = Lesson(
            stage=stage,
            index=self.index,
            seed=self.recipe.seed,
            student=student,
            teacher=teacher if self._has_teacher() else None,
            folder=self.journal.folder,
            division=division,
            first_epoch=self._first_epoch(samples, division.training, judge, padding),
            padding=padding,
            augmented=self._augmented(tokenizer),
            first_codes=self.first_codes,
            keeps_zeros=self.keeps_zeros,
            fingerprint=self.journal.fingerprint,
            seconds_a_state=loop.SECONDS_A_STATE,
        )
        cached = lesson.cached_teacher(samples)
        if cached is not None and not cached.is_filled:
            size = max(1, loop.TOKENS_A_MICRO_BATCH // stage.max_seq_length)
            cached.fill(judge(), padding, size, stage.precision, lambda done: self.progress("teacher", 0, 0, done))
        return lesson

    def _has_teacher(self) -> bool:
        stage = self.stage
        return isinstance(stage, DistillationOptions) and (stage.alpha < 1 or bool(stage.hidden_weight))

    def _told(self, step: int, num_steps: int) -> None:
        self.progress("train", step, num_steps, step / num_steps)

    def _samples(self, tokenizer: Any, teacher: Callable[[], Whole]) -> Samples:
        """The text as token ids: made once, and found again by an attempt that goes on."""
        stage, folder = self.stage, samples_folder(self.journal.folder)
        length = min(stage.max_seq_length, self.student.checkpoint.max_positions)
        if not self.journal.has("samples"):
            folder.mkdir(exist_ok=True)
            synthetic = stage.synthetic if isinstance(stage, DistillationOptions) else None
            if synthetic is not None:
                seed = self.recipe.seed * 1_000_003 + self.index
                write_synthetic(
                    teacher(),
                    tokenizer,
                    synthetic,
                    length,
                    seed,
                    folder,
                    lambda done: self.progress("sample", 0, 0, done),
                )
            elif self.student.architecture.task == "causal":
                texts = (text for text, _ in read_training_text(self.texts.training_path))
                write_windows(texts, tokenizer, length, folder)
            else:
                write_sequences(read_training_text(self.texts.training_path), tokenizer, length, folder)
            self.journal.once("samples", lambda: True)
        return Samples(folder)

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
        return partial(_augmented, options, mask_token or 0, special, seed)

    @torch.no_grad()
    def _first_epoch(
        self, samples: Samples, numbers: Tensor, judge: Callable[[], Whole], padding: int
    ) -> Tensor | None:
        """The order of the first epoch, where it is not by chance."""
        stage = self.stage
        if stage.curriculum == "none":
            return None
        if stage.curriculum == "shortest_first":
            lengths = torch.tensor([samples.length(number) for number in numbers.tolist()])
            return numbers[torch.argsort(lengths, stable=True)]

        def losses() -> list[float]:
            whole, found = judge(), []
            judging, causal = Objective(whole, None, Weights(), ()), whole.skeleton.architecture.task == "causal"
            for done, number in enumerate(numbers.tolist()):
                batch = collate(samples, [number], padding, None, causal=causal).to(whole.skeleton.device)
                loss = judging(batch)
                found.append(float(loss.total) / max(1, loss.num_targets))
                self.progress("order", 0, 0, done / numbers.numel())
            return found

        return numbers[torch.argsort(torch.tensor(self.journal.once("easiness", losses)), stable=True)]


def _augmented(
    options: Augmentation, mask_token: int, special_tokens: Sequence[int], seed: int, step: int
) -> Augmented:
    """What chance does to the tokens of a step."""
    return Augmented(options, mask_token, special_tokens, seed * 1_000_003 + step)


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
