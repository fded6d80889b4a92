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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.models import write_tiny_llama
from tests.workers.attempts import Attempt, compressed, fetched
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
    surveyed = any("allocate" in str(event.get("step")) for event in attempt.events)
    assert surveyed == (num_blocks == 0)
    assert digests(attempt) == digests(undisturbed)
    again = fetched(tmp_path / "again", model, recipe)
    stopped_after(again, 2)
    (again.work / "journal" / "sparsities.json").write_text("{")
    assert solved_blocks(again) == [2, 3]
    assert digests(again) == digests(undisturbed)


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
    ],
    ids=["flipped", "missing", "torn", "other"],
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


def _killed(work: Path, chance: random.Random) -> bool:
    """Compress in a process of its own and kill it at a random moment; whether it was done before that."""
    with subprocess.Popen(
        [sys.executable, "-c", _RUN, str(work)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()  # the imports are done
        time.sleep(chance.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
    return process.returncode == 0


@pytest.mark.parametrize("num_kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_random_moments_it_gives_the_same_bytes(
    num_kills: int, model: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    chance = random.Random(num_kills)
    attempt = fetched(tmp_path / "work", model, RECIPE)
    (attempt.work / "request.json").write_text(json.dumps(attempt.request))
    for _ in range(num_kills):
        entries = len(list((attempt.work / "journal").glob("block-*.json")))
        _killed(attempt.work, chance)
        shutil.rmtree(attempt.artifact, ignore_errors=True)  # each attempt has a work folder of its own
        assert len(list((attempt.work / "journal").glob("block-*.json"))) >= entries
    solved_blocks(attempt)
    assert digests(attempt) == expected
