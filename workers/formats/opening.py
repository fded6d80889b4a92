"""Opening a checkpoint the way its reader will: with plain transformers, or the loader that lies beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.pytorch_utils import Conv1D

from workers.architectures import AUTO_CLASSES, Architecture, architecture_of
from workers.architectures.compact import compact_of
from workers.errors import CrashError
from workers.formats import bitsandbytes, load_compact
from workers.formats.shipped_loader import loader_of, name_of_loader

# Gives the logits of the next so many batches.
Logits = Callable[[int], Generator[Tensor]]


@dataclass(frozen=True)
class Waiting:
    """What of a text may wait in memory, so that a model that is opened by block is read as seldom as possible."""

    num_tokens: int  # between two blocks
    num_logits: int  # rows of logits


class Readable(Protocol):
    """A model that texts are read with, whichever way it was opened, and its tokenizer."""

    @property
    def architecture(self) -> Architecture:
        """The table's row for it."""

    @property
    def tokenizer(self) -> Any:
        """As transformers opens it."""

    @property
    def max_positions(self) -> int | None:
        """Tokens of the longest sequence; None where the config sets no limit."""

    @property
    def load_seconds(self) -> float | None:
        """How long opening took; None where it was not opened whole."""

    @property
    def waiting(self) -> Waiting | None:
        """How much is best read at a time; None where it makes no difference."""

    def read(self, batches: Sequence[Tensor], progress: Callable[[float], None], /) -> Logits:
        """Begin to read batches of token ids, each sequences × tokens."""

    def running(self) -> AbstractContextManager[Any]:
        """The model of transformers, to be called and to generate."""

    def linear_weight(self, name: str) -> Tensor:
        """The weight of a layer, out_features × in_features."""


@dataclass(frozen=True)
class Opened:
    """A model, opened whole, and its tokenizer, as a user would have them."""

    model: Any
    tokenizer: Any
    load_seconds: float
    architecture: Architecture
    max_positions: int | None
    waiting: Waiting | None = None

    def read(self, batches: Sequence[Tensor], _progress: Callable[[float], None], /) -> Logits:
        """The logits of each batch are computed when they are asked for."""
        waiting = iter(batches)
        return lambda count: (self._logits(ids) for ids in islice(waiting, count))

    def running(self) -> AbstractContextManager[Any]:
        """The model."""
        return nullcontext(self.model)

    def linear_weight(self, name: str) -> Tensor:
        """The weight of a layer, out_features × in_features."""
        module = self.model.get_submodule(name)
        weight = bitsandbytes.weight_of(module)
        return weight.T if isinstance(module, Conv1D) else weight

    def _logits(self, input_ids: Tensor) -> Tensor:
        output = self.model(input_ids=input_ids.to(self.model.device), **self.architecture.call_options)
        logits: Tensor = output.logits
        return logits


def open_checkpoint(folder: Path, device: torch.device) -> Opened:
    """Open a folder in float32, its 4-bit layers included.

    Raises:
        CrashError: ``artifact_incomplete`` where transformers misses a weight or finds one that it does not know.
        ValueError: the same of a folder whose model has factors or shared blocks.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = architecture_of(config)
    begin = time.perf_counter()
    if compact_of(config):  # what lies beside the weights of others is not run
        model = load_compact.load_model(folder, dtype=torch.float32).to(device)
    else:
        model, found = _from_pretrained(folder, architecture)
        _check_found(folder, architecture, found)
        bitsandbytes.to_float32(model)
        model.to(device).eval()
    seconds = time.perf_counter() - begin
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return Opened(model, tokenizer, seconds, architecture, architecture.max_positions(config))


def check_loads(folder: Path) -> None:
    """Have transformers find a place for every tensor of a folder, and read none of them.

    Tensors of bitsandbytes have to be read to be placed, and are not tried.

    Raises:
        CrashError: ``artifact_incomplete``, as for :func:`open_checkpoint`.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config", {}).get("quant_method") == "bitsandbytes":
        return
    if compact_of(config):
        _by_loader(folder, device_map={"": "meta"})
        return
    architecture = architecture_of(config)
    _, found = _from_pretrained(folder, architecture, device_map={"": "meta"})
    _check_found(folder, architecture, found)


def open_artifact(folder: Path, device: torch.device) -> Opened:
    """Open an artifact of ours in float32: by the loader that lies in it, or as any checkpoint where none does.

    Raises:
        CrashError: ``artifact_incomplete`` where that refuses a file, or misses a weight.
    """
    if name_of_loader(folder) is None:
        return open_checkpoint(folder, device)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = architecture_of(config)
    begin = time.perf_counter()
    model = _by_loader(folder)
    bitsandbytes.to_float32(model)
    model.to(device)
    seconds = time.perf_counter() - begin
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return Opened(model, tokenizer, seconds, architecture, architecture.max_positions(config))


def expand_archive(folder: Path, output: Path) -> None:
    """Write the dense form of a sparse-bitmask artifact of ours, a tensor at a time, by the loader that lies in it.

    Raises:
        CrashError: ``artifact_incomplete`` where that refuses a file.
    """
    try:
        loader_of(folder).write_dense(folder, output)
    except ValueError as error:
        raise _refused(folder, error) from error


def matrix_shape(module: Any) -> list[int]:
    """Of a linear layer out_features and in_features, of an embedding rows and columns, however it holds its values.

    Opening has compared them with what is stored.
    """
    if isinstance(module, Conv1D):
        return [module.nf, module.nx]
    if isinstance(module, nn.Embedding):
        return [module.num_embeddings, module.embedding_dim]
    return [module.out_features, module.in_features]


def _from_pretrained(folder: Path, architecture: Architecture, **options: Any) -> tuple[Any, Mapping[str, Any]]:
    auto: Any = getattr(transformers, AUTO_CLASSES[architecture.task])
    model, found = auto.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, local_files_only=True, **options
    )
    return model, found


def _check_found(folder: Path, architecture: Architecture, found: Mapping[str, Any]) -> None:
    # Old checkpoints hold more than the model has: what the architecture leaves out, no loader needs.
    unexpected = [name for name in found["unexpected_keys"] if architecture.canonical(name) is not None]
    found = {**found, "unexpected_keys": unexpected}
    names = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {key: sorted(found[key])[:5] for key in names if found[key]}
    if wrong:
        raise CrashError("artifact_incomplete", f"{folder.name} does not hold what its config calls for: {wrong}")


def _by_loader(folder: Path, **options: Any) -> Any:
    try:
        return loader_of(folder).load_model(folder, dtype=torch.float32, **options)
    except ValueError as error:
        raise _refused(folder, error) from error


def _refused(folder: Path, error: ValueError) -> CrashError:
    return CrashError("artifact_incomplete", f"{folder.name} is refused by its own loader: {error}")
