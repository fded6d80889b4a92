"""Reads the header of a safetensors file that nobody has vouched for, and checks it against the file's size."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

from typing_extensions import TypeIs

from workers.errors import UserError

MAX_HEADER_BYTES = 100_000_000
_FIRST_READ_BYTES = 128 * 1024
_MAX_DIMENSIONS = 16
_MAX_NAME_CHARACTERS = 1_000

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header tells it."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """The product of the shape."""
        return prod(self.shape)


def read_header(
    read: Callable[[int, int], bytes], size_bytes: int, name: str, *, max_header_bytes: int = MAX_HEADER_BYTES
) -> tuple[dict[str, TensorInfo], int]:
    """The tensors of a file and the bytes that its header takes; ``read(start, length)`` gives the file's bytes.

    Raises UserError ``invalid_safetensors`` when the header is too large or malformed, or does not describe
    every byte of the file exactly once.
    """
    try:
        if size_bytes < 10:
            raise ValueError("the file is shorter than any safetensors file")
        first = read(0, min(size_bytes, _FIRST_READ_BYTES))
        if len(first) < 8:
            raise ValueError("the file ends within its first 8 bytes")
        header_bytes = int.from_bytes(first[:8], "little")
        if header_bytes > max_header_bytes:
            raise ValueError(f"its header of {header_bytes} bytes is over the limit of {max_header_bytes}")
        if 8 + header_bytes > size_bytes:
            raise ValueError("the file ends within its header")
        header = first[8 : 8 + header_bytes]
        if len(header) < header_bytes:
            header += read(8 + len(header), header_bytes - len(header))
        if len(header) != header_bytes:
            raise ValueError("the file ends within its header")
        return _parse(header, size_bytes - 8 - header_bytes), header_bytes
    except (ValueError, RecursionError) as error:
        message = "its header is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(
            "invalid_safetensors",
            f"{name} is not a sound safetensors file: {message}.",
            param="model.id",
            hint="The file is damaged or was not fully copied; write it again with safetensors.",
        ) from None


def _parse(header: bytes, data_bytes: int) -> dict[str, TensorInfo]:
    if not header.startswith(b"{"):
        raise ValueError("its header is not a JSON object")
    try:
        entries = json.loads(header, object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except UnicodeDecodeError:
        raise ValueError("its header is not UTF-8") from None
    except json.JSONDecodeError:
        raise ValueError("its header is not JSON") from None
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata does not consist of strings")
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in entries.items():
        if not name or len(name) > _MAX_NAME_CHARACTERS or not name.isprintable():
            raise ValueError("a tensor has no usable name")
        tensors[name], span = _tensor(name, entry)
        spans.append(span)
    _check_spans(spans, data_bytes)
    return tensors


def _tensor(name: str, entry: object) -> tuple[TensorInfo, tuple[int, int]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {name!r} has the unknown dtype {str(dtype)[:40]!r}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has no usable shape")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has no usable data_offsets")
    start, end = offsets
    num_bytes = prod(shape) * DTYPE_BYTES[dtype]
    if end - start != num_bytes:
        raise ValueError(f"tensor {name!r} needs {num_bytes} bytes and is given {end - start}")
    return TensorInfo(dtype, tuple(shape), num_bytes), (start, end)


def _check_spans(spans: list[tuple[int, int]], data_bytes: int) -> None:
    position = 0
    for start, end in sorted(spans):
        if start != position:
            raise ValueError("its tensors overlap or leave holes")
        position = end
    if position > data_bytes:
        raise ValueError(f"it is truncated: {position} bytes of tensors are announced and {data_bytes} are there")
    if position < data_bytes:
        raise ValueError(f"{data_bytes - position} bytes belong to no tensor")


def _are_counts(values: object) -> TypeIs[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("its header names something twice")
    return entries


def _no_constants(constant: str) -> NoReturn:
    raise ValueError(f"its header holds {constant}")
