"""What each width would cost each group of layers, as divergence of the model's output from the original's.

One pass over the uncompressed model. Every group of layers that read one input is quantized alone, at one width, while
some tokens pass through it; from there on these pass through the original beside those of all other groups, and what
they give at the end is held against what the original gives. The other widths follow from the errors that they make on
the group's own input, since for small changes the divergence grows with the squared error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.engine.activations import put
from workers.engine.device import keeping_freed_memory, release_memory
from workers.engine.forward import ForwardPass, Gate
from workers.engine.holdings import MemoryBudget
from workers.engine.journal import Journal
from workers.engine.layer import Layer
from workers.engine.skeleton import Skeleton
from workers.engine.statistics import InputStatistics
from workers.engine.text import part_of
from workers.evaluation.divergence import kl_divergence_of_logits
from workers.solvers.hessian import energy_of
from workers.solvers.quantization import quantize_to_nearest
from workers.techniques.mixed_precision import MixedPrecision

# Tokens whose output is compared. They pass through each block as often as there are groups before it.
NUM_COMPARED_TOKENS = 512
# Tokens of the inputs that errors are weighted by.
NUM_INPUT_TOKENS = 8_192
# What is below cannot be told from the rounding of float32, but is still more than nothing.
LEAST_DIVERGENCE = 1e-9
LARGEST_DIVERGENCE = 1e6
# Of the time, that of the blocks; the rest is the head's, which every group goes through.
_SHARE_OF_BLOCKS = 0.7
# Rows of a weight whose errors stand for those of all.
NUM_ROWS = 256

Progress = Callable[[str, int, int, float], None]  # step, block, num_blocks, fraction


@dataclass
class Sensitivity:
    """Of a group of layers that read one input and get one width."""

    layers: Sequence[str]
    errors: dict[int, float]  # ‖(W − Ŵ)X‖² by width, of some rows, each rounded to nearest
    divergence: float = 0.0  # KL(original ‖ changed), nats a token, with the group alone quantized at `width`

    def to_json(self) -> dict[str, Any]:
        """What is known before outputs are compared."""
        return {"layers": list(self.layers), "errors": [*self.errors.items()]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Sensitivity:
        """What :meth:`to_json` gave."""
        return cls(content["layers"], {int(bits): error for bits, error in content["errors"]})

    def at(self, num_bits: int, width: int) -> float:
        """The divergence that ``num_bits`` would cost, where ``width`` cost what was measured."""
        if self.errors[width] <= 0:
            return 0.0
        cost = self.divergence * self.errors[num_bits] / self.errors[width]
        return cost if math.isfinite(cost) else LARGEST_DIVERGENCE


@torch.inference_mode()
def measure(
    skeleton: Skeleton,
    stage: MixedPrecision,
    width: int,
    calibration: Sequence[Tensor],
    journal: Journal,
    progress: Progress,
) -> list[Sensitivity]:
    """The sensitivity of every group of layers, in order; layers on the stage's ignore list are left out.

    ``calibration`` holds samples × tokens for each length of samples. Blocks are loaded one at a time; between them
    hidden states lie in ``journal``, and blocks that it has are not done again.
    """
    blocks = [skeleton.block_name(index) for index in range(skeleton.num_blocks)]
    groups = {
        f"{block}.{group[0]}": [name for layer in group if not stage.ignores(name := f"{block}.{layer}")]
        for index, block in enumerate(blocks)
        for group in skeleton.linear_groups(index)
    }
    groups = {leader: layers for leader, layers in groups.items() if layers}
    gates = [Gate(name, skeleton.module(name), stops=True) for name in (*blocks, skeleton.end, *groups)]
    measurement = _Measurement(skeleton, stage, width, groups, calibration, journal)
    measurement.begin()
    for index in range(journal.num_blocks, len(blocks)):
        progress(f"plan.{blocks[index]}", index, len(blocks), _SHARE_OF_BLOCKS * index / len(blocks))
        measurement.pass_block(index)
    measurement.compare(
        lambda done: progress(
            "plan.compare", len(blocks) - 1, len(blocks), _SHARE_OF_BLOCKS + (1 - _SHARE_OF_BLOCKS) * done
        )
    )
    for gate in gates:
        gate.remove()
    return list(measurement.found.values())


class _Measurement:
    """Passes through the original, one for each group of layers that it is quantized for, and what was found so far.

    A group is called by its leader, the first of its layers.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        stage: MixedPrecision,
        width: int,
        groups: Mapping[str, Sequence[str]],
        calibration: Sequence[Tensor],
        journal: Journal,
    ) -> None:
        self._skeleton, self._stage, self._width = skeleton, stage, width
        self._groups = groups
        self._journal = journal
        self._stops = [*map(skeleton.block_name, range(skeleton.num_blocks)), skeleton.end]
        (compared,) = part_of([max(calibration, key=torch.numel)], NUM_COMPARED_TOKENS)
        self._original = skeleton.forward_pass(compared)
        self._inputs = [
            skeleton.forward_pass(samples, is_exact=False) for samples in part_of(calibration, NUM_INPUT_TOKENS)
        ]
        # As many as there are layers in all: what they hold while they wait must not grow with the depth.
        budget = MemoryBudget(journal.folder / "waiting", 0)
        self._changed = {leader: skeleton.forward_pass(compared, budget=budget) for leader in groups}
        going_on = itertools.islice(self._changed.values(), sum(map(len, journal.entries)))
        journal.begin_again_unless_whole(self._shapes([self._original, *self._inputs, *going_on]))
        self.found = {
            leader: Sensitivity.from_json(each) for entry in journal.entries for leader, each in entry.items()
        }
        self._waiting: dict[str, Tensor] = {}  # what passes of groups to come enter with, in the memory of `before`

    def begin(self) -> None:
        """Bring passes to the first block that is not finished, those of groups to come each to its own."""
        skeleton, stops, first = self._skeleton, self._stops, self._journal.num_blocks
        outer = skeleton.present(skeleton.architecture.before_blocks)
        for name in outer:
            skeleton.load(name)
        with skeleton.skipped(stops[:first]):
            for number, each in enumerate(self._followed()):
                hidden = each.advance_to(stops[first])
                if first:
                    self._journal.activations.restore(first, number, hidden)
                if each is self._original:
                    self._before = hidden
                each.rest()
        for index, block in enumerate(stops[first:-1], first):
            # A block's forward is looked up before its gate: what waits there will run it, whatever comes in its place.
            with skeleton.skipped(stops[:index]):
                for leader in self._leaders_in(block):
                    self._waiting[leader] = self._changed[leader].advance_to(block)
                    put(self._before, self._waiting[leader])
                    self._changed[leader].rest()
        for name in outer:
            skeleton.unload(name)
        self._unread = torch.zeros_like(self._before)

    def pass_block(self, index: int) -> None:
        """Bring every pass through a block; on the way, find out what its groups cost."""
        block, following = self._stops[index], self._stops[index + 1]
        keep, number = self._journal.activations.keep, itertools.count(1 + len(self._inputs))
        self._skeleton.load(block)
        with keeping_freed_memory():
            for leader in self.found:
                keep(index + 1, next(number), self._changed[leader].advance_to(following))
                self._changed[leader].rest()
        for leader in self._leaders_in(block):
            keep(index + 1, next(number), self._pass_quantized(leader, following))
            self._changed[leader].rest()
        with keeping_freed_memory():
            for which, each in enumerate([self._original, *self._inputs]):
                hidden = each.advance_to(following)
                keep(index + 1, which, hidden)
                if each is self._original:
                    self._before = hidden
        entry = {leader: self.found[leader].to_json() for leader in self._leaders_in(block)}
        self._journal.finish_block(index, entry, self._shapes(self._followed()))
        self._skeleton.unload(block)
        release_memory()

    def compare(self, progress: Callable[[float], None]) -> None:
        """Bring all through the head, one after another, and note the divergences."""
        for each in self._inputs:
            each.abandon()
        _compare(self._skeleton, self._original, self._changed, self.found, progress)

    def _pass_quantized(self, leader: str, following: str) -> Tensor:
        """Bring the pass of a group through its block, of which that group alone is quantized; what it brings out."""
        skeleton = self._skeleton
        originals = {name: skeleton.linear_weight(name) for name in self._groups[leader]}
        inputs = [each.advance_to(leader) for each in self._inputs]
        self.found[leader] = _quantize_alone(skeleton, self._stage, self._width, originals, inputs)
        entered = self._waiting.pop(leader)
        put(self._before.clone(), entered)
        left = self._changed[leader].advance_to(following)
        # The pass keeps what it entered with and reads it no more: without memory of its own, depth costs none.
        if left is not entered:
            put(self._unread, entered)
        for name, weight in originals.items():
            skeleton.assign_linear(name, weight)
        return left

    def _followed(self) -> list[ForwardPass]:
        """Passes whose hidden states the journal keeps, in its order."""
        return [self._original, *self._inputs, *(self._changed[leader] for leader in self.found)]

    def _leaders_in(self, block: str) -> list[str]:
        return [leader for leader in self._groups if leader.startswith(block + ".")]

    def _shapes(self, passes: Iterable[ForwardPass]) -> list[torch.Size]:
        """Of what passes bring from block to block."""
        return [torch.Size([*each.input_shape, self._skeleton.hidden_size]) for each in passes]


