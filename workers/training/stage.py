"""One stage of a recipe that trains: from a model, and what it learns from, to a checkpoint."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.architectures import Architecture
from workers.engine.checkpoint import Checkpoint
from workers.engine.device import release_memory
from workers.engine.journal import Journal
from workers.engine.skeleton import Skeleton
from workers.errors import UserError
from workers.recipe import Recipe
from workers.stage_runs import Place
from workers.techniques import DistillationOptions, TrainingOptions
from workers.texts import Texts
from workers.training import loop
from workers.training.augmentation import augmentation_of
from workers.training.learning import Learned, learn
from workers.training.lesson import SAMPLES, Lesson, Source, samples_folder
from workers.training.loop import Listener, thinned
from workers.training.model import CHECKPOINT, Whole
from workers.training.objective import Objective, Weights
from workers.training.processes import check_accelerators, learn_in_processes
from workers.training.ranks import Ranks
from workers.training.samples import (
    Samples,
    collate,
    divide,
    write_sequences,
    write_windows,
)
from workers.training.seeds import seed_of
from workers.training.sides import Sides
from workers.training.synthesis import write_synthetic

_EASINESS = "easiness"


@dataclass(frozen=True)
class TrainingStage:
    """A stage that trains, as the job finds it."""

    stage: TrainingOptions
    param: str  # where it is in the recipe, for errors
    recipe: Recipe
    student: Skeleton  # what lies on disk is opened anew: no weight of these is loaded or changed
    teacher: Skeleton  # the model that the student was made from
    place: Place
    texts: Texts
    journal: Journal  # the stage's own
    measured: Callable[[dict[str, Any]], None]  # hears of each point of the loss curve
    keeps_zeros: bool = False  # whether weights of linear layers that are zero have to stay so
    first_codes: Path | None = None  # a folder of parts: what layers that are trained as codes begin with

    def run(self) -> dict[str, Any]:
        """Train, leave the checkpoint in the journal's folder, and return the report's metrics, fallbacks and layers.

        Raises:
            UserError: ``too_little_text``, ``non_finite_loss`` or another that says what to change.
        """
        told: dict[str, Any] = self.journal.folder_once(CHECKPOINT, lambda _: self._train())
        for path in self.journal.folder.iterdir():
            if path.is_dir() and path.name != CHECKPOINT:
                shutil.rmtree(path)
        for name in (SAMPLES, _EASINESS):
            (self.journal.folder / f"{name}.json").unlink(missing_ok=True)
        return told

    @property
    def _seed(self) -> int:
        return seed_of(self.recipe.seed, self.place.name)

    def _train(self) -> dict[str, Any]:
        stage = self.stage
        check_accelerators(stage.num_processes, f"{self.param}.num_processes")
        lesson = self._lesson()
        _forget_models()  # that this process had to open for the lesson, before any is opened to learn
        listener = Listener(self._told, self.measured)
        if stage.num_processes == 1:
            learned = learn(lesson, Ranks(), listener)
        else:
            learned = learn_in_processes(lesson, stage.num_processes, listener)
        _forget_models()
        self.journal.decided_under.extend(learned.fingerprints)
        self._check_changed(lesson.folder / CHECKPOINT)
        samples = Samples(samples_folder(lesson.folder))
        metrics = _metrics(learned, lesson, samples)
        return {"metrics": metrics, "fallbacks": learned.fallbacks, "layers": learned.layers}

    def _check_changed(self, folder: Path) -> None:
        """Raise UserError ``nothing_changed`` where every stored value is what it was before."""
        before, after = self.student.checkpoint, Checkpoint(folder)
        if self.first_codes is None and all(
            torch.equal(after.parameter(name), before.parameter(name)) for name in after.parameters()
        ):
            raise UserError(
                "nothing_changed",
                "The training moved no weight by as much as its stored type tells apart.",
                param=f"{self.param}.learning_rate",
                hint="Raise learning_rate, or train for more steps.",
            )

    def _lesson(self) -> Lesson:
        """What is to be learned, with all that is written before the first step, or found where it was written."""
        stage, tokenizer = self.stage, self.texts.tokenizer(self.student)
        student, teacher = (Source(each.checkpoint, each.architecture) for each in (self.student, self.teacher))
        opened = cache(partial(Source.open, trains=False))
        has_teacher = isinstance(stage, DistillationOptions) and stage.has_teacher
        judge = partial(opened, teacher if has_teacher else student)
        samples = self._samples(tokenizer, partial(opened, teacher))
        division = divide(samples)
        if lesson_needs_labels(stage, self.student.architecture) and not samples.has_labels:
            raise UserError(
                "label_field_missing",
                "The model is a classifier, and the training text says no classes.",
                param="recipe.training.label_field",
                hint="Name the field of a row that holds its class, or send labels beside inline texts.",
            )
        padding = _padding(tokenizer)
        lesson = Lesson(
            stage=stage,
            param=self.param,
            seed=self._seed,
            student=student,
            teacher=teacher if has_teacher else None,
            folder=self.journal.folder,
            division=division,
            first_epoch=self._first_epoch(samples, division.training, judge, padding),
            padding=padding,
            augmented=augmentation_of(stage, tokenizer, self._seed),
            first_codes=self.first_codes,
            span=self.place.span,
            keeps_zeros=self.keeps_zeros,
            fingerprint=self.journal.fingerprint,
            seconds_a_state=loop.SECONDS_A_STATE,
        )
        cached = lesson.cached_teacher(samples)
        if cached is not None and not cached.is_filled:
            told = partial(self.place.progress, "teacher", 0, 0)
            cached.fill(judge(), padding, stage.samples_at_a_time, stage.precision, told)
        if cached is not None:
            self.journal.decided_under.extend(cached.note_fingerprint(self.journal.fingerprint))
        return lesson

    def _told(self, step: int, num_steps: int) -> None:
        self.place.progress("train", step, num_steps, step / num_steps)

    def _samples(self, tokenizer: Any, teacher: Callable[[], Whole]) -> Samples:
        """The text as token ids: made once, and found again by an attempt that goes on."""
        stage = self.stage
        # The teacher may be of another type, with another number of positions.
        length = min(stage.max_seq_length, *(each.checkpoint.max_positions for each in (self.student, self.teacher)))

        def write(folder: Path) -> None:
            synthetic = stage.synthetic if isinstance(stage, DistillationOptions) else None
            fraction = max(each.held_out_fraction for each in self.recipe.training_stages)
            if synthetic is not None:
                told = partial(self.place.progress, "sample", 0, 0)
                write_synthetic(teacher(), tokenizer, synthetic, length, fraction, self._seed, folder, told)
                return
            # The same for all stages of the recipe, whatever samples they make of it.
            sides = Sides(self.texts.training_path, fraction, seed_of(self.recipe.seed, "held out"))
            writes = write_windows if self.student.architecture.task == "causal" else write_sequences
            writes(sides, tokenizer, length, folder)

        self.journal.folder_once(SAMPLES, write)
        return Samples(samples_folder(self.journal.folder))

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
                self.place.progress("order", 0, 0, done / numbers.numel())
            return found

        return numbers[torch.argsort(torch.tensor(self.journal.once(_EASINESS, losses)), stable=True)]


def _forget_models() -> None:
    """Give back the memory of models that nobody needs any more: they hold cycles, which no count ever frees."""
    gc.collect()
    release_memory()


def _padding(tokenizer: Any) -> int:
    """A token for the ends of shorter samples, which no loss reads."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


