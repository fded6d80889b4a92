"""What a job may take, and which of its models are opened whole in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.models import write_tiny_llama
from tests.workers.attempts import compressed
from workers import memory
from workers.evaluation import ways
from workers.evaluation.ways import choose_ways
from workers.recipe import Recipe

CPU = torch.device("cpu")


def test_memory_that_is_held_counts_and_mapped_files_do_not(tmp_path: Path) -> None:
    before = memory.held_bytes(os.getpid())
    held = torch.ones(64 << 20, dtype=torch.uint8)
    assert memory.held_bytes(os.getpid()) - before > 0.9 * held.numel()
    del held
    (tmp_path / "file").write_bytes(bytes(64 << 20))
    before = memory.held_bytes(os.getpid())
    mapped = torch.from_file(str(tmp_path / "file"), shared=True, size=64 << 20, dtype=torch.uint8)
    assert int(mapped.sum()) == 0
    assert memory.held_bytes(os.getpid()) - before < 0.1 * mapped.numel()


def test_a_limit_leaves_what_is_not_held_yet() -> None:
    held = memory.held_bytes(os.getpid())
    assert memory.free_bytes(held + 1_000_000) == pytest.approx(1_000_000, abs=900_000)
    assert memory.free_bytes(1) == 0
    assert memory.free_bytes(1 << 60) == pytest.approx(memory.free_bytes(None), rel=0.2)


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        (".", ("memory.max", "memory.current")),
        ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    ],
)
def test_a_container_has_what_its_group_has_left(
    folder: str, names: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    machine = memory.free_bytes(None)
    group = tmp_path / folder
    group.mkdir(exist_ok=True)
    limit, used = names
    (group / limit).write_text("50000000\n")
    (group / used).write_text("45000000\n")
    (group / "memory.stat").write_text("anon 5000000\ninactive_file 30000000\nactive_file 8000000\nslab 1\n")
    assert memory.free_bytes(None) == int(0.9 * 43_000_000)
    (group / limit).write_text("max\n")
    assert memory.free_bytes(None) == pytest.approx(machine, rel=0.2)


def test_the_artifact_is_the_first_to_be_opened_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_llama(tmp_path / "model", num_layers=4, hidden_size=256, intermediate_size=512)
    attempt = compressed(tmp_path / "work", tmp_path / "model", {"stages": [{"technique": "magnitude"}]})
    recipe = Recipe.model_validate(attempt.request["recipe"])
    needed = choose_ways(attempt.work, recipe, CPU, None).needed_bytes
    found = {}
    for share in (1.5, 0.9, 0.0):
        free = int(share * needed) + ways._SPARE_BYTES
        monkeypatch.setattr(ways, "free_bytes", lambda _, free=free: free)
        chosen = choose_ways(attempt.work, recipe, CPU, None)
        found[share] = (chosen.original, chosen.artifact)
        assert (chosen.warning() is None) == (share > 1)
        assert chosen.waiting_bytes < needed
    assert found == {1.5: ("whole", "whole"), 0.9: ("by_block", "whole"), 0.0: ("by_block", "by_block")}
