"""The loader that an artifact carries: run as its users run it, and shown files that nobody vouches for."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.workers.attempts import certified, compressed, fetched
from workers.errors import UserError
from workers.formats import load_sparse

HALF = {"stages": [{"technique": "wanda", "sparsity": 0.5}]}
ARCHIVE = {**HALF, "output": {"format": "sparse-bitmask"}}
WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def dense(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of the same recipe in plain safetensors."""
    return compressed(tmp_path_factory.mktemp("dense") / "work", tiny_llama, HALF).artifact


@pytest.fixture(scope="module")
def archive(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certified artifact. Nobody writes to it."""
    return certified(tmp_path_factory.mktemp("archive") / "work", tiny_llama, ARCHIVE).artifact


@pytest.fixture
def copy(archive: Path, tmp_path: Path) -> Path:
    """One to be damaged."""
    shutil.copytree(archive, tmp_path / "roots" / "archive")
    return tmp_path / "roots" / "archive"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-I", *arguments], capture_output=True, text=True, check=False)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def test_certification_leaves_nothing_of_its_own_in_the_artifact(tiny_llama: Path, tmp_path: Path) -> None:
    artifact = certified(tmp_path / "work", tiny_llama, ARCHIVE).artifact
    assert [path.name for path in artifact.iterdir() if path.is_dir()] == []


def test_an_archive_is_smaller_and_its_report_says_both_sizes(archive: Path, dense: Path, tiny_llama: Path) -> None:
    size = json.loads((archive / "report.json").read_text())["size"]
    stored = sum(path.stat().st_size for path in archive.glob("*.safetensors"))
    plain = load_file(dense / "model.safetensors").values()
    assert size["artifact_bytes"] == stored < size["original_bytes"]
    assert size["dense_bytes"] == sum(tensor.nbytes for tensor in plain)
    card = (archive / "README.md").read_text()
    assert "from load_sparse import load_model" in card
    assert f"{size['dense_bytes']:,}" in card


def test_the_command_writes_the_dense_checkpoint_without_attar_or_torch(
    archive: Path, dense: Path, tmp_path: Path
) -> None:
    done = python(str(archive / "load_sparse.py"), str(archive), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert equal(load_file(tmp_path / "out" / "model.safetensors"), load_file(dense / "model.safetensors"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in dense.iterdir()}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    program = (
        f"import sys; sys.path.insert(0, {str(archive)!r}); import load_sparse\n"
        f"load_sparse.write_dense({str(archive)!r}, {str(tmp_path / 'again')!r})\n"
        "assert not {'torch', 'transformers', 'workers'} & sys.modules.keys()"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    assert python(str(archive / "load_sparse.py"), str(archive), str(tmp_path / "out")).returncode == 1


def test_the_snippet_of_the_model_card_runs(archive: Path) -> None:
    snippet = json.loads((archive / "report.json").read_text())["load_snippet"].replace(
        "path/to/artifact", str(archive)
    )
    done = python("-c", snippet + "\nassert 'workers' not in sys.modules")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Hello")


def test_the_opened_model_is_the_dense_one_in_the_type_that_is_asked_for(archive: Path, dense: Path) -> None:
    ids = torch.arange(20).unsqueeze(0)
    plain: Any = AutoModelForCausalLM.from_pretrained(dense)
    opened = load_sparse.load_model(archive)
    assert opened.dtype == plain.dtype == torch.bfloat16
    assert opened.generation_config.to_dict() == plain.generation_config.to_dict()
    with torch.inference_mode():
        assert torch.equal(opened(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert load_sparse.load_model(archive, dtype=torch.float32).dtype == torch.float32


def test_plain_transformers_refuses_the_archive(archive: Path) -> None:
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(archive)


def test_many_weights_become_shards_that_transformers_reads(archive: Path, dense: Path, tmp_path: Path) -> None:
    tensors = load_sparse.read_tensors(archive)
    load_sparse.write_dense_weights(tensors, tmp_path, largest_bytes=40_000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 60_000 for path in shards)
    shutil.copy(archive / "config.json", tmp_path)
    one: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    other: Any = AutoModelForCausalLM.from_pretrained(dense)
    assert equal(one.state_dict(), other.state_dict())


def test_an_archive_in_several_files_is_one_model(copy: Path, dense: Path, tmp_path: Path) -> None:
    split(copy)
    load_sparse.write_dense(copy, tmp_path / "out")
    assert equal(load_file(tmp_path / "out" / "model.safetensors"), load_file(dense / "model.safetensors"))


def split(folder: Path) -> None:
    """Make two files of one, each weight's bitmask in another than its values."""
    tensors = load_file(folder / "sparse.safetensors")
    (folder / "sparse.safetensors").unlink()
    file_of = {name: f"sparse-0000{1 + name.endswith('_bitmask')}-of-00002.safetensors" for name in tensors}
    for file in set(file_of.values()):
        save_file({name: tensors[name] for name in tensors if file_of[name] == file}, folder / file)
    (folder / "sparse.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))


def changed(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "sparse.safetensors")
        change(tensors)
        save_file(tensors, folder / "sparse.safetensors", {"format": "pt"})

    return damage


def flip_a_bit(tensors: dict[str, torch.Tensor]) -> None:
    tensors[WEIGHT + "_bitmask"][0, 0] ^= 1


def truncate(folder: Path) -> None:
    content = (folder / "sparse.safetensors").read_bytes()
    (folder / "sparse.safetensors").write_bytes(content[:-1])


def overstate_the_header(folder: Path) -> None:
    content = (folder / "sparse.safetensors").read_bytes()
    (folder / "sparse.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + content[8:])


def lie_about_offsets(folder: Path) -> None:
    path = folder / "sparse.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    entry = header[WEIGHT + "_values"]
    entry["data_offsets"] = [offset + 2 for offset in entry["data_offsets"]]
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])


def name_a_file_outside(folder: Path) -> None:
    split(folder)
    path = folder / "sparse.safetensors.index.json"
    path.write_text(path.read_text().replace("sparse-00001", "../sparse-00001"))


def lose_a_shard(folder: Path) -> None:
    split(folder)
    (folder / "sparse-00002-of-00002.safetensors").unlink()


DAMAGES = [
    (changed(flip_a_bit), "bits set"),
    (changed(lambda tensors: tensors.pop(WEIGHT + "_values")), "values"),
    (changed(lambda tensors: tensors.pop(WEIGHT + "_bitmask")), "bitmask"),
    (changed(lambda tensors: tensors.update({WEIGHT: torch.zeros(128, 64)})), "values of its own"),
    (changed(lambda tensors: tensors.update({WEIGHT + "_values": torch.zeros(128 * 64 + 1)})), "places"),
    (changed(lambda tensors: tensors.update({WEIGHT + "_bitmask": torch.zeros(1024, dtype=torch.uint8)})), "matrix"),
    (changed(lambda tensors: tensors.update({WEIGHT + "_values": torch.zeros(4, dtype=torch.uint8)})), "floating"),
    (truncate, "bytes"),
    (overstate_the_header, "cut off"),
    (lie_about_offsets, "overlap or leave holes"),
    (name_a_file_outside, "no file of this folder"),
    (lose_a_shard, "missing"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_damaged_archive_is_refused_by_name(
    damage: Callable[[Path], None], message: str, copy: Path, tmp_path: Path
) -> None:
    damage(copy)
    with pytest.raises(ValueError, match=message):
        load_sparse.write_dense(copy, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["roots"]
    with pytest.raises(ValueError, match=message):
        load_sparse.load_model(copy)
    with pytest.raises(UserError) as caught:
        fetched(tmp_path / "work", copy, HALF)
    assert caught.value.code in ("invalid_safetensors", "weights_missing")
    assert caught.value.param == "model.id"


def test_a_missing_weight_is_not_made_up(copy: Path) -> None:
    changed(lambda tensors: tensors.pop("model.norm.weight"))(copy)
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        load_sparse.load_model(copy)


def test_a_further_job_starts_from_the_weights_that_an_archive_stands_for(
    copy: Path, dense: Path, archive: Path, tmp_path: Path
) -> None:
    split(copy)
    quantized = {"stages": [{"technique": "gptq", "group_size": 32}]}
    (tmp_path / "plain").mkdir()
    shutil.copytree(dense, tmp_path / "plain" / "dense")
    from_archive = certified(tmp_path / "first", copy, quantized)
    from_dense = compressed(tmp_path / "second", tmp_path / "plain" / "dense", quantized)
    assert equal(
        load_file(from_archive.artifact / "model.safetensors"), load_file(from_dense.artifact / "model.safetensors")
    )
    size = from_archive.report["size"]
    assert size["original_format"] == "sparse-bitmask"
    stored = [tensor for path in copy.glob("*.safetensors") for tensor in load_file(path).values()]
    assert size["original_bytes"] == sum(tensor.nbytes for tensor in stored)
    assert size["original_parameters"] == sum(
        tensor.numel() for tensor in load_file(dense / "model.safetensors").values()
    )
    left = {path.name for path in (from_archive.work / "source" / "model").glob("*safetensors*")}
    assert left == {"model.safetensors"}


def test_more_sparsity_makes_an_archive_of_an_archive(archive: Path, copy: Path, tmp_path: Path) -> None:
    more = {"stages": [{"technique": "magnitude", "sparsity": 0.8}], "output": {"format": "sparse-bitmask"}}
    again = certified(tmp_path / "again", copy, more)
    assert again.outcome["result"]["compression_ratio"] > 1
    assert again.report["stages"][0]["metrics"]["sparsity"] == pytest.approx(0.8, abs=1e-3)


def test_an_archive_that_is_no_smaller_fails_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    barely = {"stages": [{"technique": "magnitude", "sparsity": 0.02}], "output": {"format": "sparse-bitmask"}}
    with pytest.raises(UserError) as caught:
        certified(tmp_path / "work", tiny_llama, barely)
    assert (caught.value.code, caught.value.param) == ("not_smaller", "recipe.output.format")
