"""A compression that is killed goes on from its last finished block, and its result is the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import write_tiny_llama
from tests.workers.attempts import Attempt, compressed, fetched
from workers.certify import certify
from workers.pipeline import compress

NUM_BLOCKS = 4
RECIPE = {
    "stages": [
        {"technique": "wanda", "sparsity": 0.3},
        {"technique": "gptq", "scheme": "W4A16", "group_size": 32, "ignore": ["model.layers.1.*"]},
    ]
}


class Stopped(BaseException):
    """The run ends here."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roots") / "deep"
    write_tiny_llama(folder, num_layers=NUM_BLOCKS)
    return folder


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The bytes that an undisturbed run gives."""
    return digests(compressed(tmp_path_factory.mktemp("undisturbed") / "work", model, RECIPE))


def digests(attempt: Attempt) -> dict[str, str]:
    files = [*attempt.artifact.iterdir(), attempt.work / "probe.safetensors"]
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    stages = json.loads((attempt.work / "compressed.json").read_text())["stages"]
    return {**found, "stages": json.dumps(stages)}


def stopped_after(attempt: Attempt, num_blocks: int) -> None:
    """Compress until so many blocks are finished and the next one is under way."""

    def emit(event: dict[str, Any]) -> None:
        if event.get("block") == num_blocks and str(event.get("step")).endswith("down_proj"):
            raise Stopped

    with pytest.raises(Stopped):
        compress(attempt.work, attempt.request, emit)


def solved_blocks(attempt: Attempt) -> list[int]:
    """Run to the end; the blocks of which a layer was solved."""
    attempt.events.clear()
    compress(attempt.work, attempt.request, attempt.events.append)
    return sorted({event["block"] for event in attempt.events if "proj" in str(event.get("step"))})


def codes(attempt: Attempt) -> list[str]:
    return [event["code"] for event in attempt.events if event["event"] == "warning"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("num_blocks", [0, 1, 3])
def test_it_goes_on_from_the_first_unfinished_block(
    num_blocks: int, model: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    attempt = fetched(tmp_path / "work", model, RECIPE)
    stopped_after(attempt, num_blocks)
    assert solved_blocks(attempt) == list(range(num_blocks, NUM_BLOCKS))
    assert digests(attempt) == expected


def test_it_may_be_stopped_again_and_again(model: Path, expected: dict[str, str], tmp_path: Path) -> None:
    attempt = fetched(tmp_path / "work", model, RECIPE)
    for num_blocks in (1, 1, 3):
        stopped_after(attempt, num_blocks)
    assert solved_blocks(attempt) == [3]
    assert digests(attempt) == expected


@pytest.mark.parametrize(
    "stage",
    [
        {"technique": "awq", "group_size": 32},
        {"technique": "smoothquant"},
        {"technique": "round_to_nearest", "group_size": 32, "embeddings": True},
        {"technique": "gptq", "scheme": "W3A16", "group_size": 32},
        {"technique": "gptq", "group_size": 32, "asymmetric_calibration": True},
        {"technique": "round_to_nearest", "scheme": "FP8"},
        {"technique": "round_to_nearest", "scheme": "NF4", "ignore": ["*.q_proj"]},
    ],
    ids=lambda stage: str(stage["technique"]),
)
def test_norms_scales_and_quantized_inputs_come_back_too(stage: dict[str, Any], model: Path, tmp_path: Path) -> None:
    undisturbed = compressed(tmp_path / "undisturbed", model, {"stages": [stage]})
    attempt = fetched(tmp_path / "work", model, {"stages": [stage]})
    stopped_after(attempt, 2)
    shutil.rmtree(attempt.work / "journal" / "activations")
    compress(attempt.work, attempt.request, attempt.events.append)
    assert digests(attempt) == digests(undisturbed)


@pytest.mark.parametrize("num_blocks", [0, 2])
def test_layers_keep_the_sparsities_that_they_were_given_first(num_blocks: int, model: Path, tmp_path: Path) -> None:
    recipe = {"stages": [{"technique": "sparsegpt", "sparsity": 0.5, "allocation": "error"}]}
    undisturbed = compressed(tmp_path / "undisturbed", model, recipe)
    attempt = fetched(tmp_path / "work", model, recipe)
    stopped_after(attempt, num_blocks)
    assert solved_blocks(attempt) == list(range(num_blocks, NUM_BLOCKS))
    assert not any("plan" in str(event.get("step")) for event in attempt.events)
    assert digests(attempt) == digests(undisturbed)


@pytest.mark.parametrize(("old", "new"), [("0.", "0.0"), ("{", ""), (": ", ": -")], ids=["other", "torn", "negative"])
def test_blocks_that_rest_on_a_damaged_plan_are_done_again(old: str, new: str, model: Path, tmp_path: Path) -> None:
    recipe = {"stages": [{"technique": "sparsegpt", "sparsity": 0.5, "allocation": "error"}]}
    undisturbed = compressed(tmp_path / "undisturbed", model, recipe)
    attempt = fetched(tmp_path / "work", model, recipe)
    stopped_after(attempt, 2)
    plan = attempt.work / "journal" / "plan.json"
    plan.write_text(plan.read_text().replace(old, new, 1))
    assert solved_blocks(attempt) == [0, 1, 2, 3]
    assert codes(attempt) == ["journal_damaged"]
    assert digests(attempt) == digests(undisturbed)


def test_weights_that_are_stored_as_bitmasks_come_back_too(model: Path, tmp_path: Path) -> None:
    recipe = {"stages": [{"technique": "wanda", "sparsity": 0.5}], "output": {"format": "sparse-bitmask"}}
    undisturbed = compressed(tmp_path / "undisturbed", model, recipe)
    attempt = fetched(tmp_path / "work", model, recipe)
    stopped_after(attempt, 2)
    shutil.rmtree(attempt.work / "journal" / "activations")
    assert solved_blocks(attempt) == [2, 3]
    assert digests(attempt) == digests(undisturbed)


@pytest.mark.parametrize(
    "lose",
    [
        shutil.rmtree,
        lambda folder: flip(next(folder.glob("1-00000*"))),
        lambda folder: next(folder.glob("1-00000*")).write_bytes(b""),
    ],
    ids=["gone", "flipped", "empty"],
)
def test_lost_hidden_states_are_computed_again_from_the_compressed_blocks(
    lose: Callable[[Path], None], model: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    attempt = fetched(tmp_path / "work", model, RECIPE)
    stopped_after(attempt, 3)
    lose(attempt.work / "journal" / "activations")
    assert solved_blocks(attempt) == [3]
    assert digests(attempt) == expected


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "parts" / "block-00001.safetensors"),
        lambda folder: (folder / "parts" / "block-00001.safetensors").unlink(),
        lambda folder: (folder / "block-00001.json").write_text("{"),
        lambda folder: (folder / "block-00001.json").write_text("[]"),
        lambda folder: replace(folder / "block-00001.json", '"num_pruned": ', '"num_pruned": 1'),
    ],
    ids=["flipped", "missing", "torn", "other", "altered"],
)
def test_what_is_damaged_is_done_again_and_said(
    damage: Callable[[Path], None], model: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    attempt = fetched(tmp_path / "work", model, RECIPE)
    stopped_after(attempt, 3)
    damage(attempt.work / "journal")
    assert solved_blocks(attempt) == [1, 2, 3]
    assert codes(attempt) == ["journal_damaged"]
    assert digests(attempt) == expected


def test_the_journal_of_another_recipe_is_refused(model: Path, expected: dict[str, str], tmp_path: Path) -> None:
    other = {"stages": [{**RECIPE["stages"][0], "sparsity": 0.4}, RECIPE["stages"][1]]}
    attempt = fetched(tmp_path / "other", model, other)
    stopped_after(attempt, 3)
    mine = fetched(tmp_path / "work", model, RECIPE)
    shutil.copytree(attempt.work / "journal", mine.work / "journal")
    assert solved_blocks(mine) == list(range(NUM_BLOCKS))
    assert codes(mine) == ["journal_refused"]
    assert digests(mine) == expected


@pytest.mark.parametrize("part", ["attar", "model", "data", "journal"])
def test_the_journal_of_another_version_revision_or_text_is_refused(
    part: str, model: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    attempt = fetched(tmp_path / "work", model, RECIPE)
    stopped_after(attempt, 3)
    path = attempt.work / "journal" / "identity.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), part: "another"}))
    assert solved_blocks(attempt) == list(range(NUM_BLOCKS))
    assert codes(attempt) == ["journal_refused"]
    assert digests(attempt) == expected


@pytest.fixture
def another_number_of_threads() -> Iterator[int]:
    before = torch.get_num_threads()
    yield before + 1
    torch.set_num_threads(before)


def test_under_another_fingerprint_it_goes_on_and_is_marked(
    another_number_of_threads: int, model: Path, tmp_path: Path
) -> None:
    attempt = fetched(tmp_path / "work", model, RECIPE)
    before = torch.get_num_threads()
    stopped_after(attempt, 2)
    torch.set_num_threads(another_number_of_threads)
    assert solved_blocks(attempt) == [2, 3]
    [warning] = [event for event in attempt.events if event["event"] == "warning"]
    assert warning["code"] == "fingerprint_changed"
    assert f"num_threads ({before} before, {another_number_of_threads} now)" in warning["message"]
    certify(attempt.work, attempt.request, attempt.events.append)
    environment = attempt.report["environment"]
    assert environment["made_under"] == [
        {"first_block": 0, "num_blocks": 2, "differs_in": {"num_threads": before}},
        {"first_block": 2, "num_blocks": 2, "differs_in": {}},
    ]
    assert (environment["reproducible"], environment["sha256"]) == (False, None)
    assert "Not reproducible" in (attempt.artifact / "README.md").read_text()


def test_under_the_same_fingerprint_a_job_that_went_on_is_reproducible(model: Path, tmp_path: Path) -> None:
    attempt = fetched(tmp_path / "work", model, RECIPE)
    stopped_after(attempt, 2)
    assert solved_blocks(attempt) == [2, 3]
    assert codes(attempt) == []
    certify(attempt.work, attempt.request, attempt.events.append)
    environment = attempt.report["environment"]
    assert environment["reproducible"]
    assert environment["made_under"] == [{"first_block": 0, "num_blocks": NUM_BLOCKS, "differs_in": {}}]
    assert len(environment["sha256"]) == 64


def test_a_full_disk_is_an_error_and_no_crash(
    model: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = fetched(tmp_path / "work", model, RECIPE)

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            compress(attempt.work, attempt.request, attempt.events.append)
    assert not attempt.artifact.exists()
    assert solved_blocks(attempt) == list(range(NUM_BLOCKS))
    assert digests(attempt) == expected


_RUN = """
import json, sys
from pathlib import Path
from workers.pipeline import compress
work = Path(sys.argv[1])
def emit(event):
    print(json.dumps(event), flush=True)
