"""How large the result will be, before anything is computed: from shapes, types and the recipe alone."""

from __future__ import annotations

from collections.abc import Collection

from workers.engine.layer import grid_of
from workers.engine.skeleton import Skeleton
from workers.errors import UserError
from workers.formats import bitsandbytes, compressed_tensors
from workers.recipe import Recipe
from workers.techniques import MixedPrecision, QuantizationOptions, RoundToNearest

# A safetensors header says of each tensor its name, type, shape and place; long names have less than so many bytes.
_HEADER_BYTES_A_TENSOR = 220
# Codes, shape, scale and zero-point; of bitsandbytes six, and JSON as long as an entry.
_TENSORS_A_LAYER = {"compressed-tensors": 4, "bitsandbytes": 7}


class StoredSize:
    """Bytes of an artifact's weights, and of parts of them."""

    def __init__(self, skeleton: Skeleton, recipe: Recipe) -> None:
        self._skeleton = skeleton
        self._output = recipe.output
        self._options = recipe.quantization
        self._stores_codes = recipe.stores_codes

    def codes_bytes(self, layer: str, options: QuantizationOptions) -> int:
        """Of the tensors that stand for the weight of ``layer`` where ``options`` quantize it."""
        skeleton = self._skeleton
        rows, columns = skeleton.linear_shape(layer)
        grid = grid_of(options, columns, skeleton.checkpoint.stored_dtype(f"{layer}.weight"))
        if self._output.format == "bitsandbytes":
            assert isinstance(options, RoundToNearest)
            return bitsandbytes.stored_bytes(rows, columns, grid, double_quant=options.double_quant)
        assert self._output.packing is not None
        return compressed_tensors.stored_bytes(rows, columns, grid, self._output.packing)

    def rest_bytes(self, coded: Collection[str]) -> int:
        """Of everything but the weights of the layers ``coded``; each tied matrix once."""
        skeleton, checkpoint = self._skeleton, self._skeleton.checkpoint
        return sum(
            skeleton.num_values(name) * checkpoint.stored_dtype(name).itemsize for name in self._stored_in_full(coded)
        )

    def header_bytes(self, coded: Collection[str]) -> int:
        """At most so many, of the files' headers, where the layers ``coded`` are stored as codes."""
        num_tensors = len(self._stored_in_full(coded))
        if coded:
            num_tensors += _TENSORS_A_LAYER[str(self._output.format)] * len(coded)
        return _HEADER_BYTES_A_TENSOR * num_tensors

    def check(self, limit: int) -> None:
        """Raise UserError ``constraint_impossible`` where the tensors alone have more bytes than the job allows."""
        coded = self._coded()
        options = self._options
        if isinstance(options, MixedPrecision):
            options = options.at(options.widths[0])
        least = self.rest_bytes(coded)
        if options is not None:
            least += sum(self.codes_bytes(layer, options) for layer in coded)
        if least <= limit:
            return
        raise UserError(
            "constraint_impossible",
            f"The recipe's result has at least {least:,} bytes and {limit:,} are allowed.",
            param="constraints.max_size_bytes",
            hint=f"Allow {least + self.header_bytes(coded):,} bytes, or choose fewer bits or larger groups.",
        )

    def _coded(self) -> list[str]:
        """The layers that are stored as codes."""
        options, architecture = self._options, self._skeleton.architecture
        if options is None or not self._stores_codes:
            return []
        names = list(self._skeleton.block_layers)
        if options.embeddings:
            tied = architecture.tied_parameters(self._skeleton.checkpoint.config)
            names += [name for name in architecture.vocabulary_matrices if f"{name}.weight" not in tied]
        names = [name for name in names if not options.ignores(name)]
        if self._output.format == "bitsandbytes":  # layers that do not fall into its blocks stay in full
            assert isinstance(options, RoundToNearest)
            names = [name for name in names if options.has_blocks_for(*self._skeleton.linear_shape(name))]
        return names

    def _stored_in_full(self, coded: Collection[str]) -> list[str]:
        checkpoint, architecture = self._skeleton.checkpoint, self._skeleton.architecture
        taken = {f"{layer}.weight" for layer in coded} | set(architecture.tied_parameters(checkpoint.config))
        return [name for name in checkpoint.parameters() if name not in taken]
