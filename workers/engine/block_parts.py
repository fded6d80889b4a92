"""What an artifact stores of its blocks: written when a block is compressed, and read where passes need it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from workers.architectures.compact import IN_FACTOR, OUT_FACTOR
from workers.engine.journal import part_name
from workers.engine.layer import Layer
from workers.engine.rescaling import Rescaling
from workers.engine.results import PartResult
from workers.engine.skeleton import Skeleton
from workers.formats import codes, sparse_bitmask
from workers.formats.parts import Parts
from workers.recipe import Recipe
from workers.solvers.low_rank import product
from workers.solvers.quantization import Grid


class BlockParts:
    """The parts of one compression, a block each. A block that has another's parameters has an empty one."""

    def __init__(self, skeleton: Skeleton, recipe: Recipe, parts: Parts, rescaling: Rescaling) -> None:
        self._skeleton = skeleton
        self._recipe = recipe
        self._parts = parts
        self._rescaling = rescaling

    def write(self, index: int, layers: Sequence[Layer], result: PartResult) -> None:
        """Write everything that the artifact stores of a block, and note in ``result`` how its codes are read."""
        tensors: dict[str, Tensor] = {}
        renamed: dict[str, str] = {}
        for layer in layers:
            if layer.factors is not None:
                out_factor, in_factor = layer.stored_factors()
                tensors[f"{layer.name}.{OUT_FACTOR}.weight"] = out_factor
                tensors[f"{layer.name}.{IN_FACTOR}.weight"] = in_factor
                renamed[f"{layer.name}.bias"] = f"{layer.name}.{OUT_FACTOR}.bias"
            elif layer.quantized is None or not self._recipe.stores_codes:
                name = f"{layer.name}.weight"
                weight = self._skeleton.as_module_has_it(layer.name, layer.stored_weight())
                tensors |= sparse_bitmask.encode(name, weight) if self._recipe.stores_bitmasks else {name: weight}
            else:
                result.grids[layer.name] = (layer.quantized.grid, layer.weight.shape[1])
                for name, tensor in codes.encode(layer.quantized, layer.stored_dtype, self._recipe.output).items():
                    tensors[f"{layer.name}.{name}"] = tensor
        compressed = {f"{layer.name}.weight" for layer in layers}
        for name in self._skeleton.checkpoint.parameters(self._skeleton.block_name(index) + "."):
            if name not in compressed:
                tensors[renamed.get(name, name)] = self._rescaling.take(name)
        self._parts.write(part_name(index), tensors)

    def share(self, index: int, of_source: PartResult) -> dict[str, tuple[Grid, int]]:
        """Write the part of a block that has another's parameters; how its codes, stored ``of_source``, are read."""
        self._parts.write(part_name(index), {})
        return {self._own_name(index, layer): grid for layer, grid in of_source.grids.items()}

    def assign(self, index: int, grids: Mapping[str, tuple[Grid, int]]) -> None:
        """Give a finished block, which is loaded, the weights that the artifact will compute with."""
        stored = self._parts.read(part_name(self._skeleton.source_block(index)))
        if self._recipe.stores_bitmasks:
            stored = sparse_bitmask.decode(stored)
        stored = {self._own_name(index, name): tensor for name, tensor in stored.items()}
        for layer, (grid, in_features) in grids.items():
            encoded = {
                name.removeprefix(layer + "."): stored.pop(name)
                for name in list(stored)
                if name.startswith(layer + ".weight")
            }
            weight = codes.decode(encoded, grid, in_features, self._recipe.output)
            if self._recipe.quantizes_embeddings:
                weight = weight.to(grid.scale_dtype).to(torch.float32)
            self._skeleton.assign_linear(layer, weight.to(self._skeleton.device))
        for layer in self._factored(stored):
            out_factor, in_factor = (
                stored.pop(f"{layer}.{factor}.weight").to(self._skeleton.device) for factor in (OUT_FACTOR, IN_FACTOR)
            )
            self._skeleton.assign_linear(layer, product(out_factor, in_factor))
            stored.pop(f"{layer}.{OUT_FACTOR}.bias", None)  # the layer's own, which is loaded
        for name, tensor in stored.items():
            self._skeleton.assign(name, tensor.to(self._skeleton.device, torch.float32))

    def _factored(self, stored: Mapping[str, Tensor]) -> list[str]:
        """The layers that became two factors here: those that the skeleton has as one."""
        layers = [
            name.removesuffix(f".{OUT_FACTOR}.weight") for name in stored if name.endswith(f".{OUT_FACTOR}.weight")
        ]
        return [layer for layer in layers if layer not in self._skeleton.compact.ranks]

    def _own_name(self, index: int, name: str) -> str:
        """What a block calls what its source calls ``name``."""
        source = self._skeleton.block_name(self._skeleton.source_block(index))
        return self._skeleton.block_name(index) + name.removeprefix(source)