compress(work, json.loads((work / "request.json").read_text()), emit)
"""


def _killed(work: Path, chance: random.Random) -> list[int]:
    """Compress in a process of its own and kill it at a random moment; the blocks of which it began a layer."""
    lines: list[bytes] = []
    with subprocess.Popen(
        [sys.executable, "-c", _RUN, str(work)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        lines += [process.stdout.readline() for _ in range(chance.randrange(1, 14))]
        time.sleep(chance.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
    events = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return sorted({event["block"] for event in events if "proj" in str(event.get("step"))})


@pytest.mark.parametrize(("num_kills", "num_blocks"), [(3, NUM_BLOCKS), pytest.param(20, 16, marks=pytest.mark.long)])
def test_killed_at_random_moments_it_repeats_one_block_at_most_and_gives_the_same_bytes(
    num_kills: int, num_blocks: int, tmp_path: Path
) -> None:
    write_tiny_llama(tmp_path / "deep", num_layers=num_blocks)
    undisturbed = compressed(tmp_path / "undisturbed", tmp_path / "deep", RECIPE)
    chance = random.Random(num_kills)
    attempt = fetched(tmp_path / "work", tmp_path / "deep", RECIPE)
    (attempt.work / "request.json").write_text(json.dumps(attempt.request))
    num_worked = 0
    for _ in range(num_kills):
        num_finished = len(list((attempt.work / "journal").glob("block-*.json")))
        worked = _killed(attempt.work, chance)
        num_worked += len(worked)
        now_finished = len(list((attempt.work / "journal").glob("block-*.json")))
        # From the first block that was not finished, one after the other; only the last of them may be lost.
        assert worked == list(range(num_finished, num_finished + len(worked)))
        assert now_finished >= num_finished + len(worked) - 1
        shutil.rmtree(attempt.artifact, ignore_errors=True)  # each attempt has a work folder of its own
    assert num_worked > num_kills / 4
    assert solved_blocks(attempt) == list(range(now_finished, num_blocks))
    assert digests(attempt) == digests(undisturbed)
