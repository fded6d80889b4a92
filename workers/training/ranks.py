"""The processes that share one training, as each of them sees them: what it does itself, and what all have together.

Every process calls the same collective operations in the same order, and gets the same values to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from workers.engine.device import compute_device
from workers.errors import CrashError, is_out_of_memory

# Values of gradients that are summed at a time: many small sums take long, and one of all would hold all twice.
_VALUES_AT_A_TIME = 1 << 23

T = TypeVar("T")


class LostRankError(CrashError):
    """Another process of the training is gone, which says why."""


@dataclass(frozen=True)
class Ranks:
    """One of ``count`` processes; where there are several, those of torch's process group."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that says how far all are, and keeps it."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[tuple[int, T]]:
        """What this process does of ``items``, each with its number among all."""
        return list(enumerate(items))[self.rank :: self.count]

    def sum(self, *values: float) -> list[float]:
        """Of each value the sum over all processes."""
        if self.count == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=compute_device())
        with _lost_ranks():
            dist.all_reduce(summed)
        return [float(value) for value in summed]

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Give each parameter the sum of its gradients over all processes; a process without one adds nothing."""
        if self.count == 1:
            return
        waiting: list[Tensor] = []
        num_values = 0
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            waiting.append(parameter.grad)
            num_values += parameter.numel()
            if num_values >= _VALUES_AT_A_TIME:
                _sum(waiting)
                waiting, num_values = [], 0
        if waiting:
            _sum(waiting)


def _sum(tensors: Sequence[Tensor]) -> None:
    """Sum each of these over all processes, in place."""
    values = torch.cat([each.flatten() for each in tensors])
    with _lost_ranks():
        dist.all_reduce(values)
    for tensor, summed in zip(tensors, torch.split(values, [each.numel() for each in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


@contextmanager
def _lost_ranks() -> Iterator[None]:
    """Say what it means that a collective operation fails."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise LostRankError("process_killed", f"Another process of the training ended: {error}"[:2000]) from error
