"""Tokenizers are tried out where nothing that they do can hurt."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.models import write_tokenizer
from workers.errors import UserError
from workers.sources import tokenizer_file
from workers.sources.tokenizer_file import check_tokenizer_json


@pytest.fixture
def tokenizer(tmp_path: Path) -> dict[str, Any]:
    write_tokenizer(tmp_path, 384)
    loaded: dict[str, Any] = json.loads((tmp_path / "tokenizer.json").read_text())
    return loaded


def growing(tokenizer: dict[str, Any], times: int) -> bytes:
    """With a normalizer that makes twenty characters of each one, so many times."""
    rule = {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 20}
    return json.dumps({**tokenizer, "normalizer": {"type": "Sequence", "normalizers": [rule] * times}}).encode()


def refused(content: bytes) -> str:
    with pytest.raises(UserError) as caught:
        check_tokenizer_json(content)
    assert (caught.value.code, caught.value.param) == ("invalid_tokenizer", "model.id")
    return caught.value.message


def test_a_sound_tokenizer_passes(tokenizer: dict[str, Any]) -> None:
    check_tokenizer_json(json.dumps(tokenizer).encode())


def test_one_that_cannot_be_read_says_why(tokenizer: dict[str, Any]) -> None:
    assert "cannot be used" in refused(b"{}")


def test_one_that_makes_far_too_much_of_a_text_is_refused(tokenizer: dict[str, Any]) -> None:
    assert "characters become" in refused(growing(tokenizer, 2))


def test_one_that_does_not_end_is_refused_in_time(tokenizer: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_file, "_SECONDS", 1.0)
    begin = time.monotonic()
    message = refused(growing(tokenizer, 6))
    assert "takes more" in message
    assert time.monotonic() - begin < 10
