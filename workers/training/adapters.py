"""Low-rank adapters: what is learned of a frozen weight, and the plain weight that comes of both (arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from workers.errors import UserError
from workers.techniques import LoraRecovery
from workers.training.model import Whole
from workers.training.seeds import seed_of


class Adapter(nn.Module):
    """Adds scale · up · down to a weight whenever it is read, but where ``kept`` is false."""

    kept: Tensor | None

    def __init__(
        self, weight: Tensor, rank: int, scale: float, seed: int, *, is_transposed: bool, kept: Tensor | None
    ) -> None:
        """Begin with a product of zero: ``down`` (rank × in_features) by chance, ``up`` (out_features × rank) zero.

        ``weight`` and ``kept`` are as the module has them.
        """
        super().__init__()
        rows, columns = reversed(weight.shape) if is_transposed else weight.shape
        self.scale = scale
        self._is_transposed = is_transposed
        self.register_buffer("kept", kept, persistent=False)
        # Drawn on the CPU, so that it is the same wherever it is trained.
        chance = torch.rand(rank, columns, generator=torch.Generator().manual_seed(seed))
        self.down = nn.Parameter(((2 * chance - 1) / math.sqrt(columns)).to(weight.device))
        self.up = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer computes with, in float32 whatever products are made in."""
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.product(self.down, self.up)

    def product(self, down: Tensor, up: Tensor) -> Tensor:
        """What is added to the weight, as its module has it."""
        product = self.scale * (up @ down)
        product = product.T if self._is_transposed else product
        return product if self.kept is None else product * self.kept


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer of a model in training, and the names of what it is made of."""

    adapter: Adapter
    weight: str
    down: str
    up: str


@dataclass(frozen=True)
class Adapted:
    """The layers of a student that have adapters, by name, and what is to be said of them."""

    layers: Mapping[str, AdaptedLayer]
    fallbacks: list[dict[str, Any]]

    @torch.no_grad()
    def merged(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters of a checkpoint, those with adapters as what the model has computed with."""
        parts = {name for each in self.layers.values() for name in (each.weight, each.down, each.up)}
        merged = {name: value for name, value in values.items() if name not in parts}
        for name, each in self.layers.items():
            merged[f"{name}.weight"] = values[each.weight] + each.adapter.product(values[each.down], values[each.up])
        return merged


def adapt(student: Whole, stage: LoraRecovery, seed: int, param: str, *, keeps_zeros: bool) -> Adapted:
    """From now on, have the blocks' linear layers that ``stage`` does not ignore read adapted weights, and freeze all.

    With ``keeps_zeros`` adapters add nothing to weights that are zero. Blocks that share a weight share its adapter.
    Raises UserError ``nothing_changed`` where every layer is ignored; ``param`` is where the stage is.
    """
    student.model.requires_grad_(requires_grad=False)
    kept = student.masks() if keeps_zeros else {}
    layers: dict[str, AdaptedLayer] = {}
    fallbacks: list[dict[str, Any]] = []
    known: dict[int, Adapter] = {}
    for name in student.skeleton.block_layers:
        module: Any = student.skeleton.module(name)
        weight = module.weight
        if stage.ignores(name):
            continue
        is_shared = id(weight) in known
        if not is_shared:
            rank = min(stage.rank, *weight.shape)
            if rank < stage.rank:
                message = f"rank {rank}: the smaller side of the layer is no longer"
                fallbacks.append({"layer": name, "code": "rank", "message": message})
            known[id(weight)] = Adapter(
                weight,
                rank,
                stage.lora_alpha / rank,
                seed_of(seed, "adapter", name),
                is_transposed=isinstance(module, Conv1D),
                kept=kept.get(f"{name}.weight"),
            )
        adapter = known[id(weight)]
        parametrize.register_parametrization(module, "weight", adapter, unsafe=True)
        module.forward = partial(_computed_again, module)
        if not is_shared:
            prefix = f"{name}.parametrizations.weight"
            layers[name] = AdaptedLayer(adapter, f"{prefix}.original", f"{prefix}.0.down", f"{prefix}.0.up")
    if not layers:
        raise UserError(
            "nothing_changed",
            "Every linear layer is on the ignore list of this stage, so nothing is trained.",
            param=f"{param}.ignore",
            hint="Shorten `ignore`, or leave the stage out.",
        )
    return Adapted(layers, fallbacks)


def _computed_again(module: nn.Module, inputs: Tensor) -> Any:
    """What ``module`` gives; its weight is made anew for the gradient, or each would be held until then."""
    return checkpoint(type(module).forward, module, inputs, use_reentrant=False, preserve_rng_state=False)
