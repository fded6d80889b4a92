"""One pass over a model as it is, a block at a time, in which somebody listens to each block.

What is held of the text is its hidden states; what was heard of a block is kept, so that a killed job goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor

from workers.engine.device import keeping_freed_memory, release_memory
from workers.engine.forward import Gate
from workers.engine.holdings import MemoryBudget
from workers.engine.journal import Journal
from workers.engine.shaping import Progress
from workers.engine.skeleton import Skeleton
from workers.engine.text import batches


class Listener(Protocol):
    """Hears one block while the text passes through it."""

    def finish(self) -> dict[str, Any]:
        """Hear no more, and say in JSON what was heard."""


@torch.inference_mode()
def listen(
    skeleton: Skeleton,
    samples: Sequence[Tensor],
    journal: Journal,
    waiting_bytes: int,
    progress: Progress,
    listener_to: Callable[[str], Listener],
) -> list[dict[str, Any]]:
    """What a listener to each block, called by the block's name, heard of it. In ``journal`` is kept how far we are.

    ``samples`` are samples × tokens, one tensor for each length. Products are computed in the way that is fastest.
    """
    blocks = [skeleton.block_name(index) for index in range(skeleton.num_blocks)]
    gates = [Gate(name, skeleton.module(name), stops=True) for name in (*blocks, skeleton.end)]
    budget = MemoryBudget(journal.folder / "waiting", waiting_bytes)
    passes = [skeleton.forward_pass(ids, is_exact=False, budget=budget) for each in samples for ids in batches(each)]
    shapes = [torch.Size([*each.input_shape, skeleton.hidden_size]) for each in passes]
    journal.begin_again_unless_whole(shapes)
    heard = list(journal.entries)
    first = len(heard)
    with loaded(skeleton, skeleton.present(skeleton.architecture.before_blocks)), skeleton.skipped(blocks[:first]):
        for number, each in enumerate(passes):
            hidden = each.advance_to(blocks[first])
            if first:
                journal.activations.restore(first, number, hidden)
            each.rest()
    for index in range(first, len(blocks)):
        following = blocks[index + 1] if index + 1 < len(blocks) else skeleton.end
        progress(f"plan.{blocks[index]}", index, len(blocks), index / len(blocks))
        listener = listener_to(blocks[index])
        with loaded(skeleton, [blocks[index]]), keeping_freed_memory():
            for number, each in enumerate(passes):
                hidden = each.advance_to(following)
                if index + 1 < len(blocks):
                    journal.activations.keep(index + 1, number, hidden)
                each.rest()
        heard.append(listener.finish())
        if index + 1 < len(blocks):
            journal.finish_block(index, heard[-1], shapes)
    for each in passes:
        each.abandon()
    for gate in gates:
        gate.remove()
    budget.close()
    return heard


def loaded(skeleton: Skeleton, parts: Sequence[str], *, has_head: bool = False) -> ExitStack:
    """These parts of the model, there until the end of a ``with``."""
    stack = ExitStack()
    stack.callback(release_memory)
    for name in parts:
        stack.callback(skeleton.unload, name)
        skeleton.load(name)
    if has_head:
        stack.callback(skeleton.unload, skeleton.architecture.head)
        skeleton.load_head()
    return stack