def _quantize_alone(
    skeleton: Skeleton, stage: MixedPrecision, width: int, originals: dict[str, Tensor], inputs: list[Tensor]
) -> Sensitivity:
    """Give layers, whose weights are ``originals`` and who read ``inputs``, their weights at ``width``."""
    # Where everything else is the original's, so is the input.
    stage = stage.model_copy(update={"asymmetric_calibration": False})
    found = Sensitivity(list(originals), dict.fromkeys(stage.widths, 0.0))
    statistics = InputStatistics(found.layers[0], inputs[0].shape[-1], stage.statistics, skeleton.device)
    for each in inputs:
        statistics.add(each)
    statistics.finish()
    importance = statistics.hessian.diagonal().contiguous()
    for name, weight in originals.items():
        dtype = skeleton.checkpoint.stored_dtype(f"{name}.weight")
        layer = Layer(name, weight, dtype, statistics)
        rows = weight[:: -(-weight.shape[0] // NUM_ROWS)].contiguous()
        for num_bits in stage.widths:
            grid = layer.grid(stage.at(num_bits))
            rounded = quantize_to_nearest(rows, grid, clip_search=True, importance=importance).dequantize()
            found.errors[num_bits] += energy_of(rows - rounded, statistics.hessian) * weight.shape[0] / rows.shape[0]
        stage.at(width).compress(layer)
        skeleton.assign_linear(name, layer.effective_weight())
    return found


def _compare(
    skeleton: Skeleton,
    original: ForwardPass,
    changed: dict[str, ForwardPass],
    found: dict[str, Sensitivity],
    progress: Callable[[float], None],
) -> None:
    """Bring all through the head, one after another, and note the divergences."""
    for name in skeleton.present(skeleton.architecture.after_blocks):
        skeleton.load(name)
    skeleton.load_head()
    before = original.finish().log_softmax(dim=-1)
    for number, (leader, each) in enumerate(changed.items()):
        progress(number / len(changed))
        divergence = float(kl_divergence_of_logits(before, each.finish()).mean())
        # What is no number any more is the worst that a width can do.
        found[leader].divergence = (
            max(LEAST_DIVERGENCE, divergence) if math.isfinite(divergence) else LARGEST_DIVERGENCE
        )
    for name in skeleton.present([*skeleton.architecture.after_blocks, skeleton.architecture.head]):
        skeleton.unload(name)
