"""Parts of an artifact's weights: written block by block, then put together as the final safetensors files.

A part is complete or absent: it is written beside its place, flushed to the disk, and renamed. Putting together
copies bytes from file to file and never holds more than one piece of a tensor.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from workers.disk import flush, write_json

LARGEST_SHARD_BYTES = 4_000_000_000
_PIECE_BYTES = 16 << 20
# One entry only: safetensors writes several in random order, and the same recipe has to give the same bytes.
_METADATA = {"format": "pt"}
_BYTES_OF = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


class Parts:
    """A folder of parts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Where the part called ``name`` lies."""
        return self.folder / f"{name}.safetensors"

    def read(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part."""
        return load_file(self.path(name))

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one part."""
        temporary = self.folder / f".{name}.tmp"
        save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, temporary, _METADATA)
        flush(temporary)
        temporary.rename(self.path(name))
        flush(self.folder)

    def assemble(self, destination: Path, stem: str = "model") -> None:
        """Write all parts as ``{stem}.safetensors``, or as shards with their index where that would be too large."""
        tensors = [entry for path in sorted(self.folder.glob("*.safetensors")) for entry in _entries(path)]
        # Wider types first, so that every tensor begins at a multiple of its width.
        tensors.sort(key=lambda entry: (-_BYTES_OF.get(entry.dtype, 1), entry.name))
        shards: list[list[_Entry]] = [[]]
        filled = 0
        for entry in tensors:
            if shards[-1] and filled + entry.size_bytes > LARGEST_SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append(entry)
            filled += entry.size_bytes
        if len(shards) == 1:
            _write_shard(destination / f"{stem}.safetensors", shards[0])
            return
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file_name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_shard(destination / file_name, shard)
            weight_map |= {entry.name: file_name for entry in shard}
        index = {
            "metadata": {"total_size": sum(entry.size_bytes for entry in tensors)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_json(destination / f"{stem}.safetensors.index.json", index)


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int  # of the first byte in the file
    size_bytes: int


def _entries(path: Path) -> list[_Entry]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return [
        _Entry(name, value["dtype"], tuple(value["shape"]), path, 8 + length + begin, end - begin)
        for name, value in header.items()
        for begin, end in [value["data_offsets"]]
    ]


def _write_shard(path: Path, entries: list[_Entry]) -> None:
    header: dict[str, object] = {"__metadata__": _METADATA}
    position = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.size_bytes],
        }
        position += entry.size_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as output:
        output.write(struct.pack("<Q", len(encoded)) + encoded)
        for entry in entries:
            with entry.path.open("rb") as source:
                source.seek(entry.offset)
                remaining = entry.size_bytes
                while remaining:
                    piece = source.read(min(_PIECE_BYTES, remaining))
                    if not piece:
                        raise EOFError(f"{entry.path.name} ends inside {entry.name}")
                    output.write(piece)
                    remaining -= len(piece)
        output.flush()
        os.fsync(output.fileno())
