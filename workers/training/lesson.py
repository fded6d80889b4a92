"""All that one training needs, as values and files: any process can take it up, and the same comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from workers.architectures import Architecture
from workers.engine.checkpoint import Checkpoint
from workers.engine.device import compute_device
from workers.engine.skeleton import Skeleton
from workers.techniques import DistillationOptions, TrainingOptions
from workers.training.model import Whole, open_whole
from workers.training.objective import Weights
from workers.training.samples import Augmented, Division, Order, Samples
from workers.training.teachers import CachedTeacher

SAMPLES = "samples"


@dataclass(frozen=True, eq=False)
class Source:
    """A model as it lies on disk, perhaps as a smaller shape of what lies there."""

    checkpoint: Checkpoint
    architecture: Architecture

    def skeleton(self) -> Skeleton:
        """The model without weights, anew."""
        return Skeleton(self.checkpoint, self.architecture, compute_device())

    def open(self, *, trains: bool) -> Whole:
        """The model with all its weights, anew."""
        return open_whole(self.skeleton(), trains=trains)


@dataclass(frozen=True)
class Corpus:
    """What is read, and how."""

    samples: Samples
    division: Division
    order: Order
    padding: int
    augmented: Callable[[int], Augmented] | None  # for each step


@dataclass(frozen=True)
class Lesson:
    """One training of one student: it is handed from process to process, so nothing here is open or in use."""

    stage: TrainingOptions
    param: str  # where the stage is in the recipe, for errors
    seed: int
    student: Source
    teacher: Source | None  # none where nothing is learned from one
    folder: Path  # with samples, the cached logits of the teacher, and the journal of steps
    division: Division
    first_epoch: Tensor | None  # numbers of samples, where their first order is not by chance
    padding: int
    augmented: Callable[[int], Augmented] | None
    first_codes: Path | None  # a folder of parts: what layers that are trained as codes begin with
    span: tuple[float, float]  # of the fall of the learning rate: where this training begins and ends
    keeps_zeros: bool  # whether weights of linear layers that are zero have to stay so
    fingerprint: Mapping[str, Any]
    seconds_a_state: float  # between two states that are kept

    @property
    def is_causal(self) -> bool:
        """Whether the next token is learned, and not classes."""
        return self.student.architecture.task == "causal"

    @property
    def weights(self) -> Weights:
        """Of the parts of the loss."""
        stage = self.stage
        return Weights(stage.alpha, stage.hidden_weight) if isinstance(stage, DistillationOptions) else Weights()

    def corpus(self) -> Corpus:
        """What is read, opened."""
        order = Order(self.division.training, self.seed, self.first_epoch)
        return Corpus(Samples(samples_folder(self.folder)), self.division, order, self.padding, self.augmented)

    def cached_teacher(self, samples: Samples) -> CachedTeacher | None:
        """The logits of the teacher that are kept on disk, or the room for them; None where it runs at every step."""
        stage = self.stage
        if self.teacher is None or not isinstance(stage, DistillationOptions) or stage.teacher_top_k is None:
            return None
        skeleton = self.teacher.skeleton()
        num_outcomes = skeleton.module(skeleton.architecture.head).get_parameter("weight").shape[0]
        top_k = min(stage.teacher_top_k, num_outcomes)
        return CachedTeacher(self.folder / "teacher", samples, top_k, stage.temperature, causal=self.is_causal)


def samples_folder(folder: Path) -> Path:
    """Where, of a stage's folder, the training text is as token ids."""
    return folder / SAMPLES
