"""sparse-bitmask: of a pruned weight one bit for every place and the values that are left. load_sparse.py reads it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.formats import load_sparse
from workers.formats.load_sparse import BITMASK, VALUES

LOADER = "load_sparse.py"
# Of what artifacts call their files of weights: plain transformers must not find any, or it would make up the rest.
STEM = "sparse"
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def encode(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The tensors that stand for the weight ``name`` (rows × columns, of a floating-point type), bit for bit.

    That is the weight itself where a bitmask and its values would take as many bytes, and where the columns do not fill
    whole bytes of a bitmask.
    """
    if weight.dim() != 2 or weight.shape[1] % 8:
        return {name: weight}
    weight = weight.contiguous().cpu()
    # A negative zero has a bit that is set, and is kept.
    is_stored = weight.view(_INTEGERS[weight.element_size()]) != 0
    bitmask = torch.from_numpy(np.packbits(is_stored.numpy(), axis=1, bitorder="little"))
    values = weight[is_stored]
    if bitmask.nbytes + values.nbytes >= weight.nbytes:
        return {name: weight}
    return {name + BITMASK: bitmask, name + VALUES: values}


def decode(encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that tensors of :func:`encode` stand for; all others as they are."""
    tensors = {}
    for name, tensor in encoded.items():
        weight = name.removesuffix(BITMASK)
        if weight != name:
            values = encoded[weight + VALUES]
            integers = values.view(_INTEGERS[values.element_size()]).numpy()
            dense = load_sparse.expand(tensor.numpy().tobytes(), integers.tobytes(), values.element_size())
            bits = torch.from_numpy(dense.view(integers.dtype))
            tensors[weight] = bits.view(values.dtype).view(tensor.shape[0], -1)
        elif not name.endswith(VALUES) or name.removesuffix(VALUES) + BITMASK not in encoded:
            tensors[name] = tensor
    return tensors


def write_loader(folder: Path) -> None:
    """Put the loader beside the weights."""
    shutil.copyfile(load_sparse.__file__, folder / LOADER)


def loader_of(folder: Path) -> ModuleType:
    """The loader that lies in an artifact of ours, as its users will have it."""
    loader = _WithoutBytecode("attar_artifact_loader", str(folder / LOADER))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


class _WithoutBytecode(SourceFileLoader):
    """Leaves no bytecode beside the source: the artifact's folder holds what users get."""

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:
        """Write nothing."""
