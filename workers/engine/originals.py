"""The original model's passes, in the skeleton that the compressed one's weights are put into."""

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

    def remember(self, layer: str) -> None:
        """Remember the weight of a layer that is about to get another one, until the passes are past it."""
        if self.passes:
            self._replaced[layer] = self._weight_of(layer)

    def advance(self, number: int, name: str) -> Tensor:
        """Bring one pass to the stop called ``name``; what it brings there."""
        with self._restored():
            return self.passes[number].advance_to(name)

    def are_past(self) -> None:
        """Say that all have read what was remembered."""
        self._replaced.clear()

    def abandon(self) -> None:
        """End the passes where they wait."""
        for each in self.passes:
            each.abandon()
        self._replaced.clear()

    @contextmanager
    def _restored(self) -> Iterator[None]:
        compressed = {layer: self._weight_of(layer) for layer in self._replaced}
        for layer, weight in self._replaced.items():
            self._skeleton.assign(f"{layer}.weight", weight)
        yield
        for layer, weight in compressed.items():
            self._skeleton.assign(f"{layer}.weight", weight)

    def _weight_of(self, layer: str) -> Tensor:
        """The weight as the module has it."""
        return self._skeleton.module(layer).get_parameter("weight")
