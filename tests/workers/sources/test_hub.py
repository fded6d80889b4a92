"""huggingface_hub and datasets themselves, against a small real hub on loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.workers.sources.checkpoints import HIDDEN, INTERMEDIATE, write_llama
from tests.workers.sources.hub_server import TOKEN, Hub, Repository
from workers.errors import InfrastructureError, JobError, UserError
from workers.fetch import fetch
from workers.sources.datasets import check_dataset
from workers.sources.facts import ModelFacts
from workers.sources.hub import open_snapshot
from workers.sources.inspection import inspect_model


def inspect(model_id: str = "org/tiny", revision: str | None = None, token: str | None = None) -> ModelFacts:
    return inspect_model(model_id, revision, token=token, timeout_seconds=5)


def refused(model_id: str = "org/tiny", revision: str | None = None) -> tuple[str, str | None]:
    with pytest.raises(JobError) as caught:
        inspect(model_id, revision)
    return caught.value.code, caught.value.param


def test_a_model_is_inspected_from_its_config_and_headers(hub: Hub) -> None:
    facts = inspect(revision="main")
    assert facts.revision == hub.repositories["models/org/tiny"].commit
    assert facts.linear_in_features == (HIDDEN, INTERMEDIATE)
    assert inspect(revision=facts.revision) == facts


def test_inspection_reads_headers_and_not_weights(hub: Hub) -> None:
    folder = hub.repositories["models/org/tiny"].folder
    shard = folder / "model-00001-of-00002.safetensors"
    save_file({**load_file(shard), "ballast": np.zeros(5 * 10**6, np.float16)}, shard)
    inspect()
    asked = [wanted for _, path, wanted in hub.requests if path.endswith(shard.name)]
    assert asked == ["bytes=0-131071"]


def test_only_files_that_a_loader_needs_are_asked_for(hub: Hub, tmp_path: Path) -> None:
    folder = hub.repositories["models/org/tiny"].folder
    for name in ("modeling_evil.py", "pytorch_model.bin", "adapter_config.json", "sub/model.safetensors", "README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    fetch_model(tmp_path)
    wanted = {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    wanted |= {f"model-0000{index}-of-00002.safetensors" for index in (1, 2)}
    assert hub.downloaded() == wanted
    assert {path.name for path in (tmp_path / "work/source/model").iterdir()} == wanted


def test_an_archive_of_bitmasks_becomes_the_weights_that_it_stands_for(hub: Hub, tmp_path: Path) -> None:
    repository = hub.repositories["models/org/archive"] = Repository(write_llama(tmp_path / "archive"), commit="a" * 40)
    single = repository.folder / "model.safetensors"
    tensors = load_file(single)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][tensors[name] < 0] = 0
    bits = np.packbits(tensors[name] != 0, axis=1, bitorder="little")
    stored = {**tensors, f"{name}_bitmask": bits, f"{name}_values": tensors[name][tensors[name] != 0]}
    del stored[name]
    single.unlink()
    save_file(stored, repository.folder / "sparse.safetensors")
    facts = inspect("org/archive")
    assert facts.source_format == "sparse-bitmask"
    assert facts.num_parameters == sum(tensor.size for tensor in tensors.values())
    assert facts.parameter_bytes == sum(tensor.nbytes for tensor in stored.values())
    fetch_model(tmp_path, "org/archive")
    fetched = tmp_path / "work/source/model"
    assert [path.name for path in fetched.glob("*safetensors*")] == ["model.safetensors"]
    found = load_file(fetched / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[key], tensors[key]) for key in tensors)


def fetch_model(tmp_path: Path, model_id: str = "org/tiny") -> dict[str, object]:
    work = tmp_path / "work"
    (work / "source").mkdir(parents=True, exist_ok=True)
    request = {
        "model": {"id": model_id, "revision": "main"},
        "recipe": {"stages": [{"technique": "round_to_nearest"}]},
        "model_roots": [],
    }
    events: list[dict[str, object]] = []
    fetch(work, request, events.append)
    return events[0]


def test_a_fetched_model_is_real_files_of_one_commit(hub: Hub, tmp_path: Path) -> None:
    resolved = fetch_model(tmp_path)
    repository = hub.repositories["models/org/tiny"]
    assert resolved["revision"] == repository.commit
    for path in (tmp_path / "work/source/model").iterdir():
        assert not path.is_symlink()
        assert path.read_bytes() == (repository.folder / path.name).read_bytes()
    resolves = [path for _, path, _ in hub.requests if "/resolve/" in path]
    assert resolves
    assert all(f"/resolve/{repository.commit}/" in path for path in resolves)


def test_what_is_not_there_is_told_apart(hub: Hub) -> None:
    assert refused("org/nothing") == ("model_not_found", "model.id")
    assert refused("org/tiny", "no-such-branch") == ("revision_not_found", "model.revision")
    hub.repositories["models/org/tiny"].private = True
    assert refused() == ("model_not_found", "model.id")
    hub.repositories["models/org/tiny"].private = False
    hub.repositories["models/org/tiny"].gated = True
    assert refused() == ("model_gated", "model.id")


def test_a_token_opens_what_is_gated_or_private(hub: Hub) -> None:
    hub.repositories["models/org/tiny"].gated = True
    hub.repositories["models/org/tiny"].private = True
    assert inspect(token=TOKEN).revision


def test_a_repository_of_pickles_is_refused(hub: Hub) -> None:
    for path in hub.repositories["models/org/tiny"].folder.glob("model*"):
        path.unlink()
    (hub.repositories["models/org/tiny"].folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert refused() == ("pickle_only_model", "model.id")
    assert hub.downloaded() == {"config.json"}


def test_a_hub_that_is_down_or_talks_nonsense_is_no_fault_of_the_user(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for lies in ({"status": 500}, {"status": 503}, {"status": 429}):
        hub.repositories["models/org/tiny"].lies = dict(lies)
        with pytest.raises(InfrastructureError, match="hub"):
            inspect()
    hub.repositories["models/org/tiny"] = Repository(hub.repositories["models/org/tiny"].folder, commit="HEAD")
    assert refused() == ("hub_unreachable", None)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        assert refused() == ("hub_unreachable", None)


def test_a_server_that_ignores_ranges_cannot_make_us_read_everything(hub: Hub) -> None:
    repository = hub.repositories["models/org/tiny"]
    repository.lies = {"no ranges": True}
    snapshot = open_snapshot("org/tiny", None, token=None, timeout_seconds=5)
    assert snapshot.read("config.json", 0, 5) == (repository.folder / "config.json").read_bytes()[:5]
    with pytest.raises(InfrastructureError, match="ranges"):
        snapshot.read("config.json", 1, 5)


def test_a_file_that_arrives_changed_is_not_used(hub: Hub, tmp_path: Path) -> None:
    repository = hub.repositories["models/org/tiny"]
    name = "model-00001-of-00002.safetensors"
    content = bytearray((repository.folder / name).read_bytes())
    content[-1] ^= 1
    repository.lies = {name: bytes(content)}
    with pytest.raises(InfrastructureError, match="did not arrive"):
        fetch_model(tmp_path)


def test_a_hub_that_fails_between_inspection_and_download_is_tried_again_later(hub: Hub, tmp_path: Path) -> None:
    snapshot = open_snapshot("org/tiny", None, token=None, timeout_seconds=5)
    # 501, because the library itself tries 500 again for half a minute.
    hub.repositories["models/org/tiny"].lies = {"status": 501}
    with pytest.raises(InfrastructureError):
        snapshot.download(["config.json"], tmp_path / "to")


@pytest.fixture
def dataset(hub: Hub, tmp_path: Path) -> Repository:
    folder = tmp_path / "dataset"
    (folder / "data").mkdir(parents=True)
    for split, num_rows in (("train", 30), ("test", 3)):
        rows = [{"text": f"{split} row {index}", "body": "other"} for index in range(num_rows)]
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hub.repositories["datasets/org/rows"] = Repository(folder, commit="d" * 40)
    return hub.repositories["datasets/org/rows"]


def read_rows(hub: Hub, tmp_path: Path, name: str) -> subprocess.CompletedProcess[str]:
    """The first texts of a dataset: in a process of its own, as datasets reads HF_ENDPOINT when it is imported."""
    program = (
        "import itertools, json, sys\nfrom workers.errors import JobError\n"
        "from workers.sources.datasets import load_documents\n"
        "try:\n    print(json.dumps([d.text for d in itertools.islice(load_documents(sys.argv[1], 'text', []), 5)]))\n"
        "except JobError as error:\n    print(json.dumps(error.to_dict()))\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    return subprocess.run(
        [sys.executable, "-c", program, name], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("name", "first"),
    [("hub:org/rows", "train row 0"), ("hub:org/rows:test", "test row 0"), ("hub:org/rows:default:test", "test row 0")],
)
def test_rows_of_a_hub_dataset_are_streamed(
    hub: Hub, dataset: Repository, tmp_path: Path, name: str, first: str
) -> None:
    done = read_rows(hub, tmp_path, name)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0] == first


def test_a_split_that_is_not_there_is_named_with_those_that_are(hub: Hub, dataset: Repository, tmp_path: Path) -> None:
    done = read_rows(hub, tmp_path, "hub:org/rows:validation")
    error = json.loads(done.stdout)
    assert error["code"] == "invalid_dataset"
    assert "train" in error["hint"]


def test_a_dataset_cannot_make_the_worker_read_its_own_files(hub: Hub, dataset: Repository, tmp_path: Path) -> None:
    secret = tmp_path / "secret.jsonl"
    secret.write_text('{"text": "secret"}\n')
    for pattern in (str(secret), f"../../../../{secret}"):
        metadata = f"---\nconfigs:\n- config_name: default\n  data_files: {json.dumps(pattern)}\n---\n"
        (dataset.folder / "README.md").write_text(metadata)
        done = read_rows(hub, tmp_path, "hub:org/rows")
        assert "secret" not in done.stdout.replace(str(secret), "")
        assert json.loads(done.stdout)["blame"] == "user", (pattern, done.stdout, done.stderr)


def test_a_folder_with_the_name_of_a_dataset_is_not_taken_for_it(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "local").mkdir(parents=True)
    (tmp_path / "org" / "local" / "train.jsonl").write_text('{"text": "secret"}\n')
    hub.repositories["datasets/org/local"] = Repository(tmp_path / "tiny", commit="e" * 40)
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    monkeypatch.chdir(tmp_path)
    done = read_rows(hub, tmp_path, "hub:org/local")
    assert "secret" not in done.stdout
    assert json.loads(done.stdout)["blame"] == "user"


def test_a_dataset_is_looked_for_before_anything_is_queued(hub: Hub, dataset: Repository) -> None:
    check_dataset("hub:org/rows:train", "recipe.calibration.dataset", [], timeout_seconds=5)
    with pytest.raises(UserError) as caught:
        check_dataset("hub:org/nothing", "recipe.calibration.dataset", [], timeout_seconds=5)
    assert (caught.value.code, caught.value.param) == ("dataset_not_found", "recipe.calibration.dataset")
