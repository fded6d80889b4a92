"""Safetensors headers that lie are refused before a weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.numpy import save, save_file

from workers.errors import UserError
from workers.sources.safetensors_header import MAX_HEADER_BYTES, TensorInfo, read_header

SOUND = save({"a": np.zeros((2, 3), np.float32), "b": np.arange(4, dtype=np.int8)}, {"format": "np"})


def header_of(content: bytes) -> dict[str, TensorInfo]:
    return read_header(lambda start, length: content[start : start + length], len(content), "model.safetensors")[0]


def encode(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_what_safetensors_writes_is_read_back(tmp_path: Path) -> None:
    save_file({"w": np.ones((5, 7), np.float16), "empty": np.zeros((0, 3), np.float32)}, tmp_path / "x.safetensors")
    tensors = header_of((tmp_path / "x.safetensors").read_bytes())
    assert tensors == {"w": TensorInfo("F16", (5, 7), 70), "empty": TensorInfo("F32", (0, 3), 0)}
    assert tensors["w"].num_elements == 35


def test_a_header_longer_than_the_first_read_is_read_to_its_end() -> None:
    content = save({f"tensor.{index}.weight": np.zeros(1, np.int8) for index in range(5_000)})
    assert len(header_of(content)) == 5_000


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95",
        SOUND[:-1],
        SOUND[:20],
        SOUND + b"\x00",
        (2**63).to_bytes(8, "little") + b"{}",
        encode(b"[]"),
        encode(b"{"),
        encode(b'{"a": NaN}'),
        encode(b"\xff\xfe{}"),
        encode(b"{" + b'"a":{' * 100_000),
        encode(b'{"a": ' + b"9" * 10_000 + b"}"),
        encode(b'{"a": {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}, "a": 1}'),
        encode({"a": entry()}),
        encode({"a": entry("F31")}, bytes(4)),
        encode({"a": entry(["F32"])}, bytes(4)),  # type: ignore[arg-type]
        encode({"a": entry(shape=[2])}, bytes(4)),
        encode({"a": entry(shape=[-1, -1])}, bytes(4)),
        encode({"a": entry(shape=[True])}, bytes(4)),
        encode({"a": entry(shape=[1.0])}, bytes(4)),
        encode({"a": entry(shape=[2**62, 2**62])}, bytes(4)),
        encode({"a": entry(offsets=[4, 0])}, bytes(4)),
        encode({"a": entry(offsets=[0])}, bytes(4)),
        encode({"a": entry(), "b": entry()}, bytes(4)),
        encode({"a": entry(offsets=[4, 8])}, bytes(8)),
        encode({"": entry()}, bytes(4)),
        encode({"a\ud800": entry()}, bytes(4)),
        encode({"a": {**entry(), "more": 1}}, bytes(4)),
        encode({"a": 5}),
        encode({"__metadata__": 1, "a": entry()}, bytes(4)),
        encode({"__metadata__": {"x": 1}, "a": entry()}, bytes(4)),
    ],
)
def test_unsound_files_are_refused(content: bytes) -> None:
    with pytest.raises(UserError) as caught:
        header_of(content)
    assert (caught.value.code, caught.value.param) == ("invalid_safetensors", "model.id")
    assert "model.safetensors" in caught.value.message


def test_a_header_over_the_limit_is_refused_before_it_is_read() -> None:
    reads = []

    def read(start: int, length: int) -> bytes:
        reads.append(length)
        return (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + bytes(length - 8)

    with pytest.raises(UserError, match="over the limit"):
        read_header(read, 10**12, "model.safetensors")
    assert sum(reads) < 10**6


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(SOUND) - 1), st.integers(0, 255))
def test_whatever_is_accepted_safetensors_itself_accepts_too(position: int, value: int) -> None:
    content = bytearray(SOUND)
    content[position] = value
    try:
        tensors = header_of(bytes(content))
    except UserError:
        return
    described = dict(deserialize(bytes(content)))  # type: ignore[no-untyped-call]
    assert {name: (info.dtype, list(info.shape)) for name, info in tensors.items()} == {
        name: (info["dtype"], info["shape"]) for name, info in described.items()
    }
