"""What one training minimises, on a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workers.training.losses import LossOfRows, distance, loss_of_head
from workers.training.model import Whole
from workers.training.samples import Batch
from workers.training.teachers import Teacher, scored_positions


@dataclass(frozen=True)
class Weights:
    """Of the parts of a loss: of hard targets ``hard``, of the teacher's 1 − ``hard``, of hidden states ``hidden``."""

    hard: float = 1.0
    hidden: float = 0.0


@dataclass(frozen=True)
class Loss:
    """Sums over a batch: what is minimised, and what of it people know."""

    total: Tensor
    num_targets: int
    hard: Tensor | None  # cross entropy with the text or the labels, nats
    num_right: Tensor | None = None  # of a classifier


class Objective:
    """The loss of a student, with a teacher or without one."""

    def __init__(
        self, student: Whole, teacher: Teacher | None, weights: Weights, pairs: Sequence[tuple[int, int]]
    ) -> None:
        """``pairs`` are blocks of student and teacher whose hidden states are matched."""
        self._student = student
        self._teacher = teacher
        self._weights = weights
        self._pairs = pairs if weights.hidden else ()
        self._causal = student.skeleton.architecture.task == "causal"
        student.keep_states([block for block, _ in self._pairs])
        self.projections = nn.ModuleList()

    def add_projections(self, teacher_size: int, device: torch.device) -> None:
        """Make what the student's hidden states pass through before they are held against the teacher's."""
        own_size = self._student.skeleton.hidden_size
        for _ in self._pairs:
            projection = nn.Linear(own_size, teacher_size, bias=False, device=device)
            with torch.no_grad():
                projection.weight.copy_(torch.eye(teacher_size, own_size))
            self.projections.append(projection)

    def __call__(self, batch: Batch) -> Loss:
        """The losses of a batch, summed."""
        return self._of_tokens(batch) if self._causal else self._of_classes(batch)

    def num_targets(self, batch: Batch) -> int:
        """How many targets the batch has: tokens, or samples of a classifier."""
        return int(scored_positions(batch).sum()) if self._causal else len(batch.numbers)

    def _of_tokens(self, batch: Batch) -> Loss:
        scored = scored_positions(batch)
        assert batch.targets is not None
        targets = batch.targets[scored]
        soft_of = None if self._teacher is None else self._teacher.reader(batch, scored)
        hidden = self._student.hidden(batch.ids)[scored]
        sum_of_hard = torch.zeros((), device=hidden.device)
        weight = self._weights.hard

        def losses(piece: slice) -> LossOfRows:
            of_piece, soft = targets[piece], None if soft_of is None else soft_of(piece)

            def loss_of(logits: Tensor, rows: slice) -> Tensor:
                nonlocal sum_of_hard
                hard = nn.functional.cross_entropy(logits, of_piece[rows], reduction="sum")
                sum_of_hard = sum_of_hard + hard.detach()
                return hard if soft is None else weight * hard + (1 - weight) * soft(logits, rows)

            return loss_of

        total = loss_of_head(hidden, self._student.head, self._student.logit_cap, losses)
        return Loss(total + targets.numel() * self._of_states(batch), targets.numel(), sum_of_hard)

    def _of_classes(self, batch: Batch) -> Loss:
        everyone = slice(0, len(batch.numbers))
        soft_of = None if self._teacher is None else self._teacher.reader(batch, batch.mask.bool())
        logits = self._student.class_logits(batch.ids, batch.mask)
        hard, num_right = None, None
        total = torch.zeros((), device=logits.device)
        if batch.targets is not None:
            hard = nn.functional.cross_entropy(logits, batch.targets, reduction="sum")
            num_right = (logits.argmax(dim=-1) == batch.targets).sum()
            total = total + (1.0 if soft_of is None else self._weights.hard) * hard
        if soft_of is not None:
            total = total + (1 - self._weights.hard) * soft_of(everyone)(logits, everyone)
        total = total + len(batch.numbers) * self._of_states(batch)
        return Loss(total, len(batch.numbers), None if hard is None else hard.detach(), num_right)

    def _of_states(self, batch: Batch) -> Tensor:
        """Of hidden states, mean over the pairs."""
        total = torch.zeros((), device=batch.ids.device)
        is_token = batch.mask.bool()
        for (own, others), projection in zip(self._pairs, self.projections, strict=True):
            assert self._teacher is not None
            states = projection(self._student.states.pop(own)[is_token])
            total = total + distance(states, self._teacher.states[others][is_token])
        return self._weights.hidden * total / max(1, len(self._pairs))


def matched_blocks(num_blocks: int, num_teacher_blocks: int) -> list[tuple[int, int]]:
    """Each block of a student and the teacher's that is as far up, the last with the last: arXiv:1908.09355."""
    return [(index, math.ceil((index + 1) * num_teacher_blocks / num_blocks) - 1) for index in range(num_blocks)]
