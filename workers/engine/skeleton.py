"""A model without weights, whose parts are filled and emptied as the stream passes through it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workers.architectures import Architecture, Producer
from workers.architectures.compact import compact_of, is_transposed
from workers.engine.checkpoint import Checkpoint
from workers.engine.empty_model import empty_model
from workers.engine.forward import ForwardPass
from workers.engine.holdings import MemoryBudget
from workers.errors import UserError


class Skeleton:
    """The model of a checkpoint on the meta device; parts of it are real while they are loaded."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.architecture = architecture
        self.device = device
        self.model = empty_model(checkpoint, architecture)
        self.compact = compact_of(checkpoint.config)
        self._move_buffers()
        self._check_names()
        self._check_shapes()
        self._check_tied_head()

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""
        return len(self.model.get_submodule(self.architecture.blocks))

    def block_name(self, index: int) -> str:
        """Name of a block: ``model.layers.12``."""
        return f"{self.architecture.blocks}.{index}"

    def source_block(self, index: int) -> int:
        """Whose parameters a block has: its own, or those of an earlier one that it shares them with."""
        source = self.compact.sources.get(self.block_name(index))
        return index if source is None else int(source.rpartition(".")[2])

    def linear_groups(self, index: int) -> tuple[tuple[str, ...], ...]:
        """Linear layers of a block by their names in it, in order of execution; those in one group read one input."""
        return self.compact.groups(self.architecture, self.block_name(index))

    def producer(self, block: str, group: Sequence[str]) -> Producer | None:
        """What makes the input of such a group; None where nothing could take over a scale."""
        return self.compact.producer(self.architecture, block, group, self.checkpoint.config)

    @property
    def end(self) -> str:
        """Name of the module that a pass meets first after the last block."""
        return self.present([*self.architecture.after_blocks, self.architecture.head])[0]

    @property
    def hidden_size(self) -> int:
        """Columns of what goes from block to block."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def linear_layers(self) -> list[str]:
        """Names of all linear layers of the model, those outside the blocks too."""
        return [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear | Conv1D)]

    @property
    def block_layers(self) -> list[str]:
        """Names of the linear layers of all blocks that have parameters of their own, in order."""
        own = [index for index in range(self.num_blocks) if self.source_block(index) == index]
        return [
            f"{self.block_name(index)}.{layer}"
            for index in own
            for group in self.linear_groups(index)
            for layer in group
        ]

    def linear_shape(self, name: str) -> tuple[int, int]:
        """Out_features and in_features of a linear layer, loaded or not."""
        rows, columns = self.module(name).get_parameter("weight").shape
        return (columns, rows) if is_transposed(self.architecture, name) else (rows, columns)

    @property
    def matrix_shapes(self) -> dict[str, list[int]]:
        """Rows and columns of the embedding, and out_features and in_features of :attr:`block_layers`."""
        embedding = self.architecture.embedding
        layers = {name: list(self.linear_shape(name)) for name in self.block_layers}
        return {embedding: list(self.module(embedding).get_parameter("weight").shape), **layers}

    def num_weights(self, name: str) -> int:
        """Of a linear layer, loaded or not."""
        return math.prod(self.linear_shape(name))

    @property
    def tied_parameters(self) -> dict[str, str]:
        """Parameters that are stored once, under another name, and that name: of a head, or of blocks that share."""
        shared = {
            f"{block}.{name}": f"{source}.{name}"
            for block, source in self.compact.sources.items()
            for name, _ in self.module(block).named_parameters()
        }
        return {**self.architecture.tied_parameters(self.checkpoint.config), **shared}

    @property
    def num_parameters(self) -> int:
        """Of the whole model, tied ones once."""
        tied = self.tied_parameters
        named = self.model.named_parameters(remove_duplicate=False)
        return sum(parameter.numel() for name, parameter in named if name not in tied)

    def num_values(self, name: str) -> int:
        """Of a parameter or buffer, loaded or not."""
        module, _, last = name.rpartition(".")
        value: Tensor = getattr(self.module(module), last)
        return value.numel()

    def present(self, names: Iterable[str]) -> list[str]:
        """Those of the modules that this model has."""
        known = {name for name, _ in self.model.named_modules()}
        return [name for name in names if name in known]

    def module(self, name: str) -> nn.Module:
        """A part of the model by name."""
        module: nn.Module = self.model.get_submodule(name)
        return module

    def forward_pass(
        self,
        input_ids: Tensor,
        *,
        heeds_transforms: bool = True,
        is_exact: bool = True,
        skips: Collection[str] = (),
        budget: MemoryBudget | None = None,
    ) -> ForwardPass:
        """A batch (sequences × tokens) before its way through the model, but for the blocks that it ``skips``.

        One that is not ``is_exact`` computes its products in the way that is fastest: enough for statistics.
        """
        return ForwardPass(
            self.model,
            input_ids.to(self.device),
            self.architecture.call_options,
            heeds_transforms=heeds_transforms,
            is_exact=is_exact,
            skips=skips,
            budget=budget,
        )

    def linear_weight(self, name: str) -> Tensor:
        """The weight of a loaded linear layer, out_features × in_features whatever way its module has it."""
        weight: Tensor = self.module(name).get_parameter("weight")
        return weight.T.contiguous() if is_transposed(self.architecture, name) else weight

    def assign_linear(self, name: str, weight: Tensor) -> None:
        """Make ``weight`` (out_features × in_features) that of a linear layer."""
        self.assign(f"{name}.weight", self.as_module_has_it(name, weight))

    def as_module_has_it(self, name: str, weight: Tensor) -> Tensor:
        """A layer's weight of out_features × in_features, the way that its module and the checkpoint have it."""
        return weight.T.contiguous() if is_transposed(self.architecture, name) else weight

    def load(self, prefix: str) -> None:
        """Read every parameter of the module ``prefix`` from the checkpoint, in float32.

        Raises:
            UserError: ``checkpoint_mismatch`` where one is missing or of another shape.
        """
        for name, parameter in self.module(prefix).named_parameters():
            full_name = f"{prefix}.{name}"
            self.assign(full_name, self._read(full_name, parameter.shape))

    def load_head(self) -> None:
        """Load the output head, which may be the embedding's matrix."""
        tied = self.architecture.tied_parameters(self.checkpoint.config)
        for parameter_name, parameter in self.module(self.architecture.head).named_parameters():
            name = f"{self.architecture.head}.{parameter_name}"
            self.assign(name, self._read(tied.get(name, name), parameter.shape))

    def unload(self, prefix: str) -> None:
        """Give back the memory of the module ``prefix``."""
        for name, parameter in self.module(prefix).named_parameters():
            self.assign(f"{prefix}.{name}", torch.empty(parameter.shape, dtype=torch.float32, device="meta"))

    @contextmanager
    def skipped(self, blocks: Iterable[str]) -> Iterator[None]:
        """Passes go through these blocks without change, and need none of their weights."""
        modules = [self.module(name) for name in blocks]
        for module in modules:
            module.forward = _unchanged
        try:
            yield
        finally:
            for module in modules:
                del module.forward  # the class's own is there again

    def assign(self, name: str, tensor: Tensor) -> None:
        """Make ``tensor`` the parameter ``name``."""
        module_name, _, parameter_name = name.rpartition(".")
        module = self.module(module_name)
        setattr(module, parameter_name, nn.Parameter(tensor, requires_grad=False))

    def _read(self, name: str, shape: torch.Size) -> Tensor:
        try:
            tensor = self.checkpoint.parameter(name)
        except KeyError:
            raise UserError(
                "checkpoint_mismatch",
                f"The checkpoint has no tensor {name}, which its config.json calls for.",
                param="model.id",
                hint="Save the model again with transformers' save_pretrained.",
            ) from None
        if tensor.shape != shape:
            raise _wrong_shape(name, list(tensor.shape), list(shape))
        return tensor.to(self.device)

    def _check_names(self) -> None:
        """Raise UserError ``checkpoint_mismatch`` for a tensor that the model has no place for.

        Left out silently, it would be missed by nobody until the artifact is compared; kept, no loader would open it.
        """
        known = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        known |= {name for name, _ in self.model.named_buffers(remove_duplicate=False)}
        unknown = [name for name in self.checkpoint.parameters() if name not in known]
        if unknown:
            raise UserError(
                "checkpoint_mismatch",
                f"The checkpoint has {len(unknown)} tensors that its config.json has no place for, "
                f"the first {unknown[0][:200]!r}.",
                param="model.id",
                hint="Save the model again with transformers' save_pretrained.",
            )

    def _check_shapes(self) -> None:
        """Hold headers against the config, before anything is computed from sizes that only the config claims."""
        for name, parameter in self.model.named_parameters():
            shape = self.checkpoint.shape(name)
            if shape is not None and shape != list(parameter.shape):
                raise _wrong_shape(name, shape, list(parameter.shape))

    def _check_tied_head(self) -> None:
        """Raise UserError ``checkpoint_mismatch`` for a head that is said to be another parameter, and is not.

        Loaders disagree on such a checkpoint: transformers keeps the stored head, others take the embedding.
        """
        stored = set(self.checkpoint.parameters())
        for head, source in self.architecture.tied_parameters(self.checkpoint.config).items():
            if not {head, source} <= stored:
                continue
            if not torch.equal(self.checkpoint.parameter(head), self.checkpoint.parameter(source)):
                raise UserError(
                    "checkpoint_mismatch",
                    f"config.json ties the head to the embedding, and {head} differs from {source}.",
                    param="model.id",
                    hint="Set tie_word_embeddings to false, or leave the head out of the checkpoint.",
                )

    def _move_buffers(self) -> None:
        """Rotary frequencies and the like are computed from the config, not stored."""
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))


def _wrong_shape(name: str, found: list[int], wanted: list[int]) -> UserError:
    return UserError(
        "checkpoint_mismatch",
        f"The tensor {name} has shape {found}; its config.json calls for {wanted}.",
        param="model.id",
        hint="config.json belongs to another checkpoint; put the right one beside the weights.",
    )


def _unchanged(hidden_states: Tensor, *_arguments: Any, **_named: Any) -> Tensor:
    return hidden_states
