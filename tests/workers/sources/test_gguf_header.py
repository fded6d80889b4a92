"""GGUF headers, bounded before anything is read that they announce."""

from __future__ import annotations

import struct
import tracemalloc

import pytest

from workers.sources import gguf_header
from workers.sources.gguf_header import GgufError, read_gguf_header


def header(kind: int, count: int, content: bytes) -> memoryview:
    key = struct.pack("<Q", 1) + b"k"
    return memoryview(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IIQ", 9, kind, count) + content)


def test_an_array_is_read() -> None:
    assert read_gguf_header(header(4, 2, struct.pack("<II", 5, 6)), {})[0] == {"k": [5, 6]}


@pytest.mark.parametrize(("kind", "count"), [(0, 20_000_000), (8, 2**24 + 1), (0, 2**63)])
def test_a_large_array_is_refused_before_it_is_unpacked(kind: int, count: int) -> None:
    data = header(kind, count, bytes(20_000_000))
    tracemalloc.start()
    with pytest.raises(GgufError):
        read_gguf_header(data, {})
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1_000_000


@pytest.mark.parametrize("data", [header(0, 900, bytes(900)), header(8, 1, struct.pack("<Q", 900) + bytes(900))])
def test_a_value_beyond_the_limit_of_the_header_is_refused(data: memoryview, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "MAX_HEADER_BYTES", 500)
    with pytest.raises(GgufError, match="larger than"):
        read_gguf_header(data, {})
