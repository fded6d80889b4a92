"""Which heads, FFN neurons and hidden channels a model does best without, and the checkpoint that lacks them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from workers.architectures import Architecture
from workers.engine.checkpoint import Checkpoint
from workers.engine.device import release_memory
from workers.engine.empty_model import empty_model
from workers.engine.listening import listen
from workers.engine.shaping import Shaping
from workers.engine.skeleton import Skeleton
from workers.engine.text import part_of
from workers.errors import UserError
from workers.shapes.width import Widths, config_of_smaller_widths, widths_of
from workers.techniques import WidthPruning

# A norm over tokens, mean over samples, is known well from so many.
NUM_NORM_TOKENS = 32_768
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True)
class Units:
    """What stays, each list in order; empty where all do. A group is a key-value head and the heads that read it."""

    neurons: list[list[int]]  # of each block
    groups: list[list[int]]  # of each block
    channels: list[int]  # of all blocks


@dataclass(frozen=True)
class Importances:
    """How much each of them matters: the larger, the more."""

    neurons: Tensor  # float64, blocks × neurons
    groups: Tensor  # float64, blocks × groups
    channels: Tensor  # float64, channels


def leave_out_units(shaping: Shaping, stage: WidthPruning) -> tuple[Checkpoint, dict[str, Any]]:
    """The model's checkpoint with the sizes that the stage leaves, and what the report says of them.

    Raises:
        UserError: as :func:`config_of_smaller_widths` says, or ``non_finite_activations``.
    """
    skeleton, journal = shaping.skeleton, shaping.journal
    config = config_of_smaller_widths(stage, shaping.param, skeleton.checkpoint.config)
    before, after = widths_of(skeleton.checkpoint.config), widths_of(config)
    kept = Units(**journal.once("units", lambda: asdict(_choose(_importances(shaping, stage, before), before, after))))
    shutil.rmtree(journal.folder / "measuring", ignore_errors=True)
    metrics = {
        **{name: getattr(after, name) for name in _SIZES},
        **{f"original_{name}": getattr(before, name) for name in _SIZES},
        "kept_key_value_heads": kept.groups or None,
    }
    return _narrowed(skeleton, before, kept, config), metrics


def _choose(importances: Importances, before: Widths, after: Widths) -> Units:
    """The units that matter most, as many as ``after`` says."""

    def most(scores: Tensor, size_before: int, size_after: int) -> list[list[int]]:
        if size_before == size_after:
            return []
        order = scores.argsort(dim=-1, descending=True, stable=True)[:, :size_after]
        chosen: list[list[int]] = order.sort(dim=-1).values.tolist()
        return chosen

    channels = most(importances.channels.unsqueeze(0), before.hidden_size, after.hidden_size)
    return Units(
        most(importances.neurons, before.intermediate_size, after.intermediate_size),
        most(importances.groups, before.num_key_value_heads, after.num_key_value_heads),
        channels[0] if channels else [],
    )


def _importances(shaping: Shaping, stage: WidthPruning, widths: Widths) -> Importances:
    return _norms_of_weights(shaping, widths) if stage.importance == "magnitude" else _norms_of_units(shaping, widths)


def _norms_of_units(shaping: Shaping, widths: Widths) -> Importances:
    """How large neurons, heads and channels are on the calibration text: arXiv:2407.14679, section 2.2.

    Of each the L2 norm over the tokens of a sample (of a group of heads, over its columns too), mean over samples:
    of neurons as the layer after them reads them, of heads as the output projection does, of channels as attention and
    the FFN read them, summed over all blocks.
    """
    skeleton = shaping.skeleton
    samples = part_of(shaping.texts.calibration(skeleton), NUM_NORM_TOKENS)
    heard = listen(
        skeleton,
        samples,
        shaping.journal.inner("measuring"),
        shaping.waiting_bytes,
        shaping.progress,
        lambda block: _Norms(skeleton, block, widths),
    )
    found = Importances(
        torch.tensor([entry["neurons"] for entry in heard], dtype=torch.float64),
        torch.tensor([entry["groups"] for entry in heard], dtype=torch.float64),
        torch.tensor([entry["channels"] for entry in heard], dtype=torch.float64).sum(dim=0),
    )
    if not all(bool(torch.isfinite(each).all()) for each in (found.neurons, found.groups, found.channels)):
        raise UserError(
            "non_finite_activations",
            "The model's activations are not finite on the calibration text: they cannot be compared.",
            param="model.id",
            hint="The checkpoint gives NaN or infinity; check it, and its dtype, on the same text.",
        )
    return found


class _Norms:
    """Hears what the four groups of linear layers of a block read."""

    def __init__(self, skeleton: Skeleton, block: str, widths: Widths) -> None:
        self._num_samples = self._num_now = 0
        self._sums = {
            "neurons": torch.zeros(widths.intermediate_size, dtype=torch.float64),
            "groups": torch.zeros(widths.num_key_value_heads, dtype=torch.float64),
            "channels": torch.zeros(widths.hidden_size, dtype=torch.float64),
        }
        self._handles = [
            skeleton.module(f"{block}.{layers[0]}").register_forward_pre_hook(partial(self._hear, name))
            for layers, name in zip(
                skeleton.architecture.linear_groups, ("channels", "groups", "channels", "neurons"), strict=True
            )
        ]

    def finish(self) -> dict[str, Any]:
        """The norms, mean over samples."""
        for handle in self._handles:
            handle.remove()
        return {name: (each / self._num_samples).tolist() for name, each in self._sums.items()}

    def _hear(self, name: str, _module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs, num_units = arguments[0], self._sums[name].numel()
        if inputs.dim() == 3:  # OPT brings the tokens of all samples to its FFN in one row
            self._num_now = inputs.shape[0]
        if name == "groups":  # once in a block
            self._num_samples += self._num_now
        units = inputs.reshape(self._num_now, -1, num_units, inputs.shape[-1] // num_units)
        self._sums[name] += torch.linalg.vector_norm(units, dim=(1, 3)).sum(dim=0, dtype=torch.float64).cpu()


def _norms_of_weights(shaping: Shaping, widths: Widths) -> Importances:
    """Of each neuron, head and channel the L2 norm of all weights of the blocks' linear layers that go with it."""
    skeleton, checkpoint = shaping.skeleton, shaping.skeleton.checkpoint
    architecture = skeleton.architecture
    attention, output, gates, down = architecture.linear_groups
    neurons, groups = [], []
    channels = torch.zeros(widths.hidden_size, dtype=torch.float64)
    every_neuron = range(widths.intermediate_size)
    for index in range(skeleton.num_blocks):
        block = skeleton.block_name(index)
        shaping.progress(f"plan.{block}", index, skeleton.num_blocks, index / skeleton.num_blocks)
        rows, columns = {}, {}  # the sums of squares of each, by layer
        for layer in architecture.linear_layers:
            squares = checkpoint.parameter(f"{block}.{layer}.weight").square_()
            squares = squares.T if architecture.is_transposed else squares
            rows[layer] = squares.sum(dim=1, dtype=torch.float64)
            columns[layer] = squares.sum(dim=0, dtype=torch.float64)
            del squares
            release_memory()
        of_neurons = columns[down[0]].clone()
        for layer, chosen in zip(gates, _neuron_rows(architecture, widths, every_neuron), strict=True):
            of_neurons += rows[layer][chosen].view(-1, widths.intermediate_size).sum(dim=0)
        of_groups = columns[output[0]].view(widths.num_key_value_heads, -1).sum(dim=1)
        for group in range(widths.num_key_value_heads):
            for layer, chosen in zip(attention, _attention_rows(architecture, widths, [group]), strict=True):
                of_groups[group] += rows[layer][chosen].sum()
        neurons.append(of_neurons.sqrt())
        groups.append(of_groups.sqrt())
        channels += sum(columns[layer] for layer in (*attention, *gates)) + rows[output[0]] + rows[down[0]]
    return Importances(torch.stack(neurons), torch.stack(groups), channels.sqrt())


