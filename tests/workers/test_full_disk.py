"""A disk that fills up, a real one: wherever that happens, the job fails with `disk_full` and lives to say so."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.models import write_tiny_llama
from tests.workers.attempts import TEXTS, compressed, fetched

RECIPE = {
    "stages": [
        {"technique": "wanda", "sparsity": 0.3},
        {"technique": "gptq", "scheme": "W4A16", "group_size": 32},
    ]
}
# Mounted where only the process and its children see it, which needs no right of the machine's.
_IN_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
_CAN_MOUNT = (
    shutil.which("unshare") is not None
    and subprocess.run(
        [*_IN_NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False, capture_output=True
    ).returncode
    == 0
)
pytestmark = pytest.mark.skipif(not _CAN_MOUNT, reason="no file system can be mounted here without root")

_ON_SMALL_DISK = """
import gc, json, os, shutil, subprocess, sys
from pathlib import Path
from workers.errors import as_job_error
phase, prepared, disk, told = sys.argv[1], *map(Path, sys.argv[2:5])
sizes = [int(size) for size in sys.argv[5:]]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(disk)], check=True)
import workers.certify, workers.fetch, workers.pipeline
run = {"fetch": workers.fetch.fetch, "compress": workers.pipeline.compress, "certify": workers.certify.certify}[phase]
request = json.loads((prepared / "request.json").read_text())
outcomes = []
for size in sizes:
    work = disk / "work"
    shutil.rmtree(work, ignore_errors=True)
    gc.collect()  # files that a model of the last round still maps would give their bytes back later
    shutil.copytree(prepared, work, symlinks=True)
    # So many bytes are left.
    with (work / "ballast").open("wb") as file:
        state = os.statvfs(disk)
        os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_frsize - size)
    events = []
    try:
        run(work, request, events.append)
        code = None
    except Exception as error:
        code = as_job_error(error).code
    steps = [str(event["step"]) for event in events if event["event"] == "progress"]
    files = sorted(path.name for path in (work / "artifact").glob("*"))
    outcomes.append({"code": code, "step": steps[-1] if steps else None, "artifact": files})
told.write_text(json.dumps(outcomes))
"""


def on_small_disks(phase: str, prepared: Path, sizes: list[int]) -> list[dict[str, Any]]:
    """How ``phase`` ends on disks with so many free bytes, in a copy of the work folder ``prepared``."""
    disk, told = prepared.parent / "disk", prepared.parent / "told.json"
    disk.mkdir()
    arguments = [phase, str(prepared), str(disk), str(told), *map(str, sizes)]
    subprocess.run([*_IN_NAMESPACE, sys.executable, "-c", _ON_SMALL_DISK, *arguments], check=True)
    outcomes: list[dict[str, Any]] = json.loads(told.read_text())
    return outcomes


def size_of(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_tiny_llama(tmp_path / "roots" / "model", num_layers=3)
    return tmp_path / "roots" / "model"


def test_while_it_fetches(model: Path, tmp_path: Path) -> None:
    prepared = fetched(tmp_path / "prepared", model, RECIPE)
    needed = 512 * 1024
    (prepared.work / "request.json").write_text(json.dumps(prepared.request))
    shutil.rmtree(prepared.work / "source")
    (prepared.work / "source").mkdir()
    outcomes = on_small_disks("fetch", prepared.work, [0, 4096, 8192, 12288, needed])
    assert [outcome["code"] for outcome in outcomes] == ["disk_full"] * 4 + [None]


def test_while_it_compresses(model: Path, tmp_path: Path) -> None:
    prepared = fetched(tmp_path / "prepared", model, RECIPE)
    (prepared.work / "request.json").write_text(json.dumps(prepared.request))
    whole = compressed(tmp_path / "whole", model, RECIPE)
    needed = size_of(whole.work) - size_of(whole.work / "source")
    outcomes = on_small_disks("compress", prepared.work, [needed * step // 16 for step in range(16)] + [2 * needed])
    assert {outcome["code"] for outcome in outcomes[:-1]} == {"disk_full"}
    assert outcomes[-1]["code"] is None
    # In the journal, the hidden states, the parts, and while they are put together.
    assert len({outcome["step"] for outcome in outcomes[:-1]}) >= 4
    assert "export" in {outcome["step"] for outcome in outcomes[:-1]}


def test_while_it_trains(model: Path, tmp_path: Path) -> None:
    shape = {"num_steps": 3, "batch_size": 4, "max_seq_length": 32, "precision": "float32"}
    recipe = {
        "stages": [{"technique": "logit_distillation", "teacher_top_k": 16, **shape}, RECIPE["stages"][0]],
        "training": {"dataset": {"texts": TEXTS[:100]}},
    }
    prepared = fetched(tmp_path / "prepared", model, recipe)
    (prepared.work / "request.json").write_text(json.dumps(prepared.request))
    whole = compressed(tmp_path / "whole", model, recipe)
    needed = size_of(whole.work) - size_of(whole.work / "source")
    outcomes = on_small_disks("compress", prepared.work, [needed * step // 12 for step in range(10)] + [8 * needed])
    assert {outcome["code"] for outcome in outcomes[:-1]} == {"disk_full"}
    assert outcomes[-1]["code"] is None


def test_while_it_certifies(model: Path, tmp_path: Path) -> None:
    prepared = compressed(tmp_path / "prepared", model, RECIPE)
    (prepared.work / "request.json").write_text(json.dumps(prepared.request))
    outcomes = on_small_disks("certify", prepared.work, [0, 4096, 1 << 20])
    assert [outcome["code"] for outcome in outcomes] == ["disk_full", "disk_full", None]
