"""Reads the header of a GGUF file that nobody has vouched for: every count and offset is held against the file."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

MAX_HEADER_BYTES = 512 * 1024 * 1024
_MAX_ENTRIES = 100_000
# Of all arrays together; a vocabulary of a million tokens comes to four million. As objects they outgrow the file.
_MAX_VALUES = 2**24
_MAX_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: shape with rows first, as torch has it; ``offset`` from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    num_bytes: int


class GgufError(ValueError):
    """The bytes are not a sound GGUF file."""


def read_gguf_header(
    data: memoryview, type_sizes: dict[int, tuple[int, int]]
) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Metadata by key and tensors by name; ``type_sizes`` gives elements and bytes of a block by type.

    Raises GgufError.
    """
    reader = _Reader(data)
    try:
        if bytes(data[:4]) != b"GGUF":
            raise GgufError("it does not begin as a GGUF file")
        reader.position = 4
        version, num_tensors, num_entries = reader.unpack("IQQ")
        if version not in (2, 3):
            raise GgufError(f"its version is {version}, and 2 and 3 are understood")
        if num_tensors > _MAX_ENTRIES or num_entries > _MAX_ENTRIES:
            raise GgufError("it announces more entries than any model has")
        metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = reader.string()
            if key in metadata:
                raise GgufError(f"the key {key[:80]!r} appears twice")
            metadata[key] = reader.value(*reader.unpack("I"))
        table = [_table_entry(reader) for _ in range(num_tensors)]
    except (struct.error, UnicodeDecodeError):
        raise GgufError("it ends within its header, or the header is damaged") from None
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 2**16 or alignment & (alignment - 1):
        raise GgufError("its alignment is not a power of two")
    start = -(-reader.position // alignment) * alignment
    return metadata, _place(table, start, len(data), type_sizes)


class _Reader:
    """A position in the file; running past its end raises struct.error."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.position = 0
        self.num_values = 0

    def unpack(self, layout: str) -> tuple[Any, ...]:
        start = self._advance(struct.calcsize("<" + layout))
        return struct.unpack_from("<" + layout, self.data, start)

    def string(self) -> str:
        (length,) = self.unpack("Q")
        start = self._advance(length)
        return str(self.data[start : self.position], "utf-8")

    def value(self, kind: int) -> object:
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise GgufError(f"it holds a value of the unknown kind {kind}")
        kind, count = self.unpack("IQ")
        self.num_values += count
        if self.num_values > _MAX_VALUES:
            raise GgufError(f"its arrays hold more than {_MAX_VALUES} values")
        if kind in _SCALARS:
            return list(self.unpack(f"{count}{_SCALARS[kind]}"))
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        raise GgufError("it holds an array within an array")

    def _advance(self, num_bytes: int) -> int:
        """Go past ``num_bytes`` that may be read; returns where they start."""
        start, end = self.position, self.position + num_bytes
        if end > len(self.data):
            raise struct.error
        if end > MAX_HEADER_BYTES:
            raise GgufError(f"its header is larger than {MAX_HEADER_BYTES} bytes")
        self.position = end
        return start


def _table_entry(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name = reader.string()
    (num_dimensions,) = reader.unpack("I")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise GgufError(f"the tensor {name[:80]!r} has {num_dimensions} dimensions")
    shape = reader.unpack(f"{num_dimensions}Q")
    type_id, offset = reader.unpack("IQ")
    return name, tuple(reversed(shape)), type_id, offset


def _place(
    table: Sequence[tuple[str, tuple[int, ...], int, int]],
    start: int,
    size_bytes: int,
    type_sizes: dict[int, tuple[int, int]],
) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    end = start
    for name, shape, type_id, offset in sorted(table, key=lambda entry: entry[3]):
        if name in tensors:
            raise GgufError(f"the tensor {name[:80]!r} appears twice")
        if type_id not in type_sizes:
            raise GgufError(f"the tensor {name[:80]!r} has the unknown type {type_id}")
        block_elements, block_bytes = type_sizes[type_id]
        if 0 in shape or shape[-1] % block_elements:
            raise GgufError(f"the tensor {name[:80]!r} has the unusable shape {shape}")
        num_bytes = prod(shape) // block_elements * block_bytes
        if start + offset < end:
            raise GgufError("its tensors overlap")
        end = start + offset + num_bytes
        if end > size_bytes:
            raise GgufError(f"it is truncated: the tensor {name[:80]!r} ends after the file")
        tensors[name] = GgufTensor(name, shape, type_id, start + offset, num_bytes)
    return tensors