def _narrowed(skeleton: Skeleton, widths: Widths, kept: Units, config: Mapping[str, Any]) -> Checkpoint:
    """The skeleton's checkpoint with these units alone."""
    architecture, checkpoint = skeleton.architecture, skeleton.checkpoint
    channels = torch.tensor(kept.channels, dtype=torch.int64) if kept.channels else None
    cuts: dict[str, dict[int, Tensor]] = {}
    for index in range(skeleton.num_blocks):
        block = skeleton.block_name(index)
        for layer, (rows, columns) in _cuts_of_block(architecture, widths, kept, index, channels).items():
            dimensions = (1, 0) if architecture.is_transposed else (0, 1)
            both = zip(dimensions, (rows, columns), strict=True)
            cuts[f"{block}.{layer}.weight"] = {dimension: chosen for dimension, chosen in both if chosen is not None}
            if rows is not None:
                cuts[f"{block}.{layer}.bias"] = {0: rows}
    if channels is not None:
        # What is no layer of a block - embeddings, norms, what stands before a head - has no size in common with them
        # but this one: where the new model's differs, it is along the channels.
        narrow = empty_model(checkpoint.with_selection({}, config), architecture)
        new_shapes = {name: each.shape for name, each in narrow.named_parameters(remove_duplicate=False)}
        in_layers = {f"{layer}.{kind}" for layer in skeleton.block_layers for kind in ("weight", "bias")}
        for name, parameter in skeleton.model.named_parameters(remove_duplicate=False):
            if name not in in_layers:
                sizes = zip(parameter.shape, new_shapes[name], strict=True)
                cuts[name] = {dimension: channels for dimension, (old, new) in enumerate(sizes) if old != new}
    return checkpoint.with_selection({name: each for name, each in cuts.items() if each}, config)


