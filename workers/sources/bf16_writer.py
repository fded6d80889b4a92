"""Writes bf16 safetensors shards piece by piece, so that memory does not grow with the model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from workers.sources.checkpoint import SINGLE_WEIGHTS, WEIGHTS_INDEX

MAX_SHARD_BYTES = 2 * 10**9

Chunks = Iterator[np.ndarray[Any, Any]]
Tensors = Mapping[str, tuple[tuple[int, ...], Callable[[], Chunks]]]


def write_checkpoint(
    tensors: Tensors, folder: Path, progress: Callable[[float], None], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write ``tensors`` (shape, and a function that gives float32 values in order) as safetensors into ``folder``."""
    shards = _plan(tensors, max_shard_bytes)
    names = [SINGLE_WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)]
    total_bytes = sum(_num_bytes(shape) for shape, _ in tensors.values())
    done_bytes = 0

    def written(num_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += num_bytes
        progress(done_bytes / total_bytes)

    for name, shard in zip(names, shards, strict=True):
        _write_shard({tensor: tensors[tensor] for tensor in shard}, folder / name, written)
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def to_bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The bit patterns of float32 ``values`` rounded to bf16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype("<u2")


def _plan(tensors: Tensors, max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name, (shape, _) in tensors.items():
        if shards[-1] and shard_bytes + _num_bytes(shape) > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += _num_bytes(shape)
    return shards


def _write_shard(tensors: Tensors, path: Path, written: Callable[[int], None]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (shape, _) in tensors.items():
        end = position + _num_bytes(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, (shape, chunks) in tensors.items():
            before = file.tell()
            for values in chunks():
                file.write(to_bf16(values).data)
            assert file.tell() - before == _num_bytes(shape), name
            written(_num_bytes(shape))
        file.flush()
        os.fsync(file.fileno())


def _num_bytes(shape: tuple[int, ...]) -> int:
    return 2 * prod(shape)
