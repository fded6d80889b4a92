"""Messages of a job's processes: understood, bounded, never trusted."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.errors import CrashError
from workers.supervisor.messages import DoneMessage, MessageReader, ProgressMessage, loads, parse


def test_messages_arrive_whole_however_the_pipe_cuts_them() -> None:
    read_fd, write_fd = os.pipe()
    os.set_blocking(read_fd, False)
    reader = MessageReader(read_fd)
    text = b'{"event": "progress", "fraction": 0.5}\n{"event": "done"}\n'
    heard = []
    for byte in text:
        os.write(write_fd, bytes([byte]))
        heard += reader.read()
    assert [type(message) for message in heard] == [ProgressMessage, DoneMessage]
    os.close(write_fd)
    assert reader.read() == []
    assert reader.closed
    os.close(read_fd)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"null",
        b"[1]",
        b'{"event": "promise"}',
        b'{"event": "progress"}',
        b'{"event": "progress", "fraction": 2}',
        b'{"event": "progress", "fraction": NaN}',
        b'{"event": "resolved", "revision": "main"}',
        b'{"event": "error", "code": "x", "message": "y", "blame": "weather"}',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_a_line_that_is_no_message_is_a_crash(line: bytes) -> None:
    with pytest.raises(CrashError) as caught:
        parse(line)
    assert caught.value.code == "invalid_message"


def test_numbers_and_text_that_the_database_refuses_are_replaced() -> None:
    assert loads(b'{"a": NaN, "b": [1e999, -Infinity, 1.5], "c\\u0000": "x\\u0000\\ud800y"}') == {
        "a": None,
        "b": [None, None, 1.5],
        "c\N{REPLACEMENT CHARACTER}": "x\N{REPLACEMENT CHARACTER}?y",
    }


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_whatever_is_loaded_can_be_stored(value: object) -> None:
    loaded = json.dumps(loads(json.dumps(value).encode()))
    assert "\\u0000" not in loaded
    loaded.encode("utf-8")
