"""What decides the bytes of an artifact is recorded, and a difference is named."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from workers.fingerprint import change_of, differences, environment_of, fingerprint, made_under


def changed(path: str, value: Any) -> dict[str, Any]:
    facts: dict[str, Any] = copy.deepcopy(fingerprint())
    *above, name = path.split(".")
    inner = facts
    for key in above:
        inner = inner[key]
    inner[name] = value
    return facts


def test_it_says_of_this_machine_what_libraries_choose_by() -> None:
    facts = fingerprint()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cpu"]["capability"]
    assert facts["cpu"]["features"]
    assert set(facts["libraries"]) >= {"torch", "numba", "transformers"}
    assert "hostname" not in facts


@pytest.mark.parametrize(
    "path", ["num_threads", "libraries.torch", "libraries.numba", "cpu.features", "cpu.model", "device_name"]
)
def test_what_decides_bytes_makes_another_fingerprint(path: str, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text("{}")
    before, now = changed(path, ["other"] if path == "cpu.features" else "other"), fingerprint()
    assert set(differences(before, now)) == {path}
    assert path in change_of(before, now)
    digests = [environment_of(each, made_under([each]), data)["sha256"] for each in (before, now)]
    assert digests[0] != digests[1]


@pytest.mark.parametrize("path", ["python", "cpu.num_cores"])
def test_what_decides_no_byte_is_recorded_only(path: str, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text("{}")
    before, now = changed(path, "other"), fingerprint()
    assert change_of(before, now) == ""
    digests = [environment_of(each, made_under([each]), data)["sha256"] for each in (before, now)]
    assert digests[0] == digests[1]


def test_a_job_that_changed_there_and_back_has_three_runs() -> None:
    other, now = changed("num_threads", 99), fingerprint()
    assert made_under([now, other, other, now]) == [
        {"first_block": 0, "num_blocks": 1, "differs_in": {}},
        {"first_block": 1, "num_blocks": 2, "differs_in": {"num_threads": 99}},
        {"first_block": 3, "num_blocks": 1, "differs_in": {}},
    ]
