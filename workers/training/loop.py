"""The loop: batches, gradients, steps, and what is measured and kept on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.engine.device import training_products
from workers.errors import UserError
from workers.techniques import QuantizationAwareFineTuning, TrainingOptions
from workers.training.lesson import Corpus, Lesson
from workers.training.masks import Masks
from workers.training.model import Whole
from workers.training.objective import Objective
from workers.training.ranks import Ranks
from workers.training.rounding import LOG_SCALE
from workers.training.samples import Batch, collate, of_like_length
from workers.training.seeds import seed_of
from workers.training.step_journal import Curve, StepJournal

# At most so much work is lost with a killed process, and what keeping a state takes.
SECONDS_A_STATE = 30.0
_FINAL_RATE = 0.1  # of the highest learning rate, at the end of a cosine
_MOST_POINTS = 200  # of a loss curve
_SECONDS_A_PROGRESS = 1.0


@dataclass(frozen=True)
class Listener:
    """Hears how far a training is."""

    told: Callable[[int, int], None]  # steps that are done, and all
    measured: Callable[[dict[str, Any]], None]  # each point of the loss curve


class Loop:
    """One training of one student."""

    def __init__(
        self,
        student: Whole,
        objective: Objective,
        corpus: Corpus,
        lesson: Lesson,
        ranks: Ranks,
        listener: Listener,
    ) -> None:
        self._student = student
        self._objective = objective
        self._corpus = corpus
        self._lesson = lesson
        self._stage = stage = lesson.stage
        self._ranks = ranks
        self._listener = listener
        self._param = lesson.param
        self._seed = lesson.seed
        self.journal = StepJournal(lesson.folder / "steps", lesson.fingerprint)
        self.num_steps = stage.steps_for(corpus.division.training.numel())
        self._interval = max(1, self.num_steps // stage.num_evaluations)
        self._trained = {name: each for name, each in student.parameters().items() if each.requires_grad}
        self._parameters = {
            **self._trained,
            **{f"projections.{name}": each for name, each in objective.projections.named_parameters()},
        }
        self._optimizer = _optimizer(self._parameters, stage)
        self.masks = Masks(student, self._parameters, stage, self.num_steps, keeps_zeros=lesson.keeps_zeros)
        self._best: dict[str, Tensor] = {}

    @property
    def num_trained_parameters(self) -> int:
        """Of the student."""
        return sum(each.numel() for each in self._trained.values())

    def run(self) -> tuple[Curve, dict[str, Tensor]]:
        """Train to the end; what was measured, and the weights that were best, or last where nothing stops early.

        Raises:
            UserError: ``non_finite_loss``; the last state that was finite is kept.
        """
        curve = self._begin()
        kept_at = told_at = time.monotonic()
        while curve.step < self.num_steps and not self._is_over(curve):
            begin = time.monotonic()
            loss = self._step(curve)
            curve.step += 1
            curve.seconds += time.monotonic() - begin
            if curve.step % self._interval == 0 or curve.step == self.num_steps:
                self._measure(curve, loss)
            now = time.monotonic()
            if self._ranks.is_first and now - told_at >= _SECONDS_A_PROGRESS:
                self._listener.told(curve.step, self.num_steps)
                told_at = now
            if self._ranks.is_first and now - kept_at >= self._lesson.seconds_a_state:
                self.journal.write(curve, self._state())
                kept_at = time.monotonic()
        if self._stage.patience is not None and curve.lowest_step == 0:
            raise UserError(
                "nothing_learned",
                f"The loss on held-out text was never lower than before training, in {curve.step} steps.",
                param=f"{self._param}.learning_rate",
                hint="Lower learning_rate, or raise patience or num_evaluations.",
            )
        return curve, {**_values(self._student.parameters()), **self._best}

    def _begin(self) -> Curve:
        kept = self.journal.read()
        if kept is None:
            curve = Curve()
            self._measure(curve, None)
            return curve
        curve, tensors = kept
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[f"weight.{name}"])
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(curve.step), device=parameter.device),
                    "exp_avg": tensors[f"mean.{name}"].to(parameter.device),
                    "exp_avg_sq": tensors[f"square.{name}"].to(parameter.device),
                }
        self.masks.restore(tensors)
        self._best = {name.removeprefix("best."): each for name, each in tensors.items() if name.startswith("best.")}
        return curve

    def _state(self) -> dict[str, Tensor]:
        """All that the next step depends on. Chance is drawn anew from the seed for each step, and needs no state."""
        state = {f"best.{name}": tensor for name, tensor in self._best.items()} | self.masks.state()
        for name, parameter in self._parameters.items():
            moments = self._optimizer.state[parameter]
            state |= {
                f"weight.{name}": parameter.detach(),
                f"mean.{name}": moments["exp_avg"],
                f"square.{name}": moments["exp_avg_sq"],
            }
        return state

    def _is_over(self, curve: Curve) -> bool:
        return self._stage.patience is not None and curve.num_without_progress >= self._stage.patience

    def _step(self, curve: Curve) -> float:
        """One step of the optimizer; the loss a target before it."""
        step = curve.step
        self.masks.grow(step, self._optimizer)
        batches = list(self._micro_batches(self._corpus.order.batch(step, self._stage.batch_size), step))
        num_targets, num_tokens = self._ranks.sum(
            sum(self._objective.num_targets(batch) for _, batch in batches),
            sum(int(batch.mask.sum()) for _, batch in batches),
        )
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for number, batch in batches:
            # Dropout: the same whatever process reads the batch, and however often it was killed on the way.
            torch.manual_seed(seed_of(self._seed, step, number))
            with training_products(self._stage.precision):
                loss = self._objective(batch.to(self._student.skeleton.device))
            (loss.total / num_targets).backward()  # type: ignore[no-untyped-call]
            total += float(loss.total.detach()) / num_targets
        [total] = self._ranks.sum(total)
        self._ranks.sum_gradients(self._parameters.values())
        curve.num_tokens += int(num_tokens)
        self.masks.hold()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._stage.max_grad_norm)
        if not (math.isfinite(total) and bool(torch.isfinite(norm))):
            raise UserError(
                "non_finite_loss",
                f"The loss, or its gradient, was not finite in step {step + 1} of {self.num_steps}.",
                param=f"{self._param}.learning_rate",
                hint="Lower learning_rate or max_grad_norm, raise warmup_fraction, or set precision to float32.",
            )
        for group in self._optimizer.param_groups:
            group["lr"] = group["highest"] * self._rate(step)
        self._optimizer.step()
        return total

    def _rate(self, step: int) -> float:
        """The learning rate of a step, from 0, as a part of the highest."""
        stage, (begin, end) = self._stage, self._lesson.span
        warmup = math.ceil(stage.warmup_fraction * self.num_steps)
        done = begin + (end - begin) * max(0, step - warmup) / max(1, self.num_steps - warmup)
        if stage.schedule == "cosine":
            rate = _FINAL_RATE + (1 - _FINAL_RATE) * (1 + math.cos(math.pi * done)) / 2
        else:
            rate = 1 - done if stage.schedule == "linear" else 1.0
        return rate * min(1.0, (step + 1) / warmup) if warmup else rate

    @torch.no_grad()
    def _measure(self, curve: Curve, loss: float | None) -> None:
        """Add a point to the curve, and remember the weights if no loss was lower where training may stop early."""
        total, hard, num_right, num_targets, num_hard = self._ranks.sum(*self._own_held_out())
        held_out = total / num_targets
        point: dict[str, float | int | None] = {
            "step": curve.step,
            "loss": loss,
            "held_out_loss": held_out,
            "held_out_cross_entropy": hard / num_hard if num_hard else None,
        }
        if not self._lesson.is_causal and num_hard:
            point["held_out_accuracy"] = num_right / num_hard
        if (sparsity := self.masks.sparsity) is not None:
            point["sparsity"] = sparsity
        curve.points.append(point)
        if not math.isfinite(held_out):
            raise UserError(
                "non_finite_loss",
                f"The loss on held-out text was not finite after {curve.step} steps.",
                param=f"{self._param}.learning_rate",
                hint="Lower learning_rate, or check the model on this text.",
            )
        if curve.lowest_held_out is None or held_out < curve.lowest_held_out:
            curve.lowest_held_out, curve.lowest_step, curve.num_without_progress = held_out, curve.step, 0
            if self._stage.patience is not None and self._ranks.is_first:
                self._best = {name: each.clone() for name, each in _values(self._trained).items()}
        else:
            curve.num_without_progress += 1
        if self._ranks.is_first:
            speed = curve.num_tokens / curve.seconds if curve.seconds else None
            self._listener.measured({**point, "num_steps": self.num_steps, "tokens_per_second": speed})

    def _own_held_out(self) -> tuple[float, float, int, int, int]:
        """Of the held-out samples that this process reads.

        The loss; cross entropy; how many are classified rightly; how many targets there are, and with cross entropy.
        """
        total, hard, num_right, num_targets, num_hard = 0.0, 0.0, 0, 0, 0
        self._student.model.eval()
        for _, batch in self._micro_batches(self._corpus.division.held_out.tolist(), None):
            with training_products(self._stage.precision):
                found = self._objective(batch.to(self._student.skeleton.device))
            total += float(found.total)
            num_targets += found.num_targets
            if found.hard is not None:
                hard, num_hard = hard + float(found.hard), num_hard + found.num_targets
            num_right += 0 if found.num_right is None else int(found.num_right)
        self._student.model.train()
        return total, hard, num_right, num_targets, num_hard

    def _micro_batches(self, numbers: Sequence[int], step: int | None) -> Iterator[tuple[int, Batch]]:
        """The samples of a step, or of no step, in pieces; of like length together, so that little is padded.

        Those pieces that this process reads, each with its number among all: small enough for every process to have
        one, where there are as many samples.
        """
        corpus = self._corpus
        changed = None if corpus.augmented is None or step is None else corpus.augmented(step)
        size = min(self._stage.samples_at_a_time, math.ceil(len(numbers) / self._ranks.count))
        for number, some in self._ranks.share(list(of_like_length(numbers, corpus.samples, size))):
            yield number, collate(corpus.samples, some, corpus.padding, changed, causal=self._lesson.is_causal)


def _values(parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    return {name: each.detach() for name, each in parameters.items()}


def thinned(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """At most so many points of a curve as a report should hold, the first and the last among them."""
    every = max(1, math.ceil(len(points) / _MOST_POINTS))
    return [dict(each) for index, each in enumerate(points) if index % every == 0 or index == len(points) - 1]


def _optimizer(parameters: Mapping[str, torch.nn.Parameter], stage: TrainingOptions) -> torch.optim.AdamW:
    """AdamW, arXiv:1711.05101; norms, biases and scales do not decay."""
    scales = [each for name, each in parameters.items() if name.endswith(f".{LOG_SCALE}")]
    known = set(map(id, scales))
    decaying = [each for each in parameters.values() if each.dim() > 1 and id(each) not in known]
    others = [each for each in parameters.values() if each.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decaying, "weight_decay": stage.weight_decay, "highest": stage.learning_rate},
        {"params": others, "weight_decay": 0.0, "highest": stage.learning_rate},
    ]
    if isinstance(stage, QuantizationAwareFineTuning):
        groups.append({"params": scales, "weight_decay": 0.0, "highest": stage.scale_learning_rate})
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), fused=True)
