"""The engine's loop: block by block, load, gather, solve, go on with the result, write, free."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from workers.engine.device import release_memory
from workers.engine.forward import ForwardPass, stop_before
from workers.engine.layer import Layer
from workers.engine.skeleton import Skeleton
from workers.engine.statistics import InputStatistics
from workers.errors import UserError
from workers.formats import compressed_tensors
from workers.formats.parts import Parts
from workers.recipe import Recipe
from workers.solvers.quantization import Grid
from workers.techniques import StageOptions

# Tokens that one pass takes through a block at a time: enough for large products, few enough to stay in memory.
TOKENS_PER_PASS = 4096

Progress = Callable[[str, int, int, float], None]  # step, block, num_blocks, fraction


@dataclass
class Streamed:
    """What came of it, apart from the parts on disk."""

    probe_logits: Tensor  # float32, tokens × vocabulary: what the artifact has to give on the probe
    metrics: list[dict[str, dict[str, Any]]] = field(default_factory=list)  # of each stage, by layer
    grids: dict[str, tuple[Grid, int]] = field(default_factory=dict)  # of quantized layers, with in_features
    fallbacks: list[list[dict[str, Any]]] = field(default_factory=list)  # of each stage
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class Stream:
    """One pass over a checkpoint that applies the stages of a recipe to every block."""

    def __init__(self, skeleton: Skeleton, recipe: Recipe, parts: Parts, progress: Progress) -> None:
        self.skeleton = skeleton
        self.recipe = recipe
        self.parts = parts
        self.progress = progress
        self.result = Streamed(
            probe_logits=torch.empty(0), metrics=[{} for _ in recipe.stages], fallbacks=[[] for _ in recipe.stages]
        )

    @torch.inference_mode()
    def run(self, calibration: Tensor | None, probe: Tensor) -> Streamed:
        """Compress every block. ``calibration`` is samples × tokens, or None; ``probe`` a row of token ids.

        The probe passes through the compressed blocks only, so its logits are what the artifact has to give.
        """
        skeleton, architecture = self.skeleton, self.skeleton.architecture
        blocks = [skeleton.block_name(index) for index in range(skeleton.num_blocks)]
        stops = list(blocks)
        if calibration is not None:
            stops += [f"{block}.{group[0]}" for block in blocks for group in architecture.linear_groups]
        hooks = stop_before((name, skeleton.module(name)) for name in stops)
        probe_pass = ForwardPass(skeleton.model, probe.unsqueeze(0).to(skeleton.device))
        passes = [] if calibration is None else self._passes(calibration)
        with self._timed("forward"):
            skeleton.load(architecture.embedding)
            for each in [*passes, probe_pass]:
                each.advance_to(blocks[0])
            skeleton.unload(architecture.embedding)
        for index, block in enumerate(blocks):
            with self._timed("load"):
                skeleton.load(block)
            layers = self._compress_block(index, blocks, passes)
            with self._timed("write"):
                self.parts.write(f"block-{index:05d}", self._tensors_of(block, layers))
            with self._timed("forward"):
                if index + 1 < len(blocks):
                    for each in [*passes, probe_pass]:
                        each.advance_to(blocks[index + 1])
                else:
                    for each in passes:
                        each.abandon()
                    self.result.probe_logits = self._finish(probe_pass)
            skeleton.unload(block)
            del layers
            release_memory()
            self.progress(block, index, len(blocks), (index + 1) / len(blocks))
        for hook in hooks:
            hook.remove()
        return self.result

    def _passes(self, calibration: Tensor) -> list[ForwardPass]:
        samples = max(1, TOKENS_PER_PASS // calibration.shape[1])
        return [
            ForwardPass(self.skeleton.model, ids.to(self.skeleton.device)) for ids in torch.split(calibration, samples)
        ]

    def _compress_block(self, index: int, blocks: list[str], passes: list[ForwardPass]) -> list[Layer]:
        """Solve every layer of a block, each group of them as soon as its input is there."""
        groups = self.skeleton.architecture.linear_groups
        block, done = blocks[index], []
        for number, group in enumerate(groups):
            leader = f"{block}.{group[0]}"
            self.progress(leader, index, len(blocks), (index + number / len(groups)) / len(blocks))
            statistics = self._gather(leader, passes)
            for name in group:
                layer = self._layer(f"{block}.{name}", statistics)
                with self._timed("solve"):
                    self._apply_stages(layer)
                self.skeleton.assign(f"{layer.name}.weight", layer.effective_weight())
                done.append(layer)
        return done

    def _gather(self, leader: str, passes: list[ForwardPass]) -> InputStatistics | None:
        """Bring every pass to the layer ``leader`` and take in what it brought there."""
        if not passes:
            return None
        in_features = self.skeleton.module(leader).get_parameter("weight").shape[1]
        statistics = InputStatistics(leader, in_features, self.recipe.statistics, self.skeleton.device)
        for each in passes:
            with self._timed("forward"):
                inputs = each.advance_to(leader)
            with self._timed("statistics"):
                statistics.add(inputs)
        statistics.finish()
        return statistics

    def _layer(self, name: str, statistics: InputStatistics | None) -> Layer:
        weight = self.skeleton.module(name).get_parameter("weight")
        return Layer(name, weight, self.skeleton.checkpoint.stored_dtype(f"{name}.weight"), statistics)

    def _apply_stages(self, layer: Layer) -> None:
        for index, stage in enumerate(self.recipe.stages):
            if is_ignored(stage, layer.name):
                continue
            metrics = stage.compress(layer)
            if layer.quantized is not None:
                metrics["group_size"] = layer.quantized.grid.group_size
            self.result.metrics[index][layer.name] = metrics
            self.result.fallbacks[index] += layer.fallbacks
            layer.fallbacks.clear()

    def _tensors_of(self, block: str, layers: list[Layer]) -> dict[str, Tensor]:
        """Everything that the artifact stores of a block."""
        tensors = {}
        for layer in layers:
            if layer.quantized is None:
                tensors[f"{layer.name}.weight"] = layer.weight.to(layer.stored_dtype)
                continue
            self.result.grids[layer.name] = (layer.quantized.grid, layer.weight.shape[1])
            assert self.recipe.output.packing is not None
            for name, tensor in compressed_tensors.encode(layer.quantized, self.recipe.output.packing).items():
                tensors[f"{layer.name}.{name}"] = tensor
        compressed = {f"{layer.name}.weight" for layer in layers}
        for name in self.skeleton.checkpoint.parameters(block + "."):
            if name not in compressed:
                tensors[name] = self.skeleton.checkpoint.as_stored(name)
        return tensors

    def _finish(self, probe_pass: ForwardPass) -> Tensor:
        """The probe's logits, from the last block through the final norm and the head."""
        skeleton = self.skeleton
        skeleton.load(skeleton.architecture.final_norm)
        skeleton.load_head()
        logits = probe_pass.finish()[0].cpu()
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


def is_ignored(stage: StageOptions, layer: str) -> bool:
    """Whether the stage leaves this layer as it is."""
    return any(fnmatchcase(layer, pattern) for pattern in stage.ignore)
