"""Calibration and evaluation share no passage."""

from __future__ import annotations

import time

import pytest

from workers.sources import passages
from workers.sources.passages import Passages


def left(used: str, text: str) -> str:
    known = Passages()
    known.add(used)
    return known.left_out_of(text)


@pytest.mark.parametrize(
    "text", ["", "one", "One. Two!\n\n\nThree?  \n four\n\n", "\n\n a\r\n\r\nb", "他来了。她走了。"]
)
def test_what_is_not_shared_comes_back_unchanged(text: str) -> None:
    assert left("Something else.", text) == text


def test_scripts_without_spaces_are_compared_by_character() -> None:
    text = "人工智能是计算机科学的一个分支它企图了解智能的实质"
    assert left(text, f"{text[3:20]}。别的句子。") == "别的句子。"


def test_a_full_memory_still_finds_long_passages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passages, "_MAX_HASHES", 1_000)
    text = " ".join(f"word{index}" for index in range(5_000))
    assert left(text, text[20:]) == ""
    assert left(text, "This is other text.") == "This is other text."


@pytest.mark.parametrize("text", ["\n" * 2_000_000, "." * 2_000_000, " " * 2_000_000, ". " * 500_000, ".'" * 500_000])
def test_odd_texts_take_no_more_than_linear_time(text: str) -> None:
    started = time.monotonic()
    left("x", text)
    assert time.monotonic() - started < 20
