"""What lies outside the blocks: token embedding, norms, output head. Stored as it is, or its matrices rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.engine.layer import Layer
from workers.engine.results import PartResult
from workers.engine.skeleton import Skeleton
from workers.formats import compressed_tensors
from workers.formats.parts import Parts
from workers.recipe import Recipe
from workers.solvers.quantization import Grid, QuantizedWeight, quantize_to_nearest

PART = "rest"
# Rows of a matrix that are rounded at a time: an embedding may be as large as all the rest that is in memory.
ROWS_AT_A_TIME = 16_384


class Outer:
    """The part of the artifact that is no block, and the loading of what it will compute with."""

    def __init__(self, skeleton: Skeleton, recipe: Recipe, parts: Parts) -> None:
        self.result = PartResult.empty(len(recipe.stages))
        self._skeleton = skeleton
        self._recipe = recipe
        self._parts = parts

    def write(self) -> None:
        """Round what the recipe wants rounded, and write the part. A head tied to the embedding is stored once."""
        checkpoint, architecture = self._skeleton.checkpoint, self._skeleton.architecture
        tied = architecture.tied_parameters(checkpoint.config)
        tensors: dict[str, Tensor] = {}
        for name in checkpoint.parameters():
            if name.startswith(architecture.blocks + ".") or name in tied:
                continue
            module = name.removesuffix(".weight")
            if self._is_rounded(module):
                tensors |= {f"{module}.{key}": tensor for key, tensor in self._rounded(module).items()}
            else:
                tensors[name] = checkpoint.as_stored(name)
        self._parts.write(PART, tensors)

    def assign_before_blocks(self) -> None:
        """Give what a pass meets before the first block, which is loaded, the weights of the artifact."""
        for name in self._skeleton.present(self._skeleton.architecture.before_blocks):
            self._assign_rounded(name, name)

    def load_after_blocks(self) -> None:
        """Load what a pass meets after the last block, head included."""
        architecture = self._skeleton.architecture
        for name in self._skeleton.present(architecture.after_blocks):
            self._skeleton.load(name)
        self._skeleton.load_head()
        tied = architecture.is_tied(self._skeleton.checkpoint.config)
        self._assign_rounded(architecture.head, architecture.embedding if tied else architecture.head)

    def _is_rounded(self, module: str) -> bool:
        architecture, options = self._skeleton.architecture, self._recipe.quantization
        if options is None or not options.embeddings or options.ignores(module):
            return False
        return module in architecture.vocabulary_matrices

    def _rounded(self, module: str) -> dict[str, Tensor]:
        """The tensors that the artifact stores for the weight of ``module``, by their names in it."""
        checkpoint, options = self._skeleton.checkpoint, self._recipe.quantization
        assert options is not None
        name = f"{module}.weight"
        layer = Layer(module, checkpoint.parameter(name), checkpoint.stored_dtype(name))
        layer.stores_codes = self._recipe.stores_codes
        grid = layer.grid(options)
        layer.quantized = _round_rows(layer.weight, grid)
        layer.note_coarse_scales()
        self.result.metrics[-1][module] = {"num_bits": grid.num_bits, "group_size": grid.group_size}
        self.result.fallbacks[-1] += layer.fallbacks
        if self._recipe.output.packing is None:
            return {"weight": layer.stored_weight()}
        self.result.grids[module] = (grid, layer.weight.shape[1])
        return compressed_tensors.encode(layer.quantized, self._recipe.output.packing)

    def _assign_rounded(self, module: str, source: str) -> None:
        """Give ``module`` the weight that was stored for ``source``, if that was rounded."""
        if not self._is_rounded(source):
            return
        stored = {
            name.removeprefix(source + "."): tensor
            for name, tensor in self._parts.read(PART).items()
            if name.startswith(source + ".weight")
        }
        if self._recipe.output.packing is None:
            weight = stored["weight"]
        else:
            grid, in_features = self.result.grids[source]
            weight = compressed_tensors.decode(stored, grid, in_features, self._recipe.output.packing)
            weight = weight.to(grid.scale_dtype)  # as loaders unpack it that unpack while they read
        self._skeleton.assign(f"{module}.weight", weight.to(self._skeleton.device, torch.float32))


def _round_rows(weight: Tensor, grid: Grid) -> QuantizedWeight:
    pieces = [quantize_to_nearest(rows, grid, clip_search=True) for rows in torch.split(weight, ROWS_AT_A_TIME)]
    return QuantizedWeight(
        torch.cat([piece.codes for piece in pieces]),
        torch.cat([piece.scale for piece in pieces]),
        torch.cat([piece.zero_point for piece in pieces]),
        grid,
    )
