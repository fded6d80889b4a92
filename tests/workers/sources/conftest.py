"""A hub of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.workers.sources.checkpoints import write_llama
from tests.workers.sources.hub_server import Hub, Repository, serve_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A real hub on loopback that has the model org/tiny, of two shards; the hub's client finds it."""
    with serve_hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        running.repositories["models/org/tiny"] = Repository(write_llama(tmp_path / "tiny", shards=2))
        yield running
