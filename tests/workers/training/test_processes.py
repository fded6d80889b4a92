"""Training in several processes: the same curve as in one, the same bytes after a kill, and nobody left behind."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.jobs import wait_until
from tests.models import write_tiny_model
from tests.workers.attempts import Attempt, compressed, fetched
from tests.workers.supervisor.running import command_of, lives
from tests.workers.training.recipes import (
    CLASSIFYING,
    CUT,
    DISTIL,
    MAKE,
    TUNE,
    curve_of,
    digests,
    recipe_of,
    write_body,
)
from workers.errors import CrashError, UserError
from workers.pipeline import compress
from workers.training import loop, processes

RATE = {"learning_rate": 3e-3}
TOLERANCE = 1e-5  # sums of another order; relative
LONG = recipe_of(CUT, {**DISTIL, **RATE, "num_steps": 40, "num_evaluations": 4, "micro_batch_size": 2})


def in_processes(recipe: dict[str, Any], count: int) -> dict[str, Any]:
    """The recipe, its stages that train in so many processes."""
    stages = [{**stage, "num_processes": count} if "batch_size" in stage else stage for stage in recipe["stages"]]
    return {**recipe, "stages": stages}


def ranks_of(parent: int) -> list[psutil.Process]:
    """Processes that learn."""
    children = psutil.Process(parent).children(recursive=True)
    return [child for child in children if any("spawn_main" in word for word in command_of(child))]


def last_step(work: Path) -> int:
    """Of the newest state that is kept."""
    try:
        return max((int(path.stem.removeprefix("step-")) for path in work.rglob("step-*.json")), default=0)
    except FileNotFoundError:  # a folder went while it was looked into
        return 0


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    """LONG, in two processes."""
    return compressed(tmp_path_factory.mktemp("two") / "work", model, in_processes(LONG, 2))


def test_two_processes_give_the_loss_curve_of_one(undisturbed: Attempt, model: Path, tmp_path: Path) -> None:
    alone = compressed(tmp_path / "work", model, LONG)
    told = [
        [event["metrics"] for event in attempt.events if event["event"] == "stage" and "loss" in event["metrics"]]
        for attempt in (alone, undisturbed)
    ]
    assert [point["step"] for point in told[1]] == [point["step"] for point in told[0]] == [0, 10, 20, 30, 40]
    for name in ("held_out_loss", "held_out_cross_entropy"):
        assert [point[name] for point in told[1]] == pytest.approx([point[name] for point in told[0]], rel=TOLERANCE)
    assert [point["loss"] for point in told[1][1:]] == pytest.approx(
        [point["loss"] for point in told[0][1:]], rel=TOLERANCE
    )
    assert told[0][-1]["held_out_loss"] < 0.9 * told[0][0]["held_out_loss"]
    one, two = (
        json.loads((attempt.work / "compressed.json").read_text())["stages"][1]["metrics"]
        for attempt in (alone, undisturbed)
    )
    assert one["num_tokens"] == two["num_tokens"]


def test_two_processes_give_the_curve_of_a_classifier(tmp_path: Path) -> None:
    write_body(tmp_path / "body", "bert")
    # Two pieces a process: the dropout of each has to be the same in whatever process.
    recipe = {"stages": [{**MAKE, "micro_batch_size": 4}], **CLASSIFYING}
    alone, together = (
        compressed(tmp_path / str(count), tmp_path / "body", in_processes(recipe, count)) for count in (1, 2)
    )
    assert curve_of(together, 0) == pytest.approx(curve_of(alone, 0), rel=TOLERANCE)
    assert curve_of(alone, 0)[-1] < curve_of(alone, 0)[0]


def test_a_process_may_have_no_piece_of_the_batch(model: Path, tmp_path: Path) -> None:
    stage = {**TUNE, **RATE, "batch_size": 4, "micro_batch_size": 2, "patience": 5}
    stage |= {"augmentation": {"delete_probability": 0.2}, "curriculum": "easiest_first"}
    alone, together = (
        compressed(tmp_path / str(number), model, in_processes(recipe_of(stage), number)) for number in (1, 3)
    )
    assert curve_of(together, 0) == pytest.approx(curve_of(alone, 0), rel=TOLERANCE)


@pytest.mark.parametrize(
    "stages",
    [
        [{"technique": "magnitude", "sparsity": 0.5}, {**DISTIL, **RATE, "teacher_top_k": 8}],
        [
            CUT,
            # The scale of a teacher's states is that of a piece.
            {**DISTIL, **RATE, "hidden_weight": 1.0, "micro_batch_size": 1, "synthetic": {"num_samples": 40}},
        ],
    ],
    ids=["zeros, cached logits", "states, written text"],
)
def test_what_is_made_before_the_first_step_is_made_once(
    stages: list[dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    alone = compressed(tmp_path / "1", model, recipe_of(*stages))
    attempt = fetched(tmp_path / "2", model, in_processes(recipe_of(*stages), 2))
    held: set[torch.Size] = set()
    gc.collect()
    # What other tests have left in this process is not this training's.
    others = [each for each in gc.get_objects() if isinstance(each, nn.Parameter)]
    known = {id(each) for each in others}

    def heard(event: dict[str, Any]) -> None:
        attempt.events.append(event)
        if event["event"] == "stage" and "held_out_loss" in event["metrics"] and event["status"] == "running":
            parameters = [each for each in gc.get_objects() if isinstance(each, nn.Parameter)]
            own = [each for each in parameters if id(each) not in known]
            held.update(each.shape for each in own if each.dim() > 1 and not each.is_meta)

    compress(attempt.work, attempt.request, heard)
    assert curve_of(attempt, 1) == pytest.approx(curve_of(alone, 1), rel=TOLERANCE)
    assert not held  # no matrix in this process while the others have theirs
    one, two = (load_file(each.artifact / "model.safetensors") for each in (alone, attempt))
    num_zeros = [sum(int((tensor == 0).sum()) for tensor in tensors.values()) for tensors in (one, two)]
    assert num_zeros[1] == pytest.approx(num_zeros[0], rel=1e-3)


def test_a_killed_process_ends_the_attempt_and_the_next_gives_the_same_bytes(
    undisturbed: Attempt, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SECONDS_A_STATE", 0.0)
    attempt = fetched(tmp_path / "work", model, in_processes(LONG, 2))
    killed: list[psutil.Process] = []

    def kill() -> None:
        wait_until(lambda: last_step(attempt.work) >= 3, timeout_seconds=60)
        killed.extend(ranks_of(os.getpid()))
        killed[-1].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(CrashError) as raised:
        compress(attempt.work, attempt.request, attempt.events.append)
    killer.join()
    assert raised.value.code == "process_killed"
    assert len(killed) == 2
    assert not any(lives(process.pid) for process in killed)
    reached = last_step(attempt.work)
    assert 3 <= reached < 40
    attempt.events.clear()
    compress(attempt.work, attempt.request, attempt.events.append)
    measured = [event["metrics"] for event in attempt.events if event["event"] == "stage" and event["metrics"]]
    assert min(point["step"] for point in measured if "step" in point) > reached - 1  # none from the beginning
    assert digests(attempt) == digests(undisturbed)


def test_nobody_outlives_the_job_s_process(model: Path, tmp_path: Path) -> None:
    recipe = in_processes(recipe_of({**TUNE, "num_steps": 100_000}), 2)
    attempt = fetched(tmp_path / "work", model, recipe)
    (attempt.work / "request.json").write_text(json.dumps(attempt.request))
    read, write = os.pipe()
    command = [sys.executable, "-m", "workers.runner", "--events-fd", str(write)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(write,), start_new_session=True) as parent:
        os.close(write)
        assert parent.stdin is not None
        parent.stdin.write(json.dumps({"phase": "compress", "work": str(attempt.work), "num_threads": 1}).encode())
        parent.stdin.write(b"\n")
        parent.stdin.flush()
        with os.fdopen(read) as events:
            for line in events:  # until they have learned for a second
                event = json.loads(line)
                assert event["event"] != "error", event
                if event["event"] == "progress" and event["step"] == "train":
                    break
            family = psutil.Process(parent.pid).children(recursive=True)
            assert len(ranks_of(parent.pid)) == 2
            assert {os.getpgid(process.pid) for process in family} == {parent.pid}  # what a supervisor kills
            parent.kill()
    wait_until(lambda: not any(lives(process.pid) for process in family), timeout_seconds=10)


def test_what_a_process_says_of_its_end_is_the_job_s_error(tmp_path: Path) -> None:
    # Weights so large that no product of theirs is finite.
    write_tiny_model(
        tmp_path / "model", "llama", num_key_value_heads=2, intermediate_size=128, scale=1e30, tie_word_embeddings=True
    )
    attempt = fetched(tmp_path / "work", tmp_path / "model", in_processes(recipe_of(TUNE), 2))
    with pytest.raises(UserError) as raised:
        compress(attempt.work, attempt.request, attempt.events.append)
    assert (raised.value.code, raised.value.param) == ("non_finite_loss", "recipe.stages[0].learning_rate")
    assert raised.value.hint
    assert not ranks_of(os.getpid())


def test_more_processes_than_accelerators_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "compute_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError) as raised:
        processes.check_accelerators(2, "recipe.stages[0].num_processes")
    assert (raised.value.code, raised.value.param) == ("too_few_accelerators", "recipe.stages[0].num_processes")
    processes.check_accelerators(1, "recipe.stages[0].num_processes")
