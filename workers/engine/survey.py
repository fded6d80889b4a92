"""A pass over the uncompressed model that says how much of each layer may be pruned, before any is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.engine.device import release_memory
from workers.engine.forward import ForwardPass, Gate
from workers.engine.skeleton import Skeleton
from workers.engine.statistics import InputStatistics
from workers.solvers.allocation import ErrorCurve, allocate, error_curve
from workers.techniques import PruningOptions, StageOptions

# A mean square of each column is known well from few tokens, and the hidden states of so few fit into memory.
NUM_TOKENS = 8_192
# How far the sparsity of a layer may be from that of all: an error curve knows nothing of what other layers make of it.
BOUND = 0.1

Progress = Callable[[str, int, int, float], None]  # step, block, num_blocks, fraction


def allocate_sparsities(
    skeleton: Skeleton, stages: Sequence[StageOptions], calibration: Tensor, progress: Progress
) -> list[dict[str, float]]:
    """The sparsity of each layer by stage; of stages that give all layers the same one, nothing.

    Every block has as many zeros as with one sparsity for all: relative errors compare layers that stand side by side,
    and do not say how much the blocks after them make of an error. ``calibration`` is samples × tokens; blocks are
    loaded one at a time.
    """
    sparsities: list[dict[str, float]] = [{} for _ in stages]
    for curves in _survey(skeleton, calibration, progress):
        for stage, found in zip(stages, sparsities, strict=True):
            if isinstance(stage, PruningOptions) and stage.allocation == "error":
                assert stage.sparsity is not None
                taken = {name: curve for name, curve in curves.items() if not stage.ignores(name)}
                counts = allocate(taken, stage.sparsity, BOUND)
                found |= {name: count / taken[name].num_weights for name, count in counts.items()}
    return sparsities


@torch.inference_mode()
def _survey(skeleton: Skeleton, calibration: Tensor, progress: Progress) -> list[dict[str, ErrorCurve]]:
    """The error curve of each linear layer of each block, on the first samples of ``calibration``."""
    architecture = skeleton.architecture
    blocks = [skeleton.block_name(index) for index in range(skeleton.num_blocks)]
    stops = [*blocks, *(f"{block}.{group[0]}" for block in blocks for group in architecture.linear_groups)]
    gates = [Gate(name, skeleton.module(name), stops=True) for name in stops]
    samples = calibration[: max(1, NUM_TOKENS // calibration.shape[1])]
    each = ForwardPass(skeleton.model, samples.to(skeleton.device))
    outer = skeleton.present(architecture.before_blocks)
    for name in outer:
        skeleton.load(name)
    each.advance_to(blocks[0])
    for name in outer:
        skeleton.unload(name)
    curves: list[dict[str, ErrorCurve]] = []
    for index, block in enumerate(blocks):
        curves.append({})
        progress(f"allocate.{block}", index, len(blocks), 0.0)
        skeleton.load(block)
        for group in architecture.linear_groups:
            leader = f"{block}.{group[0]}"
            statistics = InputStatistics(
                leader, skeleton.linear_weight(leader).shape[1], frozenset({"input_norms"}), skeleton.device
            )
            statistics.add(each.advance_to(leader))
            statistics.finish()
            for layer in group:
                name = f"{block}.{layer}"
                curves[-1][name] = error_curve(skeleton.linear_weight(name), statistics.input_norms)
        if index + 1 < len(blocks):
            each.advance_to(blocks[index + 1])
        else:
            each.abandon()
        skeleton.unload(block)
        release_memory()
    for gate in gates:
        gate.remove()
    return curves
