"""What preflight says of a model, from config and headers alone."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.workers.sources.checkpoints import (
    HIDDEN,
    INTERMEDIATE,
    VOCAB,
    llama_config,
    llama_shapes,
    llama_tensors,
    write_llama,
)
from workers.errors import UserError
from workers.sources.checkpoint import ArtifactFacts
from workers.sources.facts import ModelFacts
from workers.sources.inspection import inspect_model

NUM_PARAMETERS = sum(int(np.prod(shape)) for shape in llama_shapes().values())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path


def inspect(root: Path) -> ModelFacts:
    return inspect_model("file:model", model_roots=[root])


def refused(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        inspect(root)
    assert caught.value.param == "model.id"
    assert caught.value.hint
    return caught.value.code


@pytest.mark.parametrize("shards", [1, 3])
def test_facts_come_from_headers_alone(root: Path, shards: int) -> None:
    write_llama(root / "model", shards=shards)
    facts = inspect(root)
    assert facts.model_id == "file:model"
    assert facts.revision is None
    assert facts.config["hidden_size"] == HIDDEN
    assert facts.num_parameters == NUM_PARAMETERS
    assert facts.parameter_bytes == 2 * NUM_PARAMETERS
    assert facts.linear_in_features == (HIDDEN, INTERMEDIATE)
    assert facts.source_file_bytes == sum(path.stat().st_size for path in (root / "model").glob("*.safetensors"))
    assert len([name for name, _ in facts.files if name.endswith(".safetensors")]) == shards


def test_facts_survive_json(root: Path) -> None:
    write_llama(root / "model")
    facts = inspect(root)
    assert ModelFacts.from_dict(json.loads(json.dumps(facts.to_dict()))) == facts


def test_files_that_no_loader_needs_are_not_part_of_a_model(root: Path) -> None:
    folder = write_llama(root / "model")
    for name in (
        "modeling_evil.py",
        "adapter_config.json",
        "adapter_model.safetensors",
        "training_args.bin",
        "README.md",
    ):
        (folder / name).write_text("{}")
    assert {name for name, _ in inspect(root).files} == {"config.json", "tokenizer.json", "model.safetensors"}


def test_settings_that_make_loaders_run_code_are_dropped(root: Path) -> None:
    harmful: dict[str, Any] = {
        "auto_map": {"AutoModel": "modeling_evil.Evil"},
        "_attn_implementation": "org/kernel",
        "x_file": "/etc",
    }
    write_llama(root / "model", **harmful, text_config={"auto_map": {}, "kept": 1})
    config = inspect(root).config
    assert not harmful.keys() & config.keys()
    assert config["text_config"] == {"kept": 1}


def edit_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(llama_config(**changes)))


def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray[Any, Any]]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def as_int8(tensors: dict[str, np.ndarray[Any, Any]], name: str) -> None:
    tensors[name] = tensors[name].astype(np.int8)


# What an NF4 result says: its headers do not tell the widths of its layers.
NF4_CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BREAKAGES: list[tuple[str, Callable[[Path], object]]] = [
    ("config_missing", lambda folder: (folder / "config.json").unlink()),
    ("invalid_config", lambda folder: (folder / "config.json").write_text("{")),
    ("invalid_config", lambda folder: (folder / "config.json").write_text("[1]")),
    ("invalid_config", lambda folder: (folder / "config.json").write_text("\ufeff{}", encoding="utf-8")),
    ("invalid_config", lambda folder: (folder / "config.json").write_text("[" * 100_000)),
    ("invalid_config", lambda folder: (folder / "config.json").write_text('{"a":' * 600 + "1" + "}" * 600)),
    ("invalid_config", lambda folder: (folder / "config.json").write_text("{}")),
    ("invalid_config", lambda folder: (folder / "config.json").write_bytes(b" " * 5_000_000 + b"{}")),
    ("invalid_config", lambda folder: edit_config(folder, note="\ud800")),
    ("invalid_config", lambda folder: edit_config(folder, architectures=[1])),
    ("invalid_config", lambda folder: edit_config(folder, num_hidden_layers=10**9)),
    ("invalid_config", lambda folder: edit_config(folder, num_hidden_layers=3)),
    ("invalid_config", lambda folder: edit_config(folder, max_position_embeddings=-5)),
    ("invalid_config", lambda folder: edit_config(folder, sliding_window=0)),
    ("invalid_config", lambda folder: edit_config(folder, dtype="int8")),
    ("invalid_config", lambda folder: edit_config(folder, dtype=7)),
    ("invalid_config", lambda folder: edit_config(folder, num_labels=10**8)),
    ("invalid_config", lambda folder: edit_tensors(folder, lambda tensors: as_int8(tensors, "model.norm.weight"))),
    ("invalid_config", lambda folder: edit_config(folder, quantization_config={"quant_method": "compressed-tensors"})),
    ("unsupported_quantization", lambda folder: edit_config(folder, quantization_config=NF4_CONFIG)),
    ("invalid_config", lambda folder: edit_config(folder, hidden_size="32")),
    ("invalid_config", lambda folder: edit_config(folder, vocab_size=VOCAB + 1)),
    ("unsupported_quantization", lambda folder: edit_config(folder, quantization_config={"quant_method": "gptq"})),
    ("unsupported_quantization", lambda folder: edit_config(folder, quantization_config=[])),
    ("tokenizer_missing", lambda folder: (folder / "tokenizer.json").unlink()),
    ("weights_missing", lambda folder: (folder / "model.safetensors").unlink()),
    ("weights_missing", lambda folder: edit_tensors(folder, dict.clear)),
    ("weights_missing", lambda folder: edit_tensors(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))),
    ("weights_missing", lambda folder: edit_config(folder, tie_word_embeddings=False)),
    ("pickle_only_model", lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin")),
    (
        "invalid_safetensors",
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100]),
    ),
]


@pytest.mark.parametrize(("code", "damage"), BREAKAGES, ids=[f"{n}-{code}" for n, (code, _) in enumerate(BREAKAGES)])
def test_each_kind_of_damage_has_its_code(root: Path, code: str, damage: Callable[[Path], object]) -> None:
    damage(write_llama(root / "model"))
    assert refused(root) == code


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    change(index["weight_map"])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "shard", ["../other/model.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", "", 1, None, "\x00"]
)
def test_an_index_cannot_name_files_elsewhere(root: Path, shard: object) -> None:
    folder = write_llama(root / "model", shards=2)
    write_llama(root / "other")
    edit_index(folder, lambda weight_map: weight_map.update({"model.norm.weight": shard}))
    assert refused(root) == "invalid_safetensors"


def test_an_index_has_to_agree_with_its_shards(root: Path) -> None:
    folder = write_llama(root / "model", shards=2)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    edit_index(folder, lambda weight_map: weight_map.update(dict.fromkeys(weight_map, shards[0])))
    assert refused(root) == "invalid_safetensors"


def test_an_index_cannot_announce_tensors_that_are_not_there(root: Path) -> None:
    folder = write_llama(root / "model", shards=2)
    edit_index(folder, lambda weight_map: weight_map.update({"ghost": next(iter(weight_map.values()))}))
    assert refused(root) == "invalid_safetensors"


def test_a_tensor_in_two_shards_is_refused(root: Path) -> None:
    folder = write_llama(root / "model", shards=2)
    for path in folder.glob("*.safetensors"):
        save_file({**load_file(path), "extra": np.zeros(1, np.float16)}, path)
    assert refused(root) == "invalid_safetensors"


def test_a_missing_shard_is_named(root: Path) -> None:
    folder = write_llama(root / "model", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert refused(root) == "weights_missing"


def test_an_architecture_that_is_not_in_the_table_is_left_to_preflight(root: Path) -> None:
    write_llama(root / "model", model_type="bert", architectures=["BertModel"])
    assert inspect(root).linear_in_features == ()


def test_a_folder_with_several_gguf_files_needs_one_to_be_named(root: Path) -> None:
    (root / "model").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (root / "model" / name).write_bytes(b"GGUF")
    assert refused(root) == "several_gguf_files"


def test_an_earlier_compressed_tensors_result_is_counted_in_weights(root: Path) -> None:
    folder = write_llama(root / "model")
    group = {"targets": ["Linear"], "weights": {"num_bits": 4}}
    edit_config(folder, quantization_config={"quant_method": "compressed-tensors", "config_groups": {"group_0": group}})

    def pack(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            rows, columns = tensors.pop(name).shape
            tensors[f"{name}_packed"] = np.zeros((rows, columns // 8), np.int32)
            tensors[f"{name}_scale"] = np.zeros((rows, columns // 16), np.float16)
            tensors[f"{name}_shape"] = np.array([rows, columns], np.int64)

    edit_tensors(folder, pack)
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    artifact = ArtifactFacts(
        {name: len(data) for name, data in content.items()},
        lambda path, start, length: content[path][start : start + length],
    )
    facts = inspect_model("job:job_01JZZZZZZZZZZZZZZZZZZZZZZZ", artifact=artifact)
    assert facts.num_parameters == NUM_PARAMETERS
    assert facts.linear_in_features == (HIDDEN, INTERMEDIATE)
    assert facts.parameter_bytes < NUM_PARAMETERS * 2


def test_a_job_without_an_artifact_is_no_source() -> None:
    with pytest.raises(UserError) as caught:
        inspect_model("job:job_01JZZZZZZZZZZZZZZZZZZZZZZZ")
    assert caught.value.code == "model_not_found"


def test_a_tensor_kept_in_another_precision_counts_at_its_own(root: Path) -> None:
    folder = write_llama(root / "model")
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": np.ones(HIDDEN, np.float32)}))
    assert inspect(root).parameter_bytes == sum(tensor.nbytes for tensor in llama_tensors().values()) + 2 * HIDDEN


def test_a_config_that_claims_millions_of_blocks_is_refused_at_once(root: Path) -> None:
    write_llama(root / "model")
    edit_config(root / "model", num_hidden_layers=2**24)
    tracemalloc.start()
    with pytest.raises(UserError, match="16777216"):
        inspect(root)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 10_000_000


def test_sources_never_import_torch() -> None:
    modules = "inspection, hub, gguf, gguf_tokenizer, datasets, texts"
    program = (
        f"from workers.sources import {modules}\nimport workers.fetch, sys\n"
        "import transformers.integrations.gguf.gguf_tokenizer_mapping\nassert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
