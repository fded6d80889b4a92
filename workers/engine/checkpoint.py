"""A checkpoint on disk, read a tensor at a time."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from workers.architectures import row_of
from workers.architectures.compact import compact_of, is_transposed
from workers.engine.coded_weights import coded_weights_of
from workers.errors import UserError

# Looked at for NaN and infinity at a time: an embedding may be as large as all the rest that is in memory.
_VALUES_AT_A_TIME = 1 << 20

GENERATION_SETTINGS = "generation_config.json"
CODES = "codes.safetensors.part"  # beside the weights, of layers that were trained as codes; no loader's business


class Checkpoint:
    """The tensors of a validated folder of safetensors files.

    Files are opened anew for each read, so that no mapping outlives its use and memory does not grow with the
    checkpoint. Weights that are stored as codes are read back as float32. With ``cast`` everything
    reads as if it were stored in that type. Parameters of a block that shares another's read as that one's, and are
    not listed.
    """

    def __init__(self, folder: Path, *, cast: torch.dtype | None = None) -> None:
        self.folder = folder
        self.tokenizer_folder = folder
        self.cast = cast
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._stored_type = self.config.get("model_type")
        self._file_of: dict[str, Path] = {}
        self._stored_name: dict[str, str] = {}
        row = row_of(self.config)
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for stored in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    name = stored if row is None else row.canonical(stored)
                    if name is not None:
                        self._file_of[name], self._stored_name[name] = path, stored
        self._coded = coded_weights_of(
            self.config.get("quantization_config"),
            is_transposed=lambda layer: row is not None and is_transposed(row, layer),
        )
        self._name_on_disk: dict[str, str] = {}  # of tensors that this checkpoint has under another name than its files
        self._kept: dict[str, dict[int, Tensor]] = {}  # of parameters that are here in part, by dimension
        # Of parameters that are means of others: the checkpoint that these are read from, and their names.
        self._means: dict[str, tuple[Checkpoint, Sequence[str]]] = {}

    def with_blocks(self, kept: Sequence[int], config: Mapping[str, Any]) -> Checkpoint:
        """The same files read as a checkpoint of the ``kept`` blocks alone, in this order, with ``config``."""
        row = row_of(self.config)
        assert row is not None
        new_index = {str(old): str(new) for new, old in enumerate(kept)}
        block = re.compile(rf"({re.escape(row.blocks)}\.)([0-9]+)(\..*)", re.DOTALL)
        other = copy.copy(self)
        other.config = dict(config)
        other._file_of, other._stored_name, other._name_on_disk, other._kept = {}, {}, {}, {}
        for name, path in self._file_of.items():
            match = block.fullmatch(name)
            if match is not None and match[2] not in new_index:
                continue
            renamed = name if match is None else f"{match[1]}{new_index[match[2]]}{match[3]}"
            other._file_of[renamed], other._stored_name[renamed] = path, self._stored_name[name]
            module, on_disk = (each.rpartition(".")[0] for each in (renamed, name))
            other._name_on_disk[module] = self._name_on_disk.get(on_disk, on_disk)
            if (parameter := self._parameter_of(name)) in self._kept:
                other._kept[self._parameter_of(renamed)] = self._kept[parameter]
        return other

    def with_selection(self, kept: Mapping[str, Mapping[int, Tensor]], config: Mapping[str, Any]) -> Checkpoint:
        """The same files read as a checkpoint whose parameters have only some of their rows, columns or values.

        ``kept`` says for each parameter that is cut, by dimension as the checkpoint has it, which indices stay (int64),
        in their order; ``config`` is the new one.
        """
        other = copy.copy(self)
        other.config = dict(config)
        other._kept = dict(self._kept)
        for name, by_dimension in kept.items():
            earlier = dict(self._kept.get(name, {}))
            for dimension, indices in by_dimension.items():
                earlier[dimension] = earlier[dimension][indices] if dimension in earlier else indices
            other._kept[name] = earlier
        return other

    def without(self, names: Collection[str], config: Mapping[str, Any]) -> Checkpoint:
        """The same files read without the parameters ``names``, with ``config``."""
        other = copy.copy(self)
        other.config = dict(config)
        other._file_of = {name: path for name, path in self._file_of.items() if self._parameter_of(name) not in names}
        other._kept = {name: kept for name, kept in self._kept.items() if name not in names}
        return other

    def with_means(self, means: Mapping[str, Sequence[str]], config: Mapping[str, Any]) -> Checkpoint:
        """The same files read as a checkpoint where some parameters are the mean of others, of one shape, or another's.

        ``means`` says for each, which is stored or coded here too, what it is the mean of; ``config`` is the new one.
        """
        other = copy.copy(self)
        other.config = dict(config)
        other._means = self._means | {name: (self, list(sources)) for name, sources in means.items()}
        other._kept = {name: kept for name, kept in self._kept.items() if name not in means}
        return other

    def with_config(self, config: Mapping[str, Any]) -> Checkpoint:
        """The same files read as a checkpoint with ``config``, which may be that of another type of model."""
        other = copy.copy(self)
        other.config = dict(config)
        return other

    def with_tokenizer(self, folder: Path) -> Checkpoint:
        """The same checkpoint with the tokenizer of ``folder``."""
        other = copy.copy(self)
        other.tokenizer_folder = folder
        return other

    @property
    def has_stored_type(self) -> bool:
        """Whether config.json, as it lies beside the files, is of this type of model."""
        return bool(self.config.get("model_type") == self._stored_type)

    @property
    def max_positions(self) -> int:
        """The longest sequence that the model was made for."""
        row = row_of(self.config)
        return (row and row.max_positions(self.config)) or sys.maxsize

    def names(self, prefix: str = "") -> list[str]:
        """Names of stored tensors that begin with ``prefix``, sorted."""
        return sorted(name for name in self._file_of if name.startswith(prefix))

    def parameters(self, prefix: str = "") -> list[str]:
        """Names of the parameters that the stored tensors stand for: a packed weight is one ``weight``."""
        return sorted({self._parameter_of(name) for name in self.names(prefix)})

    def stored(self, name: str) -> Tensor:
        """A tensor as its file has it, whole."""
        with safe_open(self._file_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(self._stored_name[name])
            return tensor

    def parameter(self, name: str) -> Tensor:
        """A parameter in float32, dequantized where it is stored as codes.

        Raises:
            UserError: ``non_finite_weights`` where a value is NaN or infinite.
        """
        name = self._source(name)
        module = name.removesuffix(".weight")
        if name in self._means:
            tensor = self._mean(name)
        elif self._coded is not None and name.endswith(".weight") and self._is_quantized(module):
            tensor = self._coded.decode(self._on_disk(module), self._stored_with_prefix(module))
        else:
            tensor = self.stored(name)
        tensor = self._cut(name, tensor).to(self.cast or torch.float32).to(torch.float32)
        if not _is_finite(tensor):
            raise UserError(
                "non_finite_weights",
                f"The tensor {name} holds values that are not finite{'' if self.cast is None else ' after the cast'}.",
                param="model.id",
                hint="The checkpoint is damaged; fetch or save it again. Of casts, BF16 has the range of float32.",
            )
        return tensor

    def shape(self, name: str) -> list[int] | None:
        """The shape of a parameter that is stored as it is, from its file's header; None for codes and missing ones."""
        name = self._source(name)
        if name in self._means:
            base, sources = self._means[name]
            stored = base.shape(sources[0])
            if stored is None:
                return None
            shape = stored
        elif name not in self._file_of or self._is_quantized(name.removesuffix(".weight")):
            return None
        else:
            with safe_open(self._file_of[name], framework="pt") as file:
                shape = list(file.get_slice(self._stored_name[name]).get_shape())
        for dimension, indices in self._kept.get(name, {}).items():
            shape[dimension] = indices.numel()
        return shape

    def as_stored(self, name: str) -> Tensor:
        """A parameter in the type of the checkpoint, dequantized where it is stored as codes."""
        name = self._source(name)
        is_computed = name in self._means or self._is_quantized(name.removesuffix(".weight"))
        if name in self._file_of and not is_computed:
            tensor = self._cut(name, self.stored(name))
            return tensor if self.cast is None else tensor.to(self.cast)
        return self.parameter(name).to(self.stored_dtype(name))

    def stored_dtype(self, name: str) -> torch.dtype:
        """The floating-point type of a parameter: of its values, or of its scales where it is stored as codes."""
        name = self._source(name)
        if self.cast is not None:
            return self.cast
        if name in self._means:
            base, sources = self._means[name]
            return base.stored_dtype(sources[0])
        module = name.removesuffix(".weight")
        if self._coded is not None and self._is_quantized(module):
            return self._coded.dtype_of(self.stored(f"{module}.{self._coded.mark}"))
        with safe_open(self._file_of[name], framework="pt") as file:
            dtype: torch.dtype = file.get_slice(self._stored_name[name])[:0].dtype
            return dtype

    def input_quantizer(self, module: str) -> tuple[str, Callable[[Tensor], Tensor]] | None:
        """What loaders do to the input of a linear layer, with a text that is the same for layers that share it.

        None where its input is read as it is.
        """
        module = self._source(module)
        if self._coded is None or not self._is_quantized(module):
            return None
        return self._coded.input_quantizer(self._on_disk(module))

    def trained_codes(self, module: str) -> dict[str, Tensor] | None:
        """What a linear layer was trained as: codes, scales and zero-points; None where it was not trained so."""
        if not (self.folder / CODES).exists():
            return None
        module = self._source(module)
        with safe_open(self.folder / CODES, framework="pt") as file:
            names = [name for name in file.keys() if name.rpartition(".")[0] == module]  # noqa: SIM118
            return {name.rpartition(".")[2]: file.get_tensor(name) for name in names} or None

    def contradicts_config(self, module: str) -> bool:
        """Whether a linear layer is stored as codes and config.json says that it is not, or the reverse."""
        module = self._source(module)
        spared = None if self._coded is None else self._coded.spares(self._on_disk(module))
        return spared is not None and spared == self._is_quantized(module)

    def _source(self, name: str) -> str:
        """The name that a parameter or module of a block has files under, which may be another block's."""
        row = row_of(self.config)
        return name if row is None else compact_of(self.config).source_of(name, row.blocks)

    def _mean(self, name: str) -> Tensor:
        """A parameter that is a mean, with the values that its type can store."""
        base, sources = self._means[name]
        # In place: each may be as large as all the rest that is in memory.
        total = base.parameter(sources[0])
        for source in sources[1:]:
            total = total.add_(base.parameter(source))
        return (total / len(sources)).to(self.stored_dtype(name))

    def _cut(self, name: str, tensor: Tensor) -> Tensor:
        for dimension, indices in self._kept.get(name, {}).items():
            tensor = tensor.index_select(dimension, indices)
        return tensor

    def _is_quantized(self, module: str) -> bool:
        return self._coded is not None and f"{module}.{self._coded.mark}" in self._file_of

    def _on_disk(self, module: str) -> str:
        """What config.json, as it lies beside the files, calls a module."""
        return self._name_on_disk.get(module, module)

    def _stored_with_prefix(self, module: str) -> dict[str, Tensor]:
        prefix = module + "."
        return {name.removeprefix(prefix): self.stored(name) for name in self.names(prefix + "weight")}

    def _parameter_of(self, name: str) -> str:
        return name if self._coded is None else self._coded.parameter_of(name)


def _is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. Either makes a sum so, which takes a tenth of the time to find out."""
    if bool(torch.isfinite(tensor.sum())):
        return True
    return all(bool(torch.isfinite(piece).all()) for piece in torch.split(tensor.flatten(), _VALUES_AT_A_TIME))
