"""What the description in a config.json may say, and what the loader makes of damaged files."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.models import write_tiny_llama
from workers.architectures import ARCHITECTURES
from workers.architectures.compact import Compact, compact_of, problem_of
from workers.formats.load_compact import WEIGHTS_INDEX, load_model, weight_files

CONFIG = {"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128}
ROW = ARCHITECTURES["llama", "causal"]
DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    "entry",
    [
        {"low_rank": {DOWN: 12}},
        {"shared": {"model.layers.2": "model.layers.0"}},
        {"low_rank": {DOWN: 1}, "shared": {"model.layers.2": "model.layers.1"}},
    ],
)
def test_a_sound_description_is_taken(entry: dict[str, Any]) -> None:
    assert problem_of(ROW, {**CONFIG, "attar": entry}) is None


@pytest.mark.parametrize(
    "entry",
    [
        [],
        {},
        None,
        {"low_rank": {}, "shared": {}},
        {"ranks": {}},
        {"low_rank": {"model.layers.00.mlp.down_proj": 12}},
        {"low_rank": {"model.layers.0": 12}},
        {"shared": {"model.layers.1.mlp": "model.layers.0.mlp"}},
        {"low_rank": [DOWN]},
        {"low_rank": {DOWN: 0}},
        {"low_rank": {DOWN: 10**9}},
        {"low_rank": {DOWN: "12"}},
        {"low_rank": {DOWN: True}},
        {"low_rank": {"lm_head": 12}},
        {"low_rank": {"model.layers.3.mlp.down_proj": 12}},
        {"shared": {"model.layers.0": "model.layers.1"}},
        {"shared": {"model.layers.3": "model.layers.1"}},
        {"shared": {"model.layers.1": "model.layers.0", "model.layers.2": "model.layers.1"}},
        {"shared": {"model.layers.1": ["model.layers.0"]}},
        {"shared": {"model.layers.0": "model"}},
        {"shared": {"model.layers.1": "model.layers.0"}, "low_rank": {"model.layers.1.mlp.down_proj": 12}},
    ],
)
def test_an_unsound_description_is_refused(entry: Any) -> None:
    assert problem_of(ROW, {**CONFIG, "attar": entry})


def test_a_long_description_takes_no_long_time() -> None:
    shared = {f"model.layers.{number}": "model.layers.0" for number in range(1, 50_000)}
    begin = time.process_time()
    assert problem_of(ROW, {**CONFIG, "num_hidden_layers": 2**24, "attar": {"shared": shared}}) is None
    assert time.process_time() - begin < 2


@pytest.mark.parametrize(
    "entry",
    [
        [],
        "low_rank",
        {"low_rank": [DOWN]},
        {"low_rank": {DOWN: "12"}},
        {"low_rank": {DOWN: 0}},
        {"low_rank": {DOWN: 1000}},
        {"low_rank": {"model.layers.7.mlp.down_proj": 4}},
        {"low_rank": {"model.norm": 4}},
        {"shared": {"model.layers.1": None}},
        {"shared": {"model.layers.1": "model.layers.9"}},
        {"shared": {"model.layers.1": "model.norm"}},
    ],
)
def test_the_loader_says_what_is_wrong_with_a_description(entry: Any, tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "compact.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attar": entry}))
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(tmp_path)


def test_factors_stand_in_the_groups_of_their_layers() -> None:
    compact = Compact({"model.layers.0.self_attn.k_proj": 4, DOWN: 4})
    assert compact.groups(ROW, "model.layers.0") == (
        ("self_attn.q_proj", "self_attn.k_proj.in_factor", "self_attn.v_proj"),
        ("self_attn.k_proj.out_factor",),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj.in_factor",),
        ("mlp.down_proj.out_factor",),
    )
    assert compact.groups(ROW, "model.layers.1") == ROW.linear_groups


def test_what_makes_the_input_of_a_factor() -> None:
    compact = Compact({"model.layers.0.mlp.up_proj": 4, DOWN: 4})

    def name(*group: str) -> str | None:
        found = compact.producer(ROW, "model.layers.0", group, {})
        return None if found is None else found.name

    assert name("mlp.down_proj.out_factor") == "mlp.down_proj.in_factor"
    assert name("mlp.down_proj.in_factor") == "mlp.up_proj.out_factor"
    assert name("mlp.gate_proj", "mlp.up_proj.in_factor") == "post_attention_layernorm"
    assert name("self_attn.o_proj") is None


def test_a_shared_block_reads_what_is_stored_for_its_source() -> None:
    compact = compact_of({"attar": {"shared": {"model.layers.1": "model.layers.0"}}})
    assert compact.source_of("model.layers.1.mlp.up_proj.weight", "model.layers") == "model.layers.0.mlp.up_proj.weight"
    assert compact.source_of("model.layers.1", "model.layers") == "model.layers.0"
    assert compact.source_of("model.layers.11.mlp", "model.layers") == "model.layers.11.mlp"
    assert compact.source_of("model.norm.weight", "model.layers") == "model.norm.weight"


@pytest.mark.parametrize("name", ["../other.safetensors", "sub/one.safetensors", "weights.bin", "gone.safetensors", 3])
def test_an_index_that_names_no_file_of_the_folder_is_refused(name: Any, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS_INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=r"which is no file|is missing"):
        weight_files(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither"):
        weight_files(tmp_path)
    (tmp_path / WEIGHTS_INDEX).write_text("[]")
    with pytest.raises(ValueError, match="weight_map"):
        weight_files(tmp_path)
