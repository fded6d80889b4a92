"""A model that is too large to be opened whole: its parts are in memory only while tokens pass through them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import AutoTokenizer, GenerationConfig
from transformers.pytorch_utils import Conv1D

from workers.architectures import architecture_of
from workers.engine.checkpoint import Checkpoint
from workers.engine.device import keeping_freed_memory, release_memory
from workers.engine.forward import ForwardPass, Gate, SharedTransform
from workers.engine.skeleton import Skeleton
from workers.errors import UserError
from workers.formats.opening import Logits, Waiting

# What waits of a token between two blocks: its hidden state, once more as the residual, and what is made of positions.
_HIDDEN_STATES_A_TOKEN = 3


class ByBlock:
    """A checkpoint's model, opened by block.

    What is read of it goes through each block together, so that a block is read once for many sequences.
    """

    load_seconds = None

    def __init__(self, folder: Path, device: torch.device, waiting_bytes: int) -> None:
        """Read the headers of the safetensors files in ``folder``. ``waiting_bytes`` may wait between two blocks.

        Raises:
            UserError: ``checkpoint_mismatch`` where the files are not what config.json calls for.
        """
        self._checkpoint = Checkpoint(folder)
        self.architecture = architecture_of(self._checkpoint.config)
        self.max_positions = self.architecture.max_positions(self._checkpoint.config)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        self._skeleton = Skeleton(self._checkpoint, self.architecture, device)
        self._check_complete()
        self._blocks = [self._skeleton.block_name(index) for index in range(self._skeleton.num_blocks)]
        for name in (*self._blocks, self._skeleton.end):
            Gate(name, self._skeleton.module(name), stops=True)
        self._quantize_inputs()
        num_logits, hidden_size = self._skeleton.linear_shape(self.architecture.head)[0], self._skeleton.hidden_size
        self.waiting: Waiting | None = Waiting(
            num_tokens=waiting_bytes // (4 * _HIDDEN_STATES_A_TOKEN * hidden_size),
            num_logits=waiting_bytes // (4 * num_logits),
        )

    def read(self, batches: Sequence[Tensor], progress: Callable[[float], None], /) -> Logits:
        """Bring the batches (each sequences × tokens) through all blocks; their logits are computed when asked for.

        Raises:
            UserError: ``model_unusable``, ``checkpoint_mismatch`` or ``non_finite_weights``.
        """
        skeleton = self._skeleton
        passes = [skeleton.forward_pass(ids) for ids in batches]
        with self._loaded(skeleton.present(self.architecture.before_blocks)):
            _advance(passes, self._blocks[0])
        for number, (block, following) in enumerate(zip(self._blocks, [*self._blocks[1:], skeleton.end], strict=True)):
            with self._loaded([block]):
                _advance(passes, following)
            progress((number + 1) / len(self._blocks))
        waiting = iter(passes)
        return lambda count: self._finish(islice(waiting, count))

    @contextmanager
    def running(self) -> Iterator[Any]:
        """The model as any caller has it: each pass reads its parts anew, which takes long."""
        handles = [handle for name in self._parts() for handle in self._read_on_demand(name)]
        model = self._skeleton.model
        if (self._checkpoint.folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(self._checkpoint.folder, local_files_only=True)
        own, device = type(model), self._skeleton.device
        # It would take that of its first parameter, which is nowhere until it is read.
        model.__class__ = type(own.__name__, (own,), {"device": property(lambda _: device)})
        try:
            yield model
        finally:
            model.__class__ = own
            for handle in handles:
                handle.remove()
            for name in self._parts():  # a pass that failed has left what it was in
                self._skeleton.unload(name)

    def linear_weight(self, name: str) -> Tensor:
        """The weight of a layer, float32, out_features × in_features."""
        weight = self._checkpoint.parameter(f"{name}.weight")
        return weight.T if isinstance(self._skeleton.module(name), Conv1D) else weight

    def _finish(self, passes: Iterable[ForwardPass]) -> Generator[Tensor]:
        after_blocks = self._skeleton.present(self.architecture.after_blocks)
        with self._loaded([*after_blocks, self.architecture.head]):
            for each in passes:
                yield each.finish()

    @contextmanager
    def _loaded(self, parts: Iterable[str]) -> Iterator[None]:
        skeleton, parts = self._skeleton, list(parts)
        for name in parts:
            self._load(name)
        try:
            yield
        finally:
            for name in parts:
                skeleton.unload(name)
            release_memory()

    def _load(self, name: str) -> None:
        if name == self.architecture.head:
            self._skeleton.load_head()
        else:
            self._skeleton.load(name)

    def _read_on_demand(self, name: str) -> tuple[RemovableHandle, RemovableHandle]:
        module = self._skeleton.module(name)
        return (
            module.register_forward_pre_hook(lambda *_: self._load(name)),
            module.register_forward_hook(lambda *_: self._skeleton.unload(name)),
        )

    def _parts(self) -> list[str]:
        """Every module whose parameters are loaded together."""
        architecture, present = self.architecture, self._skeleton.present
        around = [*present(architecture.before_blocks), *present(architecture.after_blocks), architecture.head]
        return [*around, *self._blocks]

    def _quantize_inputs(self) -> None:
        """Have layers quantize what they read, where config.json says that they do."""
        for index, block in enumerate(self._blocks):
            for group in self._skeleton.linear_groups(index):
                shared: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {}
                for layer in (f"{block}.{name}" for name in group):
                    if found := self._checkpoint.input_quantizer(layer):
                        shared.setdefault(found[0], (found[1], []))[1].append(layer)
                for quantize, layers in shared.values():
                    transform = SharedTransform(quantize, len(layers))
                    for layer in layers:
                        Gate(layer, self._skeleton.module(layer), stops=False).transform = transform

    def _check_complete(self) -> None:
        """Raise UserError ``checkpoint_mismatch`` for a parameter that no part loads, or no file holds."""
        stored = set(self._checkpoint.parameters()) | set(self._skeleton.tied_parameters)
        missing = sorted(name for name, _ in self._skeleton.model.named_parameters() if name not in stored)
        if missing:
            raise UserError(
                "checkpoint_mismatch",
                f"The checkpoint lacks {len(missing)} tensors that its config.json calls for, the first {missing[0]}.",
                param="model.id",
                hint="Save the model again with transformers' save_pretrained.",
            )
        wrong = [name for name in self._skeleton.linear_layers if self._checkpoint.contradicts_config(name)]
        if wrong:
            raise UserError(
                "checkpoint_mismatch",
                f"config.json and the files disagree on whether {len(wrong)} layers have codes, the first {wrong[0]}.",
                param="model.id",
                hint="config.json belongs to another checkpoint; put the right one beside the weights.",
            )


def _advance(passes: Iterable[ForwardPass], name: str) -> None:
    with keeping_freed_memory():
        for each in passes:
            each.advance_to(name)
