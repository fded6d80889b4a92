"""What single layers get, where a stage treats them differently: decided before the first of them is compressed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from workers.engine.journal import Journal
from workers.engine.sensitivity import Sensitivity, measure
from workers.engine.skeleton import Skeleton
from workers.engine.stored_size import StoredSize
from workers.engine.survey import survey
from workers.errors import UserError
from workers.recipe import Recipe
from workers.solvers.allocation import ErrorCurve, allocate
from workers.solvers.widths import Choices, choose
from workers.techniques import MixedPrecision, PruningOptions

# How far the sparsity of a layer may be from that of all: an error curve knows nothing of what later layers make of it.
SPARSITY_BOUND = 0.1

Progress = Callable[[str, int, int, float], None]  # step, block, num_blocks, fraction


def make_plan(
    skeleton: Skeleton, recipe: Recipe, calibration: Sequence[Tensor], journal: Journal, progress: Progress
) -> list[dict[str, float]]:
    """By stage, what :meth:`LayerOptions.at` takes for a layer; of stages that treat all alike, nothing.

    ``calibration`` holds samples × tokens for each length of samples; in ``journal`` it is kept how far we are.

    Raises:
        UserError: ``budget_too_small``.
    """
    plan: list[dict[str, float]] = [{} for _ in recipe.stages]
    curves: list[dict[str, ErrorCurve]] = []
    for index, stage in enumerate(recipe.stages):
        if isinstance(stage, PruningOptions) and stage.plan_share:
            curves = curves or survey(skeleton, calibration, journal.inner("survey"), progress)
            plan[index] = _sparsities(stage, curves)
        elif isinstance(stage, MixedPrecision):
            budget = _Budget(skeleton, recipe, stage)
            budget.check(f"{recipe.param(index)}.max_size_bytes")
            width = min(stage.widths, key=lambda width: abs(width - budget.average_bits))
            steps = journal.inner("sensitivity")
            groups = measure(skeleton, stage, width, calibration, steps, progress)
            plan[index] = _widths(stage, budget, groups, width)
    return plan


def _sparsities(stage: PruningOptions, curves: Sequence[Mapping[str, ErrorCurve]]) -> dict[str, float]:
    """The sparsity of each layer.

    Every block has as many zeros as with one sparsity for all: relative errors compare layers that stand side by side,
    and do not say how much the blocks after them make of an error.
    """
    assert stage.sparsity is not None
    sparsities: dict[str, float] = {}
    for block in curves:
        taken = {name: curve for name, curve in block.items() if not stage.ignores(name)}
        counts = allocate(taken, stage.sparsity, SPARSITY_BOUND)
        sparsities |= {name: count / taken[name].num_weights for name, count in counts.items()}
    return sparsities


def _widths(stage: MixedPrecision, budget: _Budget, groups: Sequence[Sensitivity], width: int) -> dict[str, float]:
    """The width of each layer."""
    things = [
        Choices(
            tuple(sum(budget.cost(layer, bits) for layer in group.layers) for bits in stage.widths),
            tuple(group.at(bits, width) for bits in stage.widths),
        )
        for group in groups
    ]
    chosen = choose(things, budget.room)
    return {layer: stage.widths[choice] for group, choice in zip(groups, chosen, strict=True) for layer in group.layers}


class _Budget:
    """What the layers that a stage takes may cost together: bytes on disk, or bits of codes."""

    def __init__(self, skeleton: Skeleton, recipe: Recipe, stage: MixedPrecision) -> None:
        self._skeleton = skeleton
        self._stage = stage
        self._size = StoredSize(skeleton, recipe)
        self._layers = [name for name in skeleton.block_layers if not stage.ignores(name)]
        self._num_weights = sum(map(skeleton.num_weights, self._layers))
        if stage.max_size_bytes is not None:
            self.room = stage.max_size_bytes - self._size.rest_bytes(self._layers)
            self.room -= self._size.header_bytes(self._layers)
        else:
            assert stage.average_bits is not None
            self.room = int(stage.average_bits * self._num_weights)

    @property
    def average_bits(self) -> float:
        """Of a weight, about."""
        bits = self.room if self._stage.max_size_bytes is None else 8 * self.room
        return bits / max(1, self._num_weights)

    def cost(self, layer: str, num_bits: int) -> int:
        """Of one layer at this width."""
        if self._stage.max_size_bytes is None:
            return num_bits * self._skeleton.num_weights(layer)
        return self._size.codes_bytes(layer, self._stage.at(num_bits))

    def check(self, param: str) -> None:
        """Raise UserError ``budget_too_small`` if the fewest bits do not fit: before anything is measured."""
        least = sum(self.cost(layer, self._stage.widths[0]) for layer in self._layers)
        if least <= self.room:
            return
        assert self._stage.max_size_bytes is not None  # an average is never below the fewest bits
        needed = self._stage.max_size_bytes - self.room + least
        raise UserError(
            "budget_too_small",
            f"With every layer at {self._stage.widths[0]} bits the result has about {needed:,} bytes.",
            param=param,
            hint=f"Allow at least {needed:,} bytes, or larger groups.",
        )
