"""What waiting passes hold goes to files beyond a budget, and comes back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.models import write_tiny_model
from tests.workers.attempts import compressed
from tests.workers.test_architectures import LIKE_OTHERS, VARIANTS
from workers import memory
from workers.architectures import ARCHITECTURES
from workers.engine import text
from workers.engine.holdings import Holdings, MemoryBudget

WIDTH = 512
TENSOR_BYTES = 300 * WIDTH * 4


class Made:
    """What a pass holds in the middle of a layer: a result, a view of it that outlives it, and what lies before."""

    def __init__(self, budget: MemoryBudget) -> None:
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.cache = torch.empty(0)
        self.inputs = torch.randn(300, WIDTH)
        self.holdings = Holdings(budget, self.layer)
        with torch.inference_mode(), self.holdings:
            result = self.layer(self.inputs)
            self.view: Tensor = result[:, 7:100]
            self.other: Tensor = result.relu()
            self.cache = result + 1
            self.layer.register_buffer("cache", self.cache)
        self.expected = [self.view.clone(), self.other.clone()]

    def held_bytes(self) -> int:
        return sum(each.untyped_storage().nbytes() for each in (self.view, self.other))

    def is_whole(self) -> bool:
        return all(map(torch.equal, (self.view, self.other), self.expected))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "waiting"
    assert not any((tmp_path / "waiting").iterdir())


def test_beyond_the_budget_everything_that_was_made_goes_to_a_file_and_comes_back(folder: Path) -> None:
    made = Made(MemoryBudget(folder, 2 * TENSOR_BYTES - 1))
    made.holdings.put_away()
    assert made.held_bytes() == 0
    assert sum(path.stat().st_size for path in folder.iterdir()) == 2 * TENSOR_BYTES
    # What came in from outside, and what the model itself keeps, is for others too.
    assert made.inputs.untyped_storage().nbytes() == made.cache.untyped_storage().nbytes() == TENSOR_BYTES
    assert made.layer.weight.untyped_storage().nbytes() == WIDTH * WIDTH * 4
    made.holdings.bring_back()
    assert made.is_whole()


def test_within_the_budget_nothing_is_written_and_what_goes_on_counts_no_more(folder: Path) -> None:
    budget = MemoryBudget(folder, 3 * TENSOR_BYTES)
    one, other = Made(budget), Made(budget)
    one.holdings.put_away()
    other.holdings.put_away()
    assert (one.held_bytes(), other.held_bytes()) == (2 * TENSOR_BYTES, 0)
    one.holdings.bring_back()
    other.holdings.bring_back()
    assert one.is_whole()
    assert other.is_whole()
    other.holdings.put_away()
    assert other.held_bytes() == 2 * TENSOR_BYTES
    other.holdings.forget()
    one.holdings.put_away()
    assert one.held_bytes() == 2 * TENSOR_BYTES


def test_what_nobody_holds_any_more_is_not_kept(folder: Path) -> None:
    made = Made(MemoryBudget(folder, 0))
    made.other = made.view
    made.holdings.put_away()
    assert sum(path.stat().st_size for path in folder.iterdir()) == TENSOR_BYTES
    made.holdings.forget()


def is_long(variant: str) -> bool:
    """Whether others go the same ways, or a scan token by token makes thousands of values that may be put away."""
    model_type, task, _ = VARIANTS[variant]
    return variant in LIKE_OTHERS or ARCHITECTURES[model_type, task].is_recurrent


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.long] if is_long(name) else []) for name in VARIANTS]
)
def test_the_budget_does_not_change_the_result(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_type, task, config = VARIANTS[variant]
    write_tiny_model(tmp_path / "model", model_type, task=task, **config)
    stage = {"technique": "gptq", "scheme": "W4A16", "group_size": 32, "asymmetric_calibration": True}
    recipe: dict[str, object] = {"stages": [stage]}
    if ARCHITECTURES[model_type, task].is_transposed:
        recipe["output"] = {"format": "safetensors"}
    monkeypatch.setattr(text, "TOKENS_PER_PASS", 512)
    in_memory = compressed(tmp_path / "in_memory", tmp_path / "model", recipe)
    monkeypatch.setattr(memory, "MOST_WAITING_BYTES", 0)
    written: list[int] = []
    put_away = Holdings.put_away

    def counted(holdings: Holdings) -> None:
        put_away(holdings)
        written.append(len(holdings._away))

    monkeypatch.setattr(Holdings, "put_away", counted)
    in_files = compressed(tmp_path / "in_files", tmp_path / "model", recipe)
    assert sum(written) > 2 * len(ARCHITECTURES[model_type, task].linear_groups)
    for path in sorted(in_memory.artifact.glob("*.safetensors")):
        assert (in_files.artifact / path.name).read_bytes() == path.read_bytes()
    assert not (in_files.work / "journal" / "waiting").exists()
