"""A language model for all of these tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roots") / "deep"
    write_tiny_model(
        folder, "llama", num_hidden_layers=3, num_key_value_heads=2, intermediate_size=128, scale=4.0,
        tie_word_embeddings=True,
    )  # fmt: skip
    return folder
