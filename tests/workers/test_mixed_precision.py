"""Bits by layer: the budget is kept, what is sensitive gets more, and the artifact opens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import write_tiny_model
from tests.workers.attempts import Attempt, certified, compressed, fetched
from workers.certify import certify
from workers.engine.journal import Journal
from workers.errors import UserError
from workers.pipeline import compress

MIXED = {"technique": "mixed_precision", "group_size": 32}
NUM_BLOCKS = 4
ALL_WIDTHS = ["W2A16", "W3A16", "W4A16", "W5A16", "W6A16", "W8A16"]


def widths(attempt: Attempt) -> dict[str, int]:
    """The bits of each layer, as the report says."""
    layers = attempt.report["stages"][0]["layers"]
    return {name: layer["num_bits"] for name, layer in layers.items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four blocks; in the second, attention writes to the residual stream as loud as nothing else."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    write_tiny_model(folder, "llama", num_hidden_layers=NUM_BLOCKS, num_key_value_heads=2, intermediate_size=128)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 30
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("average", [4.0, 4.5, 6.0, 7.9])
def test_an_average_is_kept_and_packed_codes_of_two_widths_open(llama: Path, average: float, tmp_path: Path) -> None:
    attempt = certified(tmp_path / "work", llama, {"stages": [{**MIXED, "average_bits": average}]})
    metrics = attempt.report["stages"][0]["metrics"]
    assert metrics["average_bits"] <= average
    assert metrics["average_bits"] > average - 0.8
    found = widths(attempt)
    assert set(found.values()) <= {4, 8}
    config = json.loads((attempt.artifact / "config.json").read_text())["quantization_config"]
    described = {group["weights"]["num_bits"] for group in config["config_groups"].values()}
    assert described == set(found.values())


def test_layers_of_one_input_share_a_width(llama: Path, tmp_path: Path) -> None:
    attempt = certified(tmp_path / "work", llama, {"stages": [{**MIXED, "average_bits": 3.5, "schemes": ALL_WIDTHS}]})
    found = widths(attempt)
    assert len(set(found.values())) > 1
    for block in range(4):
        for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({found[f"model.layers.{block}.{layer}"] for layer in group}) == 1
    assert attempt.report["stages"][0]["metrics"]["theoretical_packed_bytes"] > 0


def test_what_the_output_depends_on_most_gets_the_bits(llama: Path, tmp_path: Path) -> None:
    attempt = certified(tmp_path / "work", llama, {"stages": [{**MIXED, "average_bits": 4.6}]})
    assert widths(attempt)["model.layers.1.self_attn.o_proj"] == 8


def test_the_bytes_of_the_result_stay_below_what_was_allowed(llama: Path, tmp_path: Path) -> None:
    smallest = certified(
        tmp_path / "four", llama, {"stages": [{"technique": "gptq", "scheme": "W4A16", "group_size": 32}]}
    ).outcome["result"]["size_bytes"]
    limit = smallest + 40_000
    attempt = certified(tmp_path / "work", llama, {"stages": [{**MIXED, "max_size_bytes": limit}]})
    assert smallest < attempt.outcome["result"]["size_bytes"] <= limit
    assert set(widths(attempt).values()) == {4, 8}


def test_too_small_a_limit_says_how_many_bytes_there_would_be(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="every layer at 4 bits") as caught:
        compressed(tmp_path / "work", llama, {"stages": [{**MIXED, "max_size_bytes": 100_000}]})
    assert caught.value.code == "budget_too_small"
    assert caught.value.param == "recipe.stages[0].max_size_bytes"


def test_ignored_layers_stay_and_do_not_count(llama: Path, tmp_path: Path) -> None:
    stage = {**MIXED, "average_bits": 4.0, "ignore": ["*.k_proj", "model.layers.0.*"]}
    attempt = certified(tmp_path / "work", llama, {"stages": [stage]})
    found = widths(attempt)
    assert len(found) == 3 * 6
    assert set(found.values()) == {4}


@pytest.mark.parametrize("stages", [
    [{"technique": "magnitude", "sparsity": 0.3}, {**MIXED, "average_bits": 5.0}],
    [
        {"technique": "wanda", "sparsity": 0.3, "allocation": "error"},
        {**MIXED, "average_bits": 5.0, "symmetric": False},
    ],
])  # fmt: skip
def test_zeros_survive(llama: Path, stages: list[dict[str, Any]], tmp_path: Path) -> None:
    attempt = certified(tmp_path / "work", llama, {"stages": stages})
    assert attempt.report["stages"][0]["metrics"]["sparsity"] == pytest.approx(0.3, abs=0.01)


def kill_after(attempt: Attempt, monkeypatch: pytest.MonkeyPatch, is_last: Callable[[Journal, int], bool]) -> None:
    """Compress until a journal has finished the block for which ``is_last`` holds."""
    finish = Journal.finish_block

    def killed(journal: Journal, index: int, entry: Any, shapes: Any) -> None:
        finish(journal, index, entry, shapes)
        if is_last(journal, index):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish_block", killed)
        with pytest.raises(KeyboardInterrupt):
            compress(attempt.work, attempt.request, attempt.events.append)


def test_a_killed_job_keeps_to_its_plan(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {"stages": [{**MIXED, "average_bits": 5.0}]}
    whole = compressed(tmp_path / "whole", llama, recipe)
    attempt = fetched(tmp_path / "work", llama, recipe)
    kill_after(attempt, monkeypatch, lambda journal, _: journal.folder == attempt.work / "journal")
    monkeypatch.setattr("workers.engine.stream.make_plan", None)  # made once
    compress(attempt.work, attempt.request, attempt.events.append)
    assert (attempt.artifact / "model.safetensors").read_bytes() == (whole.artifact / "model.safetensors").read_bytes()
    certify(attempt.work, attempt.request, attempt.events.append)
    assert attempt.report["timings"]["num_timed_blocks"] == 3  # of four


ALLOCATED = {"technique": "sparsegpt", "sparsity": 0.3, "allocation": "error"}


@pytest.mark.parametrize("stages", [[{**MIXED, "average_bits": 5.0}], [ALLOCATED, {**MIXED, "average_bits": 5.0}]])
def test_a_killed_plan_goes_on_from_its_last_block(
    llama: Path, stages: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compressed(tmp_path / "whole", llama, {"stages": stages})
    plan = json.loads((whole.work / "journal" / "plan.json").read_text())["value"]
    attempt = fetched(tmp_path / "work", llama, {"stages": stages})
    finish, finished = Journal.finish_block, list[str]()

    def killed(journal: Journal, index: int, entry: Any, shapes: Any) -> None:
        if (len(finished), len(stages)) == (2, 1):  # in the middle of a block, and again after one
            finished.append("torn")
            raise KeyboardInterrupt
        finish(journal, index, entry, shapes)
        finished.append(f"{journal.folder.name}-{index}")
        raise KeyboardInterrupt

    def begin() -> None:
        begun = Attempt(attempt.work, attempt.request)
        shutil.rmtree(attempt.artifact, ignore_errors=True)
        compress(begun.work, begun.request, begun.events.append)

    monkeypatch.setattr(Journal, "finish_block", killed)
    while not (attempt.work / "journal" / "block-00000.json").exists():
        with pytest.raises(KeyboardInterrupt):
            begin()
    steps = [f"sensitivity-{index}" for index in range(NUM_BLOCKS)]
    if len(stages) == 1:
        assert finished == [*steps[:2], "torn", *steps[2:], "journal-0"]
    else:
        assert finished == [*(f"survey-{index}" for index in range(NUM_BLOCKS - 1)), *steps, "journal-0"]
    assert not (attempt.work / "journal" / "planning").exists()
    assert json.loads((attempt.work / "journal" / "plan.json").read_text())["value"] == plan
    monkeypatch.undo()
    begin()
    assert (attempt.artifact / "model.safetensors").read_bytes() == (whole.artifact / "model.safetensors").read_bytes()


@pytest.mark.parametrize("what", ["activations", "entry", "another block's entry", "fingerprint"])
def test_a_part_of_a_plan_that_cannot_be_gone_on_with_is_made_again(
    llama: Path, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"stages": [{**MIXED, "average_bits": 5.0}]}
    whole = compressed(tmp_path / "whole", llama, recipe)
    attempt = fetched(tmp_path / "work", llama, recipe)
    kill_after(attempt, monkeypatch, lambda _, index: index == 1)
    steps = attempt.work / "journal" / "planning" / "sensitivity"
    if what == "activations":
        path = next((steps / "activations").glob("0-*"))
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    elif what == "another block's entry":
        shutil.copyfile(steps / "block-00001.json", steps / "block-00000.json")
    elif what == "entry":
        path = steps / "block-00000.json"
        entry = json.loads(path.read_text())
        next(iter(entry["entry"].values()))["errors"][0][1] *= 2
        path.write_text(json.dumps(entry))
    else:
        monkeypatch.setattr("workers.pipeline.fingerprint", lambda: {"machine": "another"})
    compress(attempt.work, attempt.request, attempt.events.append)
    assert (attempt.artifact / "model.safetensors").read_bytes() == (whole.artifact / "model.safetensors").read_bytes()
    first = [event["step"] for event in attempt.events if "plan.model.layers.0" in str(event.get("step"))]
    assert len(first) == 2


def test_an_encoder_is_surveyed_too(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", "bert", task="classification", intermediate_size=128)
    attempt = certified(tmp_path / "work", tmp_path / "model", {"stages": [{**MIXED, "average_bits": 6.0}]})
    assert set(widths(attempt).values()) == {4, 8}


def test_the_survey_leaves_the_skeleton_as_it_was(llama: Path, tmp_path: Path) -> None:
    attempt = fetched(tmp_path / "work", llama, {"stages": [{**MIXED, "average_bits": 5.0}]})
    from workers.architectures import architecture_of
    from workers.engine.checkpoint import Checkpoint
    from workers.engine.sensitivity import measure
    from workers.engine.skeleton import Skeleton
    from workers.techniques import MixedPrecision

    checkpoint = Checkpoint(attempt.work / "source" / "model")
    skeleton = Skeleton(checkpoint, architecture_of(checkpoint.config), torch.device("cpu"))
    calibration = torch.randint(0, 300, (8, 64), generator=torch.Generator().manual_seed(0))
    stage = MixedPrecision.model_validate({**MIXED, "average_bits": 5.0})
    found = measure(skeleton, stage, 4, [calibration], Journal(tmp_path / "journal", {}, {}), lambda *_: None)
    assert len(found) == 4 * 4
    assert all(group.errors[4] > 30 * group.errors[8] > 0 for group in found)
    assert all(group.divergence > 0 for group in found)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    assert not any(module._forward_pre_hooks for module in skeleton.model.modules())
