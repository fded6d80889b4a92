"""What single layers get, where a stage treats them differently: decided before the first of them is compressed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from workers.engine.activations import Activations
from workers.engine.sensitivity import Sensitivity, measure
from workers.engine.skeleton import Skeleton
from workers.engine.survey import survey
from workers.errors import UserError
from workers.formats.compressed_tensors import stored_bytes
from workers.recipe import Recipe
from workers.solvers.allocation import ErrorCurve, allocate
from workers.solvers.widths import BudgetTooSmallError, Choices, choose
from workers.techniques import MixedPrecision, PruningOptions
from workers.techniques.options import usable_group_size

# How far the sparsity of a layer may be from that of all: an error curve knows nothing of what later layers make of it.
SPARSITY_BOUND = 0.1
# A safetensors header says of each tensor its name, type, shape and place.
_HEADER_BYTES_A_TENSOR = 220

Progress = Callable[[str, int, int, float], None]  # step, block, num_blocks, fraction


def make_plan(
    skeleton: Skeleton, recipe: Recipe, calibration: Sequence[Tensor], folder: Path, progress: Progress
) -> list[dict[str, float]]:
    """By stage, what :meth:`StageOptions.at` takes for a layer; of stages that treat all alike, nothing.

    ``calibration`` holds samples × tokens for each length of samples; ``folder`` is for hidden states.

    Raises:
        UserError: ``budget_too_small``.
    """
    plan: list[dict[str, float]] = [{} for _ in recipe.stages]
    curves: list[dict[str, ErrorCurve]] = []
    for index, stage in enumerate(recipe.stages):
        if isinstance(stage, PruningOptions) and stage.plans:
            curves = curves or survey(skeleton, calibration, progress)
            plan[index] = _sparsities(stage, curves)
        elif isinstance(stage, MixedPrecision):
            store = Activations(folder)
            width = _nearest(stage.widths, _average_bits(skeleton, stage))
            groups = measure(skeleton, stage, width, calibration, store, progress)
            store.remove()
            plan[index] = _widths(skeleton, stage, groups, width, f"recipe.stages[{index}]")
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


def _widths(
    skeleton: Skeleton, stage: MixedPrecision, groups: Sequence[Sensitivity], width: int, param: str
) -> dict[str, float]:
    """The width of each layer."""
    things = [
        Choices(
            tuple(sum(_cost(skeleton, stage, layer, bits) for layer in group.layers) for bits in stage.widths),
            tuple(group.at(bits, width) for bits in stage.widths),
        )
        for group in groups
    ]
    layers = [layer for group in groups for layer in group.layers]
    kept = 0 if stage.max_size_bytes is None else _bytes_of_the_rest(skeleton, set(layers))
    try:
        chosen = choose(things, _budget(skeleton, stage, layers) - kept)
    except BudgetTooSmallError as error:
        # An average is never below the narrowest width.
        raise UserError(
            "budget_too_small",
            f"With every layer at {stage.widths[0]} bits the result has about {error.least + kept:,} bytes.",
            param=f"{param}.max_size_bytes",
            hint=f"Allow at least {error.least + kept:,} bytes, or larger groups.",
        ) from error
    return {layer: stage.widths[choice] for group, choice in zip(groups, chosen, strict=True) for layer in group.layers}


def _average_bits(skeleton: Skeleton, stage: MixedPrecision) -> float:
    """The average that the budget allows, about."""
    if stage.average_bits is not None:
        return stage.average_bits
    layers = [name for name in skeleton.block_layers if not stage.ignores(name)]
    num_weights = sum(skeleton.num_weights(layer) for layer in layers)
    assert stage.max_size_bytes is not None
    room = stage.max_size_bytes - _bytes_of_the_rest(skeleton, set(layers))
    return 8 * room / max(1, num_weights)


def _budget(skeleton: Skeleton, stage: MixedPrecision, layers: Sequence[str]) -> int:
    if stage.max_size_bytes is not None:
        return stage.max_size_bytes
    assert stage.average_bits is not None
    return int(stage.average_bits * sum(skeleton.num_weights(layer) for layer in layers))


def _cost(skeleton: Skeleton, stage: MixedPrecision, layer: str, num_bits: int) -> int:
    """Of the budget: bytes on disk, or bits of codes."""
    if stage.max_size_bytes is None:
        return num_bits * skeleton.num_weights(layer)
    rows, columns = skeleton.linear_shape(layer)
    size = usable_group_size(columns, stage.group_size)
    scale_bytes = skeleton.checkpoint.stored_dtype(f"{layer}.weight").itemsize
    tensors = stored_bytes(rows, columns, num_bits, size, scale_bytes, symmetric=stage.symmetric)
    return tensors + 4 * _HEADER_BYTES_A_TENSOR


def _bytes_of_the_rest(skeleton: Skeleton, layers: set[str]) -> int:
    """Of everything that the stage does not touch."""
    names = [name for name in skeleton.checkpoint.parameters() if name.removesuffix(".weight") not in layers]
    return sum(
        skeleton.model.get_parameter(name).numel() * skeleton.checkpoint.stored_dtype(name).itemsize
        + _HEADER_BYTES_A_TENSOR
        for name in names
    )


def _nearest(widths: Sequence[int], average: float) -> int:
    return min(widths, key=lambda width: abs(width - average))
