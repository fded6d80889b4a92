"""sparse-bitmask: of a pruned weight one bit for every place and the values that are left. load_sparse.py reads it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from workers.formats import load_sparse
from workers.formats.load_sparse import BITMASK, VALUES

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
