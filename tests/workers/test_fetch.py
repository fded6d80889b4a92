"""What the fetch process leaves in the work folder, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.workers.sources.checkpoints import write_llama
from tests.workers.sources.test_gguf import as_gguf, llama_weights, write_gguf
from workers.errors import JobError, UserError
from workers.fetch import fetch
from workers.sources.facts import ModelFacts
from workers.sources.fetched import unmark
from workers.sources.inspection import inspect_model

GPTQ = {"stages": [{"technique": "gptq"}]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work" / "source").mkdir(parents=True)
    return tmp_path / "work"


def run(
    work: Path,
    root: Path,
    model_id: str = "file:model",
    *,
    revision: str | None = None,
    recipe: Any = None,
    on_event: Callable[[dict[str, Any]], None] = lambda _: None,
) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []

    def emit(event: dict[str, Any]) -> None:
        events.append(event)
        on_event(event)

    request = {
        "job_id": "job_01JZZZZZZZZZZZZZZZZZZZZZZZ",
        "model": {"id": model_id, "revision": revision},
        "recipe": recipe or GPTQ,
        "model_roots": [str(root)],
        "artifact_files": model_id.startswith("job:"),
    }
    fetch(work, request, emit)
    return events


def resolved(events: list[dict[str, Any]]) -> str:
    (event,) = [event for event in events if event["event"] == "resolved"]
    return str(event["revision"])


def test_a_local_model_is_linked_not_copied(work: Path, root: Path) -> None:
    folder = write_llama(root / "model", shards=2)
    run(work, root)
    found = work / "source" / "model"
    assert {path.name for path in found.iterdir()} == {path.name for path in folder.iterdir()}
    for path in found.iterdir():
        assert path.is_symlink()
        assert path.resolve() == (folder / path.name).resolve()


def test_what_the_other_phases_need_is_left_in_the_work_folder(work: Path, root: Path) -> None:
    write_llama(root / "model")
    events = run(work, root)
    told = json.loads((work / "source" / "model.json").read_text())
    assert set(told.pop("fingerprint")) == {"config.json", "tokenizer.json", "model.safetensors"}
    facts = ModelFacts.from_dict(told)
    assert facts.revision == resolved(events)
    assert facts.linear_in_features == inspect_model("file:model", model_roots=[root]).linear_in_features
    data = json.loads((work / "source" / "data.json").read_text())
    for name in ("calibration", "evaluation"):
        content = (work / "source" / f"{name}.jsonl").read_bytes()
        assert data[name]["sha256"] == hashlib.sha256(content).hexdigest()
        assert data[name]["num_documents"] == len(content.splitlines()) > 0
    assert events[-1] == {"event": "progress", "fraction": 1.0, "step": "fetch"}


def test_the_revision_of_local_content_changes_with_a_byte_and_with_a_name(work: Path, root: Path) -> None:
    folder = write_llama(root / "model")
    first = resolved(run(work, root))
    assert resolved(run(work, root)) == first
    os.utime(folder / "config.json", (0, 0))
    assert resolved(run(work, root)) == first
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += np.float16(1)
    save_file(tensors, folder / "model.safetensors")
    second = resolved(run(work, root))
    (folder / "generation_config.json").write_text("{}")
    unmark(work / "source")
    assert len({first, second, resolved(run(work, root))}) == 3


def test_content_that_was_pinned_has_to_be_the_same(work: Path, root: Path) -> None:
    write_llama(root / "model")
    revision = resolved(run(work, root))
    assert resolved(run(work, root, revision=revision)) == revision
    with pytest.raises(UserError) as caught:
        run(work, root, revision="0" * 40)
    assert (caught.value.code, caught.value.param) == ("revision_not_found", "model.revision")


def test_a_model_that_changes_while_its_texts_are_written_is_refused(work: Path, root: Path) -> None:
    """Its revision and its size would be those of other weights."""
    folder = write_llama(root / "model")

    def change(event: dict[str, Any]) -> None:
        if event["event"] == "resolved":
            tensors = load_file(folder / "model.safetensors")
            save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "model.safetensors")

    with pytest.raises(UserError) as caught:
        run(work, root, on_event=change)
    assert caught.value.code == "model_changed"
    assert not (work / "source" / "model.json").exists()


def test_settings_that_name_code_reach_no_loader(work: Path, root: Path) -> None:
    folder = write_llama(root / "model", auto_map={"AutoConfig": "evil.Config"}, kept=1)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {}, "tokenizer_file": "/etc/passwd"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text("raise SystemExit")
    run(work, root)
    found = work / "source" / "model"
    config = json.loads((found / "config.json").read_text())
    assert config["kept"] == 1
    assert "auto_map" not in config
    assert json.loads((found / "tokenizer_config.json").read_text()) == {"tokenizer_class": "PreTrainedTokenizerFast"}
    assert not (found / "evil.py").exists()
    assert "auto_map" in json.loads((folder / "config.json").read_text())


def test_an_earlier_result_is_read_from_the_work_folder(work: Path, root: Path) -> None:
    write_llama(work / "source" / "artifact")
    (work / "source" / "artifact" / "manifest.json").write_text("{}")
    run(work, root, "job:job_01JZZZZZZZZZZZZZZZZZZZZZZZ")
    assert {path.name for path in (work / "source" / "model").iterdir()} == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
    }


def test_a_gguf_file_is_converted_into_the_work_folder(work: Path, root: Path) -> None:
    (root / "model").mkdir()
    write_gguf(root / "model" / "m.gguf", as_gguf(llama_weights()))
    events = run(work, root)
    assert (work / "source" / "model" / "model.safetensors").stat().st_size > 0
    told = json.loads((work / "source" / "model.json").read_text())
    assert told["source_format"] == "gguf"
    assert told["source_file_bytes"] == (root / "model" / "m.gguf").stat().st_size
    fractions = [event["fraction"] for event in events if event["event"] == "progress"]
    assert fractions == sorted(fractions)
    assert resolved(run(work, root, "file:model/m.gguf")) == resolved(events)


@pytest.mark.parametrize(
    "content", [b"{", b"{}", b"\xff", b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a a"]}}']
)
def test_a_tokenizer_that_cannot_be_loaded_is_the_models_fault(work: Path, root: Path, content: bytes) -> None:
    folder = write_llama(root / "model")
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        run(work, root)
    assert (caught.value.code, caught.value.param) == ("invalid_tokenizer", "model.id")


def test_a_model_that_changed_since_it_was_accepted_is_checked_again(work: Path, root: Path) -> None:
    folder = write_llama(root / "model")
    inspect_model("file:model", model_roots=[root])
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/etc/hostname")
    with pytest.raises(JobError) as caught:
        run(work, root)
    assert caught.value.code == "symlink_refused"


def test_what_an_earlier_try_left_is_replaced(work: Path, root: Path) -> None:
    write_llama(root / "model", shards=2)
    run(work, root)
    for path in (root / "model").glob("model*"):
        path.unlink()
    write_llama(root / "model")
    run(work, root)
    assert [path.name for path in (work / "source" / "model").glob("*.safetensors")] == ["model.safetensors"]


def test_texts_of_a_stage_that_needs_none_are_not_written(work: Path, root: Path) -> None:
    write_llama(root / "model")
    run(work, root, recipe={"stages": [{"technique": "round_to_nearest"}]})
    assert not (work / "source" / "calibration.jsonl").exists()
    assert (work / "source" / "evaluation.jsonl").exists()


def test_a_fetch_of_a_local_model_leaves_torch_and_numpy_out(work: Path, root: Path) -> None:
    write_llama(root / "model")
    request = {"model": {"id": "file:model"}, "recipe": GPTQ, "model_roots": [str(root)]}
    program = (
        "import json, sys\nfrom pathlib import Path\nfrom workers.fetch import fetch\n"
        "fetch(Path(sys.argv[1]), json.loads(sys.argv[2]), lambda event: None)\n"
        "assert not {'torch', 'numpy', 'transformers', 'huggingface_hub'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program, str(work), json.dumps(request)], check=True)


def test_a_model_of_270_megabytes_is_fetched_in_no_time(work: Path, root: Path) -> None:
    """It takes half a second on a quiet core; the limit only notices a copy or a slow loop."""
    folder = write_llama(root / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "ballast": np.zeros(135_000_000, np.float16)}, folder / "model.safetensors")
    begin = time.monotonic()
    run(work, root)
    assert time.monotonic() - begin < 10
