"""Passes that stop and go on, and what fails inside the model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workers.engine.forward import ForwardPass, Gate, SharedTransform
from workers.errors import UserError


class Model(nn.Module):
    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Identity()
        self.error = error

    def forward(self, input_ids: Tensor, **_options: object) -> Any:
        hidden = self.first(input_ids * 2)
        if self.error is not None:
            raise self.error
        return SimpleNamespace(logits=self.second(hidden) + 1)


def test_a_shared_transform_is_made_once_for_all_readers_and_then_forgotten() -> None:
    seen = []

    def doubled(inputs: torch.Tensor) -> torch.Tensor:
        seen.append(inputs)
        return 2 * inputs

    shared = SharedTransform(doubled, 2)
    one, other = torch.ones(2), torch.ones(2)
    first = shared(one)
    assert shared(one) is first
    assert shared(other) is not first
    assert len(seen) == 2
    shared(other)
    assert shared._made is None


def started(model: Model, value: float) -> ForwardPass:
    for name in ("first", "second"):
        Gate(name, model.get_submodule(name), stops=True)
    return ForwardPass(model, torch.tensor([value]))


def test_a_pass_stops_goes_on_and_ends() -> None:
    model = Model()
    one = started(model, 1.0)
    other = ForwardPass(model, torch.tensor([5.0]))
    assert one.advance_to("first").item() == 2
    assert other.advance_to("second").item() == 10
    assert one.finish().item() == 3
    assert other.finish().item() == 11


def test_what_is_set_while_a_pass_waits_changes_what_it_reads_from_there_on() -> None:
    model = Model()
    waiting, through = (Gate(name, model.get_submodule(name), stops=name == "first") for name in ("first", "second"))
    one = ForwardPass(model, torch.tensor([1.0]))
    assert one.advance_to("first").item() == 2
    waiting.transform = lambda inputs: inputs * 10
    through.transform = lambda inputs: inputs + 0.5
    assert one.finish().item() == 21.5
    waiting.remove()
    through.remove()
    assert ForwardPass(model, torch.tensor([1.0])).finish().item() == 3


@pytest.mark.parametrize("is_exact", [True, False])
def test_only_a_pass_that_need_not_be_exact_computes_products_otherwise_and_only_while_it_runs(is_exact: bool) -> None:
    seen, usual = [], torch.get_float32_matmul_precision()
    model = Model()
    Gate("first", model.first, stops=True)
    model.first.register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    one = ForwardPass(model, torch.tensor([1.0]), is_exact=is_exact)
    one.advance_to("first")
    assert torch.get_float32_matmul_precision() == usual == "highest"
    one.finish()
    assert torch.get_float32_matmul_precision() == usual
    model.error = RuntimeError("broken")
    with pytest.raises(UserError):
        ForwardPass(model, torch.tensor([1.0]), is_exact=is_exact).finish()
    assert torch.get_float32_matmul_precision() == usual
    assert set(seen) == {"highest" if is_exact else "medium"}


def test_a_model_that_cannot_be_run_is_the_users_to_mend() -> None:
    one = started(Model(ZeroDivisionError("division by zero")), 1.0)
    one.advance_to("first")
    with pytest.raises(UserError, match="ZeroDivisionError: division by zero") as raised:
        one.finish()
    assert (raised.value.code, raised.value.param) == ("model_unusable", "model.id")


def test_too_little_memory_is_no_fault_of_the_model() -> None:
    one = started(Model(RuntimeError("DefaultCPUAllocator: can't allocate memory")), 1.0)
    with pytest.raises(RuntimeError, match="allocate"):
        one.finish()


def test_an_abandoned_pass_ends_without_a_word() -> None:
    one = started(Model(), 1.0)
    one.advance_to("first")
    one.abandon()
    one.abandon()
    assert one._greenlet.dead
