"""The same recipe under the same fingerprint gives the same bytes, whoever runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = {
    "gptq": [{"technique": "gptq", "scheme": "W4A16", "group_size": 32, "embeddings": True}],
    "sparsegpt-gptq": [
        {"technique": "sparsegpt", "sparsity": 0.5},
        {"technique": "gptq", "scheme": "W4A16", "group_size": 32},
    ],
    "awq": [{"technique": "awq", "scheme": "W4A16", "group_size": 32, "symmetric": False}],
    "smoothquant": [{"technique": "smoothquant"}],
}
NUM_THREADS = 2
_WORKER = """
import json, sys
from pathlib import Path
import torch
from tests.workers.attempts import compressed
from workers.fingerprint import fingerprint
torch.set_num_threads(int(sys.argv[3]))
work, model = Path(sys.argv[1]), Path(sys.argv[2])
for name, stages in json.loads(sys.argv[4]).items():
    compressed(work / name, model, {"stages": stages, "seed": 3})
(work / "fingerprint.json").write_text(json.dumps(fingerprint()))
"""


def worker(folder: Path, model: Path, recipes: dict[str, object], **environment: str) -> Path:
    """A worker's process with a work folder, home and environment of its own; its work folder."""
    home = folder / "home"
    work = folder / "a-work-folder-whose-path-is-of-another-length" / folder.name
    home.mkdir(parents=True)
    work.mkdir(parents=True)
    root = Path(__file__).parents[2]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "LC_", "LANG"))}
    subprocess.run(
        [sys.executable, "-c", _WORKER, str(work), str(model), str(NUM_THREADS), json.dumps(recipes)],
        env={**inherited, "HOME": str(home), "TMPDIR": str(home), "PYTHONPATH": str(root), **environment},
        cwd=home,
        check=True,
        capture_output=True,
    )
    return work


@pytest.fixture(scope="module")
def works(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two workers' work folders; the second did the recipes in the other order."""
    folder = tmp_path_factory.mktemp("workers")
    first = worker(folder / "one", tiny_llama, {**RECIPES}, PYTHONHASHSEED="1", OMP_NUM_THREADS="1", LANG="C")
    backwards = dict(reversed(RECIPES.items()))
    second = worker(folder / "another", tiny_llama, backwards, PYTHONHASHSEED="4242", LANG="C.UTF-8", TZ="Asia/Tokyo")
    return first, second


def test_both_record_the_same_fingerprint(works: tuple[Path, Path]) -> None:
    first, second = (json.loads((work / "fingerprint.json").read_text()) for work in works)
    assert first == second


@pytest.mark.parametrize("name", RECIPES)
def test_two_workers_give_the_same_bytes(name: str, works: tuple[Path, Path]) -> None:
    first, second = (work / name / "artifact" for work in works)
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(path.name for path in second.iterdir())
    assert {"config.json", "model.safetensors", "recipe.json", "tokenizer.json"} <= set(files)
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
