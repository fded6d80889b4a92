"""The original model's passes beside those of the compressed one, in the same skeleton."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from workers.engine.forward import ForwardPass
from workers.engine.skeleton import Skeleton


class Originals:
    """Passes that read the running block's original weights, whatever was put in their place meanwhile."""

    def __init__(self, skeleton: Skeleton, passes: Sequence[ForwardPass]) -> None:
        self.passes = passes
        self._skeleton = skeleton
        self._replaced: dict[str, Tensor] = {}

    def replace(self, layer: str, original: Tensor) -> None:
        """Remember the weight of a layer that is about to get another one, until the passes are past it."""
        if self.passes:
            self._replaced[layer] = original

    def advance_to(self, name: str) -> list[Tensor]:
        """Bring every pass to the stop called ``name``; what each brings there."""
        with self._restored():
            return [each.advance_to(name) for each in self.passes]

    def abandon(self) -> None:
        """End the passes where they wait."""
        for each in self.passes:
            each.abandon()
        self._replaced.clear()

    @contextmanager
    def _restored(self) -> Iterator[None]:
        compressed = {layer: self._skeleton.linear_weight(layer) for layer in self._replaced}
        for layer, weight in self._replaced.items():
            self._skeleton.assign_linear(layer, weight)
        yield
        for layer, weight in compressed.items():
            self._skeleton.assign_linear(layer, weight)
        self._replaced.clear()
