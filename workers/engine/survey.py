"""A pass over the uncompressed model that says what pruning would cost each layer, before any is pruned."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.engine.device import release_memory
from workers.engine.forward import Gate
from workers.engine.skeleton import Skeleton
from workers.engine.statistics import InputStatistics
from workers.engine.text import part_of
from workers.solvers.allocation import ErrorCurve, error_curve

# A mean square of each column is known well from few tokens, and the hidden states of so few fit into memory.
NUM_TOKENS = 8_192

Progress = Callable[[str, int, int, float], None]  # step, block, num_blocks, fraction


@torch.inference_mode()
def survey(skeleton: Skeleton, calibration: Sequence[Tensor], progress: Progress) -> list[dict[str, ErrorCurve]]:
    """The error curve of each linear layer of each block, on a part of the samples.

    ``calibration`` holds samples × tokens for each length of samples; blocks are loaded one at a time.
    """
    architecture = skeleton.architecture
    blocks = [skeleton.block_name(index) for index in range(skeleton.num_blocks)]
    stops = [*blocks, *(f"{block}.{group[0]}" for block in blocks for group in architecture.linear_groups)]
    gates = [Gate(name, skeleton.module(name), stops=True) for name in stops]
    passes = [skeleton.forward_pass(samples) for samples in part_of(calibration, NUM_TOKENS)]
    outer = skeleton.present(architecture.before_blocks)
    for name in outer:
        skeleton.load(name)
    for each in passes:
        each.advance_to(blocks[0])
    for name in outer:
        skeleton.unload(name)
    curves: list[dict[str, ErrorCurve]] = []
    for index, block in enumerate(blocks):
        curves.append({})
        progress(f"plan.{block}", index, len(blocks), index / len(blocks))
        skeleton.load(block)
        for group in architecture.linear_groups:
            leader = f"{block}.{group[0]}"
            statistics = InputStatistics(
                leader, skeleton.linear_weight(leader).shape[1], frozenset({"input_norms"}), skeleton.device
            )
            for each in passes:
                statistics.add(each.advance_to(leader))
            statistics.finish()
            for layer in group:
                name = f"{block}.{layer}"
                curves[-1][name] = error_curve(skeleton.linear_weight(name), statistics.input_norms)
        for each in passes:
            if index + 1 < len(blocks):
                each.advance_to(blocks[index + 1])
            else:
                each.abandon()
        skeleton.unload(block)
        release_memory()
    for gate in gates:
        gate.remove()
    return curves
