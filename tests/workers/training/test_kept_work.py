"""What a training keeps: a killed one ends with the same bytes, and damaged work is done again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.workers.attempts import compressed, fetched
from tests.workers.training.recipes import (
    CUT,
    DISTIL,
    TUNE,
    Stopped,
    digests,
    recipe_of,
    stopped_after,
)
from workers.errors import UserError
from workers.pipeline import compress
from workers.training import loop
from workers.training.step_journal import StepJournal


@pytest.mark.parametrize(
    "stage",
    [
        TUNE,
        DISTIL,
        {**DISTIL, "hidden_weight": 1.0},
        {**DISTIL, "teacher_top_k": 8},
        {**DISTIL, "synthetic": {"num_samples": 40, "top_k": 20}, "alpha": 0.0},
        {**TUNE, "augmentation": {"mask_probability": 0.0, "delete_probability": 0.1}},
        {**TUNE, "curriculum": "easiest_first", "patience": 5},
        {**TUNE, "micro_batch_size": 2, "schedule": "linear"},
    ],
    ids=["hard", "soft", "states", "cached", "synthetic", "augmented", "curriculum", "accumulated"],
)
def test_killed_after_any_step_it_ends_with_the_same_bytes(
    stage: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(CUT, stage, {"technique": "round_to_nearest", "group_size": 32})
    expected = digests(compressed(tmp_path / "undisturbed", model, recipe))
    attempt = fetched(tmp_path / "work", model, recipe)
    steps: list[int] = []
    own_step = loop.Loop._step

    def counted(self: Any, curve: Any) -> float:
        steps.append(curve.step)
        return own_step(self, curve)

    monkeypatch.setattr(loop.Loop, "_step", counted)
    for last in (1, 4):
        stopped_after(attempt, last)
    compress(attempt.work, attempt.request, attempt.events.append)
    assert digests(attempt) == expected
    assert steps == list(range(6))  # none twice


def test_a_state_that_was_not_wholly_written_is_left_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(TUNE)
    expected = digests(compressed(tmp_path / "undisturbed", model, recipe))
    monkeypatch.setattr(loop, "SECONDS_A_STATE", 0.0)
    attempt = fetched(tmp_path / "work", model, recipe)
    own_write = StepJournal.write

    def damaged(self: StepJournal, curve: Any, tensors: Any) -> None:
        own_write(self, curve, tensors)
        if curve.step == 3:
            [path] = self.folder.glob("*.safetensors")
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
            raise Stopped

    monkeypatch.setattr(StepJournal, "write", damaged)
    with pytest.raises(Stopped):
        compress(attempt.work, attempt.request, attempt.events.append)
    monkeypatch.setattr(StepJournal, "write", own_write)
    compress(attempt.work, attempt.request, attempt.events.append)
    assert digests(attempt) == expected


@pytest.mark.parametrize(
    ("damaged", "how"),
    [
        ("checkpoint/model.safetensors", "changed"),
        ("checkpoint/config.json", "gone"),
        ("samples/tokens.bin", "changed"),
        ("samples/index.npz", "cut"),
        ("teacher/values.bin", "changed"),
        ("teacher/values.bin", "gone"),
        ("teacher/filled.json", "cut"),
    ],
)
def test_damaged_work_is_done_again(
    damaged: str, how: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is finished is read when the stage after it is under way, what is under way when its own stage is.
    first, second = {**DISTIL, "teacher_top_k": 8}, {**TUNE, "max_seq_length": 24}
    recipe = recipe_of(CUT, first, second)
    expected = digests(compressed(tmp_path / "undisturbed", model, recipe))
    attempt = fetched(tmp_path / "work", model, recipe)
    own_step, index = loop.Loop._step, 2 if damaged.startswith("checkpoint") else 1

    def stopped(self: Any, curve: Any) -> float:
        if self._lesson.param == f"recipe.stages[{index}]" and curve.step == 3:
            raise Stopped
        return own_step(self, curve)

    monkeypatch.setattr(loop.Loop, "_step", stopped)
    with pytest.raises(Stopped):
        compress(attempt.work, attempt.request, attempt.events.append)
    monkeypatch.setattr(loop.Loop, "_step", own_step)
    path = attempt.work / "journal" / "stage-01" / damaged
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if how == "cut" else content[:-2] + bytes([content[-2] ^ 1, 0]))
    compress(attempt.work, attempt.request, attempt.events.append)
    assert digests(attempt) == expected


def test_a_loss_that_is_no_number_stops_by_name_and_keeps_the_last_good_state(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SECONDS_A_STATE", 0.0)
    attempt = fetched(tmp_path / "work", model, recipe_of(CUT, TUNE))
    own_step = loop.Loop._step

    def broken(self: Any, curve: Any) -> float:
        if curve.step == 3:
            next(iter(self._parameters.values())).data.fill_(float("nan"))
        return own_step(self, curve)

    monkeypatch.setattr(loop.Loop, "_step", broken)
    with pytest.raises(UserError) as raised:
        compress(attempt.work, attempt.request, attempt.events.append)
    assert (raised.value.code, raised.value.param) == ("non_finite_loss", "recipe.stages[1].learning_rate")
    [state] = (attempt.work / "journal").rglob("step-*.safetensors")
    assert state.stem == "step-000000003"
    assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(state).values())