def _cuts_of_block(
    architecture: Architecture, widths: Widths, kept: Units, index: int, channels: Tensor | None
) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Which rows and columns of each linear layer of a block stay; None where all do."""
    attention, output, gates, down = architecture.linear_groups
    head_rows: list[Tensor | None] = [None] * len(attention)
    neuron_rows: list[Tensor | None] = [None] * len(gates)
    head_columns = neurons = None
    if kept.groups:
        head_rows = [*_attention_rows(architecture, widths, kept.groups[index])]
        head_columns = _runs(kept.groups[index], widths.queries_a_group * widths.head_dim)
    if kept.neurons:
        neuron_rows = [*_neuron_rows(architecture, widths, kept.neurons[index])]
        neurons = torch.tensor(kept.neurons[index])
    return {
        **{layer: (rows, channels) for layer, rows in zip(attention, head_rows, strict=True)},
        output[0]: (channels, head_columns),
        **{layer: (rows, channels) for layer, rows in zip(gates, neuron_rows, strict=True)},
        down[0]: (channels, neurons),
    }


def _attention_rows(architecture: Architecture, widths: Widths, groups: Sequence[int]) -> list[Tensor]:
    """The rows that make the queries, keys and values of these groups, in each layer that makes any."""
    queries = _runs(groups, widths.queries_a_group * widths.head_dim)
    keys = _runs(groups, widths.head_dim)
    if architecture.attention_rows == "separate":
        return [queries, keys, keys]
    if architecture.attention_rows == "interleaved":
        return [_runs(groups, 3 * widths.head_dim)]
    num_queries, num_keys = (
        number * widths.head_dim for number in (widths.num_attention_heads, widths.num_key_value_heads)
    )
    return [torch.cat([queries, num_queries + keys, num_queries + num_keys + keys])]


def _neuron_rows(architecture: Architecture, widths: Widths, neurons: Sequence[int]) -> list[Tensor]:
    """The rows that make these neurons, in each layer that makes any."""
    rows = torch.tensor(neurons, dtype=torch.int64)
    if architecture.gates_are_stacked:
        return [torch.cat([rows, widths.intermediate_size + rows])]
    return [rows] * len(architecture.linear_groups[2])


def _runs(numbers: Sequence[int], length: int) -> Tensor:
    """The indices of what these numbers are of, if each is of ``length`` in a row."""
    return (torch.tensor(numbers, dtype=torch.int64).unsqueeze(1) * length + torch.arange(length)).flatten()
