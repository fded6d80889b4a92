"""The engine's loop: block by block, load, gather, solve, go on with the result, write, free."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from workers.engine.block_parts import BlockParts
from workers.engine.device import keeping_freed_memory, release_memory
from workers.engine.forward import ForwardPass, Gate, SharedTransform
from workers.engine.holdings import MemoryBudget
from workers.engine.journal import PLANNING, Journal, part_name
from workers.engine.layer import Layer
from workers.engine.originals import Originals
from workers.engine.outer import Outer
from workers.engine.plan import make_plan
from workers.engine.rescaling import Rescaling
from workers.engine.results import PartResult, Streamed
from workers.engine.skeleton import Skeleton
from workers.engine.statistics import InputStatistics
from workers.engine.text import batches
from workers.errors import UserError
from workers.formats import compressed_tensors
from workers.formats.parts import Parts
from workers.recipe import Recipe
from workers.solvers.quantization import Grid
from workers.techniques import LayerOptions

Progress = Callable[[str, int, int, float], None]  # step, block, num_blocks, fraction


class Stream:
    """One pass over a checkpoint that applies the stages of a recipe to every block."""

    def __init__(
        self,
        skeleton: Skeleton,
        recipe: Recipe,
        journal: Journal,
        progress: Progress,
        waiting_bytes: int,
        *,
        keeps_zeros: bool = False,
        codes_too: Parts | None = None,
    ) -> None:
        """Waiting passes hold ``waiting_bytes`` in memory, and what is beyond in files: the result is the same.

        With ``keeps_zeros`` weights that are zero were pruned before, and stay so. What stands for quantized layers is
        also written to ``codes_too``, whatever the recipe's format.
        """
        self.skeleton = skeleton
        self._keeps_zeros = keeps_zeros
        self._codes_too = codes_too
        self._waiting_bytes = waiting_bytes
        self.recipe = recipe
        self.journal = journal
        share = recipe.plan_share
        self.progress: Progress = lambda step, block, num_blocks, fraction: progress(
            step, block, num_blocks, share + (1 - share) * fraction
        )
        self._plan_progress: Progress = lambda step, block, num_blocks, fraction: progress(
            step, block, num_blocks, share * fraction
        )
        self._outer = Outer(skeleton, recipe, journal.parts)
        self.result = Streamed(self._outer.result)
        self._plan: list[dict[str, float]] = [{} for _ in recipe.stages]  # of stages that treat layers differently
        self._originals = Originals(skeleton, [])
        self._gates: dict[str, Gate] = {}
        self._rescaling = Rescaling(skeleton)
        self._parts = BlockParts(skeleton, recipe, journal.parts, self._rescaling)

    @torch.inference_mode()
    def run(self, calibration: Sequence[Tensor], probe: Tensor) -> Streamed:
        """Compress every block that the journal does not have.

        ``calibration`` holds samples × tokens for each length of samples, and nothing where no stage or plan needs it;
        ``probe`` is sequences × tokens, which pass through the compressed blocks only, so that their logits are what
        the artifact has to give.
        """
        skeleton = self.skeleton
        if self.recipe.plan_share:
            with self._timed("plan"):
                self._plan = self.journal.once(
                    "plan",
                    lambda: make_plan(
                        skeleton, self.recipe, calibration, self.journal.inner(PLANNING), self._plan_progress
                    ),
                )
                shutil.rmtree(self.journal.folder / PLANNING, ignore_errors=True)
        blocks = [skeleton.block_name(index) for index in range(skeleton.num_blocks)]
        layers_of = {block: skeleton.linear_groups(index) for index, block in enumerate(blocks)}
        stops = {*blocks, skeleton.end}
        if self.recipe.statistics:
            stops |= {f"{block}.{group[0]}" for block, groups in layers_of.items() for group in groups}
        layers = [f"{block}.{layer}" for block, groups in layers_of.items() for group in groups for layer in group]
        gated = [*blocks, skeleton.end, *layers]
        self._gates = {name: Gate(name, skeleton.module(name), stops=name in stops) for name in gated}
        probe_pass = skeleton.forward_pass(probe)
        inputs = [ids for samples in calibration for ids in batches(samples)] if self.recipe.statistics else []
        budget = MemoryBudget(self.journal.folder / "waiting", self._waiting_bytes)
        passes = []
        if not self.recipe.calibrates_on_original:
            passes = [skeleton.forward_pass(ids, is_exact=False, budget=budget) for ids in inputs]
        if self.recipe.calibrates_on_original or "drift" in self.recipe.statistics:
            originals = [
                skeleton.forward_pass(ids, heeds_transforms=False, is_exact=False, budget=budget) for ids in inputs
            ]
            self._originals = Originals(skeleton, originals)
        compressed = [*passes, probe_pass]
        with self._timed("write"):
            self._outer.write()
        with self._timed("forward"), keeping_freed_memory():
            self._begin(blocks, compressed)
        for index in range(self.journal.num_blocks, len(blocks)):
            block = blocks[index]
            with self._timed("load"):
                skeleton.load(block)
            if (source := skeleton.source_block(index)) != index:
                self._share_block(index, source)
            else:
                self._compress_block(index, blocks, passes)
            release_memory()
            if index + 1 < len(blocks):
                with keeping_freed_memory():
                    self._finish_block(index, blocks[index + 1], compressed)
            else:
                with self._timed("forward"):
                    for each in passes:
                        each.abandon()
                    self._originals.abandon()
                    probe_pass.advance_to(skeleton.end)
            skeleton.unload(block)
            release_memory()
            self.progress(block, index, len(blocks), (index + 1) / len(blocks))
        with self._timed("forward"):
            self.result.probe_logits = self._finish(probe_pass)
        for gate in self._gates.values():
            gate.remove()
        budget.close()
        return self.result

    def _begin(self, blocks: list[str], compressed: list[ForwardPass]) -> None:
        """Bring the passes of the ``compressed`` model, and the originals, to the first block that is not finished."""
        skeleton, journal = self.skeleton, self.journal
        self.result.blocks = [PartResult.from_json(entry) for entry in journal.entries]
        done, first = blocks[: journal.num_blocks], blocks[journal.num_blocks]
        before_blocks = skeleton.present(skeleton.architecture.before_blocks)
        everyone = [*self._originals.passes, *compressed]
        kept = journal.has_activations([[*each.input_shape, skeleton.hidden_size] for each in everyone])
        with skeleton.skipped(done if kept else []):
            for name in before_blocks:
                skeleton.load(name)
            for number, each in enumerate(everyone):
                if number == len(self._originals.passes):
                    self._outer.assign_before_blocks()
                hidden = each.advance_to(first if kept else blocks[0])
                if kept:
                    journal.activations.restore(journal.num_blocks, number, hidden)
                each.rest()
        for name in before_blocks:
            skeleton.unload(name)
        for index, block in enumerate([] if kept else done):
            skeleton.load(block)
            for number, each in enumerate(everyone):
                if number == len(self._originals.passes):
                    self._assign_compressed(index)
                each.advance_to(blocks[index + 1])
                each.rest()
            skeleton.unload(block)

    def _assign_compressed(self, index: int) -> None:
        """Give a finished block, which is loaded, the weights that the artifact will compute with."""
        grids = self.result.blocks[index].grids
        self._parts.assign(index, grids)
        for layer, (grid, _) in grids.items():
            self._gates[layer].transform = self._as_read(grid)

    def _finish_block(self, index: int, following: str, compressed: list[ForwardPass]) -> None:
        """Bring every pass to the block ``following``, and have the journal keep what it brings there."""
        num_originals, shapes = len(self._originals.passes), []
        for number, each in enumerate([*self._originals.passes, *compressed]):
            with self._timed("forward"):
                is_original = number < num_originals
                hidden = self._originals.advance(number, following) if is_original else each.advance_to(following)
            with self._timed("journal"):
                self.journal.activations.keep(index + 1, number, hidden)
            each.rest()
            shapes.append(hidden.shape)
        self._originals.are_past()
        with self._timed("journal"):
            self.journal.finish_block(index, self.result.blocks[index].to_json(), shapes)

    def _share_block(self, index: int, source: int) -> None:
        """Have a block compute with what became of an earlier one's parameters, which it shares."""
        self.result.blocks.append(PartResult.empty(len(self.recipe.stages)))
        self.result.blocks[index].grids = self._parts.share(index, self.result.blocks[source])
        self._assign_compressed(index)

    def _compress_block(self, index: int, blocks: list[str], passes: list[ForwardPass]) -> None:
        """Solve every layer of a block, each group of them as soon as its input is there, and write what it became."""
        groups = self.skeleton.linear_groups(index)
        block = blocks[index]
        done: list[Layer] = []
        gathered: deque[InputStatistics | None] = deque()
        self.result.blocks.append(PartResult.empty(len(self.recipe.stages)))
        for number, group in enumerate(groups):
            if not gathered:
                # What the original reads does not wait for the groups before to be compressed.
                num_groups = len(groups) if self.recipe.calibrates_on_original else 1
                with keeping_freed_memory():
                    for each in range(number, number + num_groups):
                        leader = f"{block}.{groups[each][0]}"
                        self.progress(leader, index, len(blocks), (index + each / len(groups)) / len(blocks))
                        gathered.append(self._gather(leader, passes))
            statistics = gathered.popleft()
            layers = [self._layer(f"{block}.{name}", statistics) for name in group]
            with self._timed("solve"):
                self._apply_stages(block, group, layers, done)
            for layer in layers:
                if not gathered:  # else all passes are past it
                    self._originals.remember(layer.name)
                # From here on there is one copy of the weight: what was solved is not needed any more.
                layer.weight, layer.input_statistics = layer.effective_weight(), None
                self.skeleton.assign_linear(layer.name, layer.weight)
            self._set_transforms(layers)
            done += layers
            del statistics, layers
            release_memory()
        with self._timed("write"):
            if self._codes_too is not None:
                self._codes_too.write(part_name(index), _codes_of(done))
            self._parts.write(index, done, self.result.blocks[-1])

    def _set_transforms(self, layers: list[Layer]) -> None:
        """Have the layers of one input read it as they will in the artifact."""
        found: dict[tuple[Grid | None, int], list[Layer]] = {}
        for layer in layers:
            grid = None if layer.quantized is None else layer.quantized.grid
            found.setdefault((grid, id(layer.input_scale)), []).append(layer)
        for (grid, _), alike in found.items():
            transform = self._as_read(grid, alike[0].input_scale)
            shared = None if transform is None else SharedTransform(transform, len(alike))
            for layer in alike:
                self._gates[layer.name].transform = shared

    def _as_read(self, grid: Grid | None, scale: Tensor | None = None) -> Callable[[Tensor], Tensor] | None:
        """What becomes of a layer's input in the artifact: divided by ``scale``, then quantized if ``grid`` says so."""
        if grid is not None and self.recipe.activations is not None:
            return compressed_tensors.input_quantizer(self.recipe.activations, scale)
        return None if scale is None else (lambda inputs: inputs / scale)

    def _gather(self, leader: str, passes: list[ForwardPass]) -> InputStatistics | None:
        """Bring every pass to the layer ``leader`` and take in what it brought there."""
        originals = self._originals.passes
        if not (passes or originals):
            return None
        in_features = self.skeleton.linear_weight(leader).shape[1]
        statistics = InputStatistics(leader, in_features, self.recipe.statistics, self.skeleton.device)
        for number in range(len(passes or originals)):
            with self._timed("forward"):
                original = self._originals.advance(number, leader) if originals else None
                inputs = passes[number].advance_to(leader) if passes else original
            with self._timed("statistics"):
                assert inputs is not None
                statistics.add(inputs, original)
            with self._timed("forward"):
                for each in (*passes[number : number + 1], *originals[number : number + 1]):
                    each.rest()
        self._originals.are_past()
        statistics.finish()
        return statistics

    def _layer(self, name: str, statistics: InputStatistics | None) -> Layer:
        weight = self.skeleton.linear_weight(name)
        dtype = self.skeleton.checkpoint.stored_dtype(f"{name}.weight")
        return Layer(
            name,
            weight,
            dtype,
            statistics,
            zeros=weight == 0 if self._keeps_zeros else None,
            stores_codes=self.recipe.stores_codes,
            unpacks_narrowly=self.recipe.quantizes_embeddings,
            trained_codes=self.skeleton.checkpoint.trained_codes(name),
        )

    def _apply_stages(self, block: str, group: Sequence[str], layers: list[Layer], done: list[Layer]) -> None:
        """Run every stage on the layers of one input; ``done`` are those of the block before them."""
        for index, stage in enumerate(self.recipe.stages):
            if not isinstance(stage, LayerOptions):
                continue
            taken = [layer for layer in layers if not stage.ignores(layer.name)]
            if taken and stage.rescales_inputs:
                self._rescaling.apply(stage, block, group, layers, done)
            for layer in taken:
                metrics = self._stage_for(layer.name, index).compress(layer)
                if layer.quantized is not None:
                    grid = layer.quantized.grid
                    metrics |= {"num_bits": grid.num_bits, "group_size": grid.group_size}
                    layer.note_coarse_scales()
                self.result.blocks[-1].metrics[index][layer.name] = metrics
                self.result.blocks[-1].fallbacks[index] += layer.fallbacks
                layer.fallbacks.clear()

    def _stage_for(self, layer: str, index: int) -> LayerOptions:
        """A stage as it is for this layer."""
        stage, choice = self.recipe.stages[index], self._plan[index].get(layer)
        assert isinstance(stage, LayerOptions)
        return stage if choice is None else stage.at(choice)

    def _finish(self, probe_pass: ForwardPass) -> Tensor:
        """The probe's logits, through what follows the blocks and the head."""
        skeleton = self.skeleton
        self._outer.load_after_blocks()
        logits = probe_pass.finish().cpu()
        skeleton.unload(skeleton.architecture.head)
        if not bool(torch.isfinite(logits).all()):
            raise UserError(
                "non_finite_activations",
                "The compressed model's logits are not finite.",
                param="model.id",
                hint="Check that the original gives finite logits on the evaluation text; see its config.json.",
            )
        return logits

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.result.seconds[what] += time.perf_counter() - begin


def _codes_of(layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Codes, scales and zero-points of the layers that are quantized, by ``LAYER.codes`` and so on."""
    return {
        f"{layer.name}.{part}": tensor
        for layer in layers
        if (found := layer.quantized) is not None
        for part, tensor in (("codes", found.codes), ("scale", found.scale), ("zero_point", found.zero_point))
    }
