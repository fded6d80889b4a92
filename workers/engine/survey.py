"""A pass over the uncompressed model that says what pruning would cost each layer, before any is pruned."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.engine.device import keeping_freed_memory, release_memory
from workers.engine.forward import Gate
from workers.engine.journal import Journal
from workers.engine.skeleton import Skeleton
from workers.engine.statistics import InputStatistics
from workers.engine.text import part_of
from workers.solvers.allocation import ErrorCurve, error_curve

# A mean square of each column is known well from few tokens, and the hidden states of so few fit into memory.
NUM_TOKENS = 8_192

Progress = Callable[[str, int, int, float], None]  # step, block, num_blocks, fraction


@torch.inference_mode()
def survey(
    skeleton: Skeleton, calibration: Sequence[Tensor], journal: Journal, progress: Progress
) -> list[dict[str, ErrorCurve]]:
    """The error curve of each linear layer of each block, on a part of the samples.

    ``calibration`` holds samples × tokens for each length of samples; blocks are loaded one at a time,
    and those that ``journal`` has are not done again.
    """
    architecture = skeleton.architecture
    blocks = [skeleton.block_name(index) for index in range(skeleton.num_blocks)]
    leaders = [f"{block}.{group[0]}" for index, block in enumerate(blocks) for group in skeleton.linear_groups(index)]
    stops = [*blocks, *leaders]
    gates = [Gate(name, skeleton.module(name), stops=True) for name in stops]
    passes = [skeleton.forward_pass(samples, is_exact=False) for samples in part_of(calibration, NUM_TOKENS)]
    journal.begin_again_unless_whole([[*each.input_shape, skeleton.hidden_size] for each in passes])
    curves = [{name: ErrorCurve.from_json(curve) for name, curve in entry.items()} for entry in journal.entries]
    first = len(curves)
    outer = skeleton.present(architecture.before_blocks)
    for name in outer:
        skeleton.load(name)
    with skeleton.skipped(blocks[:first]):
        for number, each in enumerate(passes):
            hidden = each.advance_to(blocks[first])
            if first:
                journal.activations.restore(first, number, hidden)
    for name in outer:
        skeleton.unload(name)
    for index, block in enumerate(blocks[first:], first):
        curves.append({})
        progress(f"plan.{block}", index, len(blocks), index / len(blocks))
        skeleton.load(block)
        for group in skeleton.linear_groups(index):
            leader = f"{block}.{group[0]}"
            statistics = InputStatistics(
                leader, skeleton.linear_weight(leader).shape[1], frozenset({"input_norms"}), skeleton.device
            )
            with keeping_freed_memory():
                for each in passes:
                    statistics.add(each.advance_to(leader))
            statistics.finish()
            for layer in group:
                name = f"{block}.{layer}"
                curves[-1][name] = error_curve(skeleton.linear_weight(name), statistics.input_norms)
        if index + 1 < len(blocks):
            for number, each in enumerate(passes):
                journal.activations.keep(index + 1, number, each.advance_to(blocks[index + 1]))
            entry = {name: curve.to_json() for name, curve in curves[-1].items()}
            shapes = [torch.Size([*each.input_shape, skeleton.hidden_size]) for each in passes]
            journal.finish_block(index, entry, shapes)
        skeleton.unload(block)
        release_memory()
    for each in passes:
        each.abandon()
    for gate in gates:
        gate.remove()
    return curves