def lesson_needs_labels(stage: TrainingOptions, architecture: Architecture) -> bool:
    """Whether a stage learns classes from the text, and not from a teacher alone."""
    is_hard = not isinstance(stage, DistillationOptions) or stage.alpha > 0
    return is_hard and architecture.task == "classification"


def _metrics(learned: Learned, lesson: Lesson, samples: Samples) -> dict[str, Any]:
    curve = learned.curve
    first, last = curve.points[0], curve.points[-1]
    if lesson.stage.patience is not None:  # the weights that are kept are those of the lowest loss
        last = next(point for point in curve.points if point["step"] == curve.lowest_step)
    of_layers = {"num_layers": learned.num_layers, "num_fallbacks": len(learned.fallbacks)}
    return {
        **({} if learned.num_layers is None else of_layers),
        "num_trained_parameters": learned.num_trained_parameters,
        "num_steps": curve.step,
        "planned_num_steps": learned.num_steps,
        "num_samples": len(samples),
        "num_training_samples": lesson.division.training.numel(),
        "num_tokens": curve.num_tokens,
        "seconds": round(curve.seconds, 3),
        "tokens_per_second": curve.num_tokens / curve.seconds if curve.seconds else None,
        "original_held_out_loss": first["held_out_loss"],
        "held_out_loss": last["held_out_loss"],
        "lowest_held_out_loss": curve.lowest_held_out,
        "lowest_step": curve.lowest_step,
        "curve": thinned(curve.points),
    }
