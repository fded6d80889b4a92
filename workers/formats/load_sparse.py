"""Opens a model whose pruned weights are stored as bitmasks. Needs nothing of what made it, only transformers.

    model = load_model("ARTIFACT")              a model of transformers, in memory
    python load_sparse.py ARTIFACT OUTPUT       a plain dense checkpoint in the new folder OUTPUT

The weights lie in sparse.safetensors, or in the files that sparse.safetensors.index.json names. There a pruned weight W
of rows × columns is two tensors: W_bitmask (uint8, rows × columns / 8), where bit i of byte b, counted from the lowest,
says whether the weight in column 8 · b + i is stored, and W_values, those that are, row by row. What is not stored is
zero. All other tensors are as in any checkpoint. The files are not trusted: ValueError says what is wrong with them.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

# numpy, torch and transformers are imported where they are used: expanding a checkpoint takes numpy alone.

WEIGHTS = "sparse.safetensors"
WEIGHTS_INDEX = "sparse.safetensors.index.json"
BITMASK = "_bitmask"
VALUES = "_values"

MAX_HEADER_BYTES = 100_000_000
LARGEST_SHARD_BYTES = 4_000_000_000
PIECE_BYTES = 16 << 20
# Bytes of an item, and what torch calls it. Weights of linear layers are of the types after the first.
ITEM_BYTES = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
TORCH_DTYPES = {"U8": "uint8", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
# Files of the folder that say nothing of the dense checkpoint.
LEFT_OUT = ("manifest.json", "report.json", "README.md", WEIGHTS_INDEX)


class StoredTensor(NamedTuple):
    """A tensor in a file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    num_bytes: int

    def pieces(self) -> Iterator[bytes]:
        """Its bytes, not all at a time."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            remaining = self.num_bytes
            while remaining:
                piece = file.read(min(PIECE_BYTES, remaining))
                if not piece:
                    raise ValueError(f"{self.path.name} has become shorter")
                remaining -= len(piece)
                yield piece


class DenseTensor(NamedTuple):
    """A tensor of the model, and what it is stored as: itself, or its bitmask and values."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: tuple[StoredTensor, ...]

    @property
    def num_bytes(self) -> int:
        """Of all its values, zeros included."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    def pieces(self) -> Iterator[Any]:
        """Its bytes, zeros included.

        Raises:
            ValueError: The bitmask has more or fewer bits set than there are values.
        """
        if len(self.stored) == 1:
            yield from self.stored[0].pieces()
            return
        bitmask, values = (b"".join(tensor.pieces()) for tensor in self.stored)
        try:
            yield expand(bitmask, values, ITEM_BYTES[self.dtype]).data.cast("B")
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None


def load_model(folder: str | Path, dtype: Any = "auto") -> Any:
    """The model in ``folder`` as transformers' from_pretrained would give it, in ``dtype`` or that of its config.

    Raises:
        ValueError: A file is damaged, or does not hold what config.json calls for.
    """
    import torch
    import transformers

    folder = Path(folder)
    # Nothing here runs code that comes with a model.
    config: Any = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    model_class = getattr(transformers, str((config.architectures or [""])[0]), None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ValueError(f"config.json names no model class of transformers: {config.architectures}")  # noqa: TRY004
    weights = {}
    for tensor in read_tensors(folder):
        data = bytearray().join(tensor.pieces())
        item_type = getattr(torch, TORCH_DTYPES[tensor.dtype])
        flat = torch.frombuffer(data, dtype=item_type) if data else torch.empty(0, dtype=item_type)
        weights[tensor.name] = flat.reshape(tensor.shape)
    settings = {}
    if (folder / "generation_config.json").exists():
        settings["generation_config"] = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    loader: Any = model_class
    model, found = loader.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True, **settings
    )
    wrong = {
        key: sorted(found[key])[:5] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if found[key]
    }
    if wrong:
        raise ValueError(f"the weights are not those that config.json calls for: {wrong}")
    return model.eval()


def write_dense(folder: str | Path, output: str | Path) -> None:
    """Write the model in ``folder`` as a plain checkpoint, with config and tokenizer, to the new folder ``output``.

    Raises:
        ValueError: A file is damaged.
        FileExistsError: ``output`` is there already.
    """
    folder, output = Path(folder), Path(output)
    tensors = read_tensors(folder)
    if output.exists():
        raise FileExistsError(f"{output} is there already")
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that what is at its place is whole.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f"{output.name}.") as beside:
        unfinished = Path(beside) / "dense"
        unfinished.mkdir()
        write_dense_weights(tensors, unfinished)
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.name not in LEFT_OUT and path.suffix not in (".safetensors", ".py"):
                shutil.copyfile(path, unfinished / path.name)
        unfinished.rename(output)


def write_dense_weights(tensors: list[DenseTensor], output: Path, largest_bytes: int = LARGEST_SHARD_BYTES) -> None:
    """Write ``tensors``, one at a time, as model.safetensors or as shards of ``largest_bytes`` with their index."""
    shards: list[list[DenseTensor]] = [[]]
    # Wider types first, so that every tensor begins at a multiple of its width.
    for tensor in sorted(tensors, key=lambda tensor: (-ITEM_BYTES[tensor.dtype], tensor.name)):
        if shards[-1] and sum(each.num_bytes for each in shards[-1]) + tensor.num_bytes > largest_bytes:
            shards.append([])
        shards[-1].append(tensor)
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        _write_file(output / name, shard)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors)},
            "weight_map": {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
        }
        (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_tensors(folder: Path) -> list[DenseTensor]:
    """What the headers of the files in ``folder`` say of every tensor of the model; no weight is read."""
    stored: dict[str, StoredTensor] = {}
    for name in weight_files(folder):
        found = _read_header(folder / name)
        if twice := stored.keys() & found.keys():
            raise ValueError(f"{min(twice)} is in several files")
        stored |= found
    return pair(stored)


def weight_files(folder: Path) -> list[str]:
    """Names of the files of weights in ``folder``."""
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    try:
        weight_map = json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except FileNotFoundError:
        raise ValueError(f"{folder} has neither {WEIGHTS} nor {WEIGHTS_INDEX}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{WEIGHTS_INDEX} has no weight_map that names files") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{WEIGHTS_INDEX} names {name!r}, which is no file of this folder")
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
    return names


def pair(stored: Mapping[str, StoredTensor]) -> list[DenseTensor]:
    """The tensors of the model: each bitmask with its values, and all others as they are."""
    tensors = []
    for name, tensor in sorted(stored.items()):
        dense_name = name.removesuffix(BITMASK)
        if name.endswith(VALUES) and name.removesuffix(VALUES) + BITMASK in stored:
            continue
        if dense_name == name:
            if name.endswith(VALUES):
                raise ValueError(f"{name} has no bitmask")
            tensors.append(DenseTensor(name, tensor.dtype, tensor.shape, (tensor,)))
            continue
        values = stored.get(dense_name + VALUES)
        if values is None or dense_name in stored:
            raise ValueError(f"{name} has no values of its own")
        shape = dense_shape(dense_name, tensor.dtype, tensor.shape, values.dtype, values.shape)
        tensors.append(DenseTensor(dense_name, values.dtype, shape, (tensor, values)))
    return tensors


def dense_shape(
    name: str, mask_dtype: str, mask_shape: tuple[int, ...], values_dtype: str, values_shape: tuple[int, ...]
) -> tuple[int, int]:
    """Rows and columns of the weight ``name`` whose bitmask and values are of these types and shapes.

    Raises:
        ValueError: They cannot belong to one weight.
    """
    if mask_dtype != "U8" or len(mask_shape) != 2:
        raise ValueError(f"{name}{BITMASK} is not a matrix of bytes")
    if values_dtype == "U8" or len(values_shape) != 1:
        raise ValueError(f"{name}{VALUES} is not a row of floating-point numbers")
    rows, columns = mask_shape[0], 8 * mask_shape[1]
    if values_shape[0] > rows * columns:
        raise ValueError(f"{name} has {values_shape[0]} values and {rows * columns} places for them")
    return rows, columns


def expand(bitmask: bytes, values: bytes, item_bytes: int) -> Any:
    """An array of integers of ``item_bytes``: ``values`` where a bit of ``bitmask`` is set, zero elsewhere.

    Raises:
        ValueError: The bitmask has more or fewer bits set than there are values.
    """
    import numpy as np

    is_stored = np.unpackbits(np.frombuffer(bitmask, np.uint8), bitorder="little").view(np.bool_)
    found = np.frombuffer(values, f"<u{item_bytes}")
    if np.count_nonzero(is_stored) != len(found):
        raise ValueError(f"the bitmask has {np.count_nonzero(is_stored)} bits set for {len(found)} values")
    dense = np.zeros(len(is_stored), found.dtype)
    dense[is_stored] = found
    return dense


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, which have to be all of it."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size_bytes < 8 or length > min(size_bytes - 8, MAX_HEADER_BYTES):
            raise ValueError(f"{path.name} is not a safetensors file, or was cut off")
        encoded = file.read(length)
    try:
        header = json.loads(encoded)
        header.pop("__metadata__", None)
        found = {name: _described(path, 8 + length, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"the header of {path.name} is damaged") from None
    position = 8 + length
    for tensor in sorted(found.values(), key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset != position:
            raise ValueError(f"the tensors of {path.name} overlap or leave holes")
        position += tensor.num_bytes
    if position != size_bytes:
        raise ValueError(f"{path.name} has {size_bytes} bytes, and its tensors end at {position}")
    return found


def _described(path: Path, start: int, entry: Any) -> StoredTensor:
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError("sizes have to be counts")
    if end - begin != prod(shape) * ITEM_BYTES[entry["dtype"]]:
        raise ValueError("offsets have to fit the shape")
    return StoredTensor(path, entry["dtype"], shape, start + begin, end - begin)


def _write_file(path: Path, tensors: list[DenseTensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        offsets = [position, position + tensor.num_bytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position = offsets[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors:
            for piece in tensor.pieces():
                file.write(piece)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("python load_sparse.py ARTIFACT OUTPUT")
    try:
        write_dense(sys.argv[1], sys.argv[2])
    except (ValueError, OSError) as error:
        sys.exit(f"{error}")
