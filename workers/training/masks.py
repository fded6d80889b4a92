"""Weights of zero that stay zero while the others learn, and masks that grow meanwhile (arXiv:1710.01878)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workers.errors import UserError
from workers.solvers.pruning import magnitude_mask
from workers.techniques import GradualPruning, TrainingOptions
from workers.training.model import Whole

_STATE = "mask."


class Masks:
    """Of one training: which weights are pruned."""

    def __init__(
        self,
        student: Whole,
        parameters: Mapping[str, nn.Parameter],
        stage: TrainingOptions,
        num_steps: int,
        *,
        keeps_zeros: bool,
    ) -> None:
        """``parameters`` are those that are trained, by name; with ``keeps_zeros`` what is zero now was pruned."""
        self._parameters = parameters
        self._stage = stage if isinstance(stage, GradualPruning) else None
        self._updates = {} if self._stage is None else self._stage.updates(num_steps)
        self._modules = {} if self._stage is None else dict(_chosen(student, parameters, self._stage))
        self._were_kept = student.masks() if keeps_zeros or self._stage is not None else {}
        # By name of the parameter, false where weights are zero for good.
        self._kept = {name: mask for name, mask in self._were_kept.items() if keeps_zeros and name in parameters}

    def hold(self) -> None:
        """Take the gradients of pruned weights away: without one they have no moments, no decay, and stay."""
        for name, kept in self._kept.items():
            gradient = self._parameters[name].grad
            assert gradient is not None
            gradient.mul_(kept)

    @torch.no_grad()
    def grow(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Before the step after ``step`` steps, prune what is to be pruned by then."""
        if self._stage is None or step not in self._updates:
            return
        assert self._stage.sparsity is not None
        for layer, module in self._modules.items():
            name = f"{layer}.weight"
            weight = self._parameters[name]
            found = magnitude_mask(
                _turned(module, weight), self._stage.sparsity, self._stage.pattern, part=self._updates[step]
            )
            kept = _turned(module, ~found)
            # Zeros are the smallest there are, and so pruned again; where there are more of them, they stay too.
            self._kept[name] = kept = kept & self._kept[name] if name in self._kept else kept
            # Moments would move them on. Not a product: that of a negative weight is −0, which archives keep.
            for values in (weight, *(each for each in optimizer.state[weight].values() if each.dim())):
                values.masked_fill_(~kept, 0.0)

    @property
    def sparsity(self) -> float | None:
        """Of the layers whose masks grow, all together; None where none do."""
        if not self._modules:
            return None
        names = [f"{layer}.weight" for layer in self._modules]
        num_zeros = sum(int((~self._kept[name]).sum()) for name in names if name in self._kept)
        return num_zeros / sum(self._parameters[name].numel() for name in names)

    def state(self) -> dict[str, Tensor]:
        """What the weights alone do not tell: one that is not pruned may be zero by chance."""
        return {f"{_STATE}{name}": kept for name, kept in self._kept.items()} if self._stage is not None else {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`."""
        for name, kept in state.items():
            if name.startswith(_STATE):
                parameter = name.removeprefix(_STATE)
                self._kept[parameter] = kept.to(self._parameters[parameter].device)

    def report(self, param: str) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
        """Of each layer whose mask has grown how many weights were pruned and its sparsity; and what fell back.

        Raises UserError ``nothing_changed`` where all of them were zero before; ``param`` is where the stage is.
        """
        layers: dict[str, dict[str, Any]] = {}
        fallbacks = []
        for layer, module in self._modules.items():
            assert self._stage is not None
            name = f"{layer}.weight"
            kept = self._kept[name]
            pruned = ~kept & self._were_kept[name] if name in self._were_kept else ~kept
            sparsity, reason = self._stage.sparsity_of_columns(_turned(module, kept).shape[1])
            layers[layer] = {"num_pruned": int(pruned.sum()), "sparsity": sparsity}
            if reason is not None:
                fallbacks.append({"layer": layer, "code": "mask_structure", "message": reason})
        if layers and not any(each["num_pruned"] for each in layers.values()):
            raise UserError(
                "nothing_changed",
                "No weight became zero that was not zero before.",
                param=param,
                hint="Ask for more sparsity than the model already has.",
            )
        return layers, fallbacks


def _chosen(
    student: Whole, parameters: Mapping[str, nn.Parameter], stage: GradualPruning
) -> Iterator[tuple[str, nn.Module]]:
    """The blocks' linear layers that the stage prunes; of those that share a weight the first."""
    for layer in student.skeleton.block_layers:
        if not stage.ignores(layer) and f"{layer}.weight" in parameters:
            yield layer, student.skeleton.module(layer)


def _turned(module: nn.Module, weight: Tensor) -> Tensor:
    """From the way that the module has it to out_features × in_features, or back."""
    return weight.T if isinstance(module, Conv1D) else weight
