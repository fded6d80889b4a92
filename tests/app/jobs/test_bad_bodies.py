"""Bodies that are refused: with which code and which field; nothing of them is queued or left on disk."""

import time
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.settings import Settings
from tests.app.jobs.refusals import GPTQ, Refused
from workers.techniques import TECHNIQUES

pytestmark = pytest.mark.usefixtures("nothing_happens")

NF4 = {"technique": "round_to_nearest", "scheme": "NF4"}
PRUNING = {"technique": "magnitude"}
TWO_OF_FOUR = {"technique": "gradual_pruning", "num_steps": 1, "mask_structure": "2:4"}
MIXED = {"technique": "mixed_precision", "group_size": 32}
DEPTH = {"technique": "depth_pruning"}
WIDTH = {"technique": "width_pruning"}
# 48 channels, 32 columns of heads and 96 neurons are left of 64, 64 and 128.
NARROW = {**WIDTH, "hidden_size": 48, "num_key_value_heads": 1, "intermediate_size": 96}
TOKENS = {"technique": "vocabulary_pruning"}
DISTIL = {"technique": "logit_distillation", "synthetic": {"num_samples": 8}}
MAMBA = {"model_type": "mamba", "num_layers": 1, "hidden_size": 64}
WINDOW = {"technique": "sliding_window"}
TUNING = {"technique": "fine_tuning"}


def rounds(*stages: dict[str, Any]) -> dict[str, Any]:
    return {"technique": "iterate", "stages": list(stages)}


@pytest.mark.parametrize(
    ("stages", "code", "param"),
    [
        ([{"technique": "gtpq"}], "unknown_technique", "recipe.stages[0].technique"),
        ([PRUNING, {"technique": 1}], "unknown_technique", "recipe.stages[1].technique"),
        ([{"group_size": 64}], "missing_field", "recipe.stages[0].technique"),
        ([{"technique": ["gptq"]}], "unknown_technique", "recipe.stages[0].technique"),
        ([{**GPTQ, "ignore": ["x" * 201]}], "invalid_value", "recipe.stages[0].ignore[0]"),
        ([DEPTH], "invalid_value", "recipe.stages[0].num_blocks"),
        ([{**DEPTH, "num_blocks": 1, "fraction": 0.5}], "invalid_value", "recipe.stages[0].num_blocks"),
        ([{**DEPTH, "num_blocks": 2}], "invalid_value", "recipe.stages[0].num_blocks"),
        ([{**DEPTH, "num_blocks": 1}], "invalid_value", "recipe.stages[0].keep_first"),
        ([{**DEPTH, "fraction": 0.1, "keep_first": 0}], "invalid_value", "recipe.stages[0].fraction"),
        ([{**DEPTH, "fraction": 50}], "invalid_value", "recipe.stages[0].fraction"),
        ([{**DEPTH, "method": "list"}], "invalid_value", "recipe.stages[0].blocks"),
        ([{**DEPTH, "method": "list", "blocks": []}], "invalid_value", "recipe.stages[0].blocks"),
        ([{**DEPTH, "method": "list", "blocks": [0, 1]}], "invalid_value", "recipe.stages[0].blocks"),
        ([{**DEPTH, "method": "list", "blocks": [2]}], "invalid_value", "recipe.stages[0].blocks"),
        ([{**DEPTH, "method": "list", "blocks": [1, 1]}], "invalid_value", "recipe.stages[0].blocks"),
        ([{**DEPTH, "method": "list", "blocks": [-1]}], "invalid_value", "recipe.stages[0].blocks[0]"),
        (
            [{**DEPTH, "method": "list", "blocks": [1], "num_blocks": 1}],
            "invalid_value",
            "recipe.stages[0].num_blocks",
        ),
        ([{**DEPTH, "num_blocks": 1, "blocks": [1]}], "invalid_value", "recipe.stages[0].blocks"),
        (
            [{**DEPTH, "num_blocks": 1, "keep_first": 0}, {**DEPTH, "num_blocks": 1, "keep_first": 0, "keep_last": 0}],
            "invalid_value",
            "recipe.stages[1].technique",
        ),
        ([{**TOKENS, "min_count": 0}], "invalid_value", "recipe.stages[0].min_count"),
        ([{**TOKENS, "num_tokens": 0}], "invalid_value", "recipe.stages[0].num_tokens"),
        ([{**TOKENS, "num_tokens": 300, "multiple_of": 64}], "invalid_value", "recipe.stages[0].num_tokens"),
        ([{**TOKENS, "keep": [""]}], "invalid_value", "recipe.stages[0].keep[0]"),
        ([PRUNING, TOKENS], "stages_conflict", "recipe.stages[1].technique"),
        ([{"technique": "tie_embeddings", "keep": "both"}], "invalid_value", "recipe.stages[0].keep"),
        ([{"technique": "tie_embeddings"}], "nothing_changed", "recipe.stages[0].technique"),
        ([{"technique": "low_rank", "rank": 8, "ratio": 0.5}], "invalid_value", "recipe.stages[0].ratio"),
        ([{"technique": "low_rank", "rank": 10_000}], "nothing_changed", "recipe.stages[0].rank"),
        (
            [{"technique": "low_rank", "energy": 0.5, "multiple_of": 4096}],
            "nothing_changed",
            "recipe.stages[0].multiple_of",
        ),
        ([PRUNING, {"technique": "low_rank", "rank": 8}], "stages_conflict", "recipe.stages[1].technique"),
        ([{"technique": "share_layers", "groups": [[0, 2]]}], "invalid_value", "recipe.stages[0].groups"),
        (
            [{"technique": "share_layers", "group_size": 2}, {"technique": "gptq"}],
            "stages_conflict",
            "recipe.stages[1].technique",
        ),
        ([PRUNING, {**DEPTH, "num_blocks": 1}], "stages_conflict", "recipe.stages[1].technique"),
        ([WIDTH], "invalid_value", "recipe.stages[0].intermediate_size"),
        (
            [{**WIDTH, "intermediate_size": 64, "keep_intermediate": 0.5}],
            "invalid_value",
            "recipe.stages[0].keep_intermediate",
        ),
        ([{**WIDTH, "num_key_value_heads": 1, "keep_heads": 0.5}], "invalid_value", "recipe.stages[0].keep_heads"),
        ([{**WIDTH, "hidden_size": 32, "keep_hidden": 0.5}], "invalid_value", "recipe.stages[0].keep_hidden"),
        ([{**WIDTH, "intermediate_size": 0}], "invalid_value", "recipe.stages[0].intermediate_size"),
        ([{**WIDTH, "keep_hidden": 1.0}], "invalid_value", "recipe.stages[0].keep_hidden"),
        ([{**WIDTH, "intermediate_size": 64, "multiple_of": 8}], "invalid_value", "recipe.stages[0].multiple_of"),
        ([{**WIDTH, "intermediate_size": 128}], "invalid_value", "recipe.stages[0].intermediate_size"),
        ([{**WIDTH, "num_key_value_heads": 3}], "invalid_value", "recipe.stages[0].num_key_value_heads"),
        ([{**WIDTH, "hidden_size": 50}], "invalid_value", "recipe.stages[0].hidden_size"),
        ([NARROW, NARROW], "invalid_value", "recipe.stages[1].intermediate_size"),
        ([PRUNING, NARROW], "stages_conflict", "recipe.stages[1].technique"),
        ([NARROW, GPTQ], "group_size_fits_no_layer", "recipe.stages[1].group_size"),
        (
            [NARROW, {**GPTQ, "group_size": 32, "embeddings": True}],
            "group_size_fits_not_all",
            "recipe.stages[1].group_size",
        ),
        (
            [NARROW, {**PRUNING, "mask_structure": "2:64"}],
            "mask_structure_fits_no_layer",
            "recipe.stages[1].mask_structure",
        ),
        ([{**DISTIL, "student": {}}], "invalid_value", "recipe.stages[0].student.num_layers"),
        ([{**DISTIL, "student": {"num_heads": 8}}], "invalid_value", "recipe.stages[0].student.num_heads"),
        ([{**DISTIL, "student": {"num_heads": 3}}], "invalid_value", "recipe.stages[0].student.num_heads"),
        ([{**DISTIL, "student": {"hidden_size": 30}}], "invalid_value", "recipe.stages[0].student.hidden_size"),
        (
            [{**DISTIL, "student": {**MAMBA, "num_layers": 50}}],
            "invalid_value",
            "recipe.stages[0].student.hidden_size",
        ),
        ([{**DISTIL, "student": {"model_type": "rwkv"}}], "invalid_value", "recipe.stages[0].student.model_type"),
        ([{**DISTIL, "student": {**MAMBA, "heads": 2}}], "unknown_field", "recipe.stages[0].student.heads"),
        ([PRUNING, {**DISTIL, "student": MAMBA}], "stages_conflict", "recipe.stages[1].student"),
        ([{**DISTIL, "student": MAMBA}, NARROW], "unsupported_architecture", "recipe.stages[1].technique"),
        (
            [{**DISTIL, "student": MAMBA}, {**GPTQ, "group_size": 32}],
            "output_format_impossible",
            "recipe.output.format",
        ),
        ([WINDOW], "invalid_value", "recipe.stages[0].window"),
        ([{**WINDOW, "window": 7}], "invalid_value", "recipe.stages[0].window"),
        ([{**WINDOW, "window": 512}], "invalid_value", "recipe.stages[0].window"),
        ([{**WINDOW, "window": 64.0}], "invalid_type", "recipe.stages[0].window"),
        ([{**WINDOW, "window": 64, "full_blocks": [0]}], "invalid_value", "recipe.stages[0].full_blocks"),
        ([{**WINDOW, "window": 64, "full_blocks": [1, 1]}], "invalid_value", "recipe.stages[0].full_blocks"),
        ([{**WINDOW, "window": 64}, {**WINDOW, "window": 64}], "invalid_value", "recipe.stages[1].window"),
        ([PRUNING, {**WINDOW, "window": 64}], "stages_conflict", "recipe.stages[1].technique"),
        (
            [rounds(PRUNING, {**TUNING, "learning_rate": 2.0})],
            "invalid_value",
            "recipe.stages[0].stages[1].learning_rate",
        ),
        (
            [PRUNING, rounds(PRUNING, {**TUNING, "num_steps": 1, "num_epochs": 1.0})],
            "invalid_value",
            "recipe.stages[1].stages[1].num_epochs",
        ),
        ([rounds({**DEPTH, "fraction": 0.5}, TUNING)], "invalid_value", "recipe.stages[0].stages[0].num_blocks"),
        (["gptq"], "invalid_type", "recipe.stages[0]"),
        ([], "invalid_value", "recipe.stages"),
        ([PRUNING] * 33, "invalid_value", "recipe.stages"),
        ("gptq", "invalid_type", "recipe.stages"),
        ([{**GPTQ, "groupsize": 64}], "unknown_field", "recipe.stages[0].groupsize"),
        ([{**GPTQ, "gptq": 64}], "unknown_field", "recipe.stages[0].gptq"),
        ([{**GPTQ, "group_size": "64"}], "invalid_type", "recipe.stages[0].group_size"),
        ([{**GPTQ, "group_size": 64.0}], "invalid_type", "recipe.stages[0].group_size"),
        ([{**GPTQ, "group_size": 0}], "invalid_value", "recipe.stages[0].group_size"),
        ([{**GPTQ, "group_size": 10**30}], "invalid_value", "recipe.stages[0].group_size"),
        ([{**GPTQ, "symmetric": 1}], "invalid_type", "recipe.stages[0].symmetric"),
        ([{**GPTQ, "scheme": "W8A8"}], "invalid_value", "recipe.stages[0].group_size"),
        ([{"technique": "gptq", "scheme": "FP8"}], "invalid_value", "recipe.stages[0].scheme"),
        ([{"technique": "smoothquant", "symmetric": False}], "invalid_value", "recipe.stages[0].symmetric"),
        ([{"technique": "dynamic_int8", "embeddings": True}], "invalid_value", "recipe.stages[0].embeddings"),
        ([{**GPTQ, "symmetric_activations": True}], "invalid_value", "recipe.stages[0].symmetric_activations"),
        (
            [{"technique": "round_to_nearest", "scheme": "FP8", "symmetric_activations": True}],
            "invalid_value",
            "recipe.stages[0].symmetric_activations",
        ),
        (
            [{"technique": "round_to_nearest", "scheme": "BF16", "ignore": ["*.0.*"]}],
            "invalid_value",
            "recipe.stages[0].ignore",
        ),
        (
            [{"technique": "awq", "embeddings": True, "group_size": None, "symmetric": False}],
            "invalid_value",
            "recipe.stages[0].group_size",
        ),
        (
            [{**GPTQ, "embeddings": True, "group_size": 48}],
            "group_size_fits_no_layer",
            "recipe.stages[0].group_size",
        ),
        ([{**GPTQ, "damping": 0}], "invalid_value", "recipe.stages[0].damping"),
        ([{**GPTQ, "ignore": ["a", 1]}], "invalid_type", "recipe.stages[0].ignore[1]"),
        ([{**PRUNING, "sparsity": 1.5}], "invalid_value", "recipe.stages[0].sparsity"),
        ([{**PRUNING, "sparsity": -0.1}], "invalid_value", "recipe.stages[0].sparsity"),
        ([{**PRUNING, "mask_structure": "1٢:4٤"}], "invalid_value", "recipe.stages[0].mask_structure"),
        ([{**PRUNING, "mask_structure": 124}], "invalid_value", "recipe.stages[0].mask_structure"),  # 2:4 in YAML
        ([{**PRUNING, "mask_structure": "4:2"}], "invalid_value", "recipe.stages[0].mask_structure"),
        ([{**PRUNING, "mask_structure": "2:4", "sparsity": 0.9}], "invalid_value", "recipe.stages[0].sparsity"),
        ([{**PRUNING, "mask_structure": "2:4", "allocation": "error"}], "invalid_value", "recipe.stages[0].allocation"),
        ([{**PRUNING, "allocation": "owl"}], "invalid_value", "recipe.stages[0].allocation"),
        ([{**GPTQ, "scheme": "W9A16"}], "invalid_value", "recipe.stages[0].scheme"),
        ([{**GPTQ, "scheme": "NF4"}], "invalid_value", "recipe.stages[0].scheme"),
        ([{**NF4, "group_size": None}], "invalid_value", "recipe.stages[0].group_size"),
        ([{**NF4, "group_size": 96}], "invalid_value", "recipe.stages[0].group_size"),
        ([{**NF4, "symmetric": False}], "invalid_value", "recipe.stages[0].symmetric"),
        ([{**NF4, "embeddings": True}], "invalid_value", "recipe.stages[0].embeddings"),
        ([{**NF4, "clip_search": True}], "invalid_value", "recipe.stages[0].clip_search"),
        ([{**NF4, "scheme": "W4A16", "double_quant": True}], "invalid_value", "recipe.stages[0].double_quant"),
        ([{**NF4, "group_size": 2048}], "invalid_value", "recipe.stages[0].group_size"),
        ([{**NF4, "group_size": 1024}], "group_size_fits_no_layer", "recipe.stages[0].group_size"),
        ([{**MIXED}], "invalid_value", "recipe.stages[0].average_bits"),
        ([{**MIXED, "average_bits": 5.0, "max_size_bytes": 10**6}], "invalid_value", "recipe.stages[0].average_bits"),
        ([{**MIXED, "average_bits": 3.0}], "invalid_value", "recipe.stages[0].average_bits"),
        ([{**MIXED, "average_bits": 8.0}], "invalid_value", "recipe.stages[0].average_bits"),
        ([{**MIXED, "average_bits": 5.0, "schemes": ["W4A16"]}], "invalid_value", "recipe.stages[0].schemes"),
        ([{**MIXED, "average_bits": 5.0, "schemes": ["W4A16"] * 2}], "invalid_value", "recipe.stages[0].schemes"),
        (
            [{**MIXED, "average_bits": 5.0, "schemes": ["W4A16", "W8A8"]}],
            "invalid_value",
            "recipe.stages[0].schemes[1]",
        ),
        ([{**MIXED, "average_bits": 5.0, "schemes": [[], {}]}], "invalid_value", "recipe.stages[0].schemes[0]"),
        ([{**MIXED, "average_bits": 5.0, "schemes": "W4A16"}], "invalid_type", "recipe.stages[0].schemes"),
        ([{**MIXED, "average_bits": 5.0, "scheme": "W4A16"}], "invalid_value", "recipe.stages[0].scheme"),
        ([{**MIXED, "average_bits": 5.0, "embeddings": True}], "invalid_value", "recipe.stages[0].embeddings"),
        (
            [{**MIXED, "max_size_bytes": 10**6, "schemes": ["W3A16", "W8A16"]}],
            "invalid_value",
            "recipe.stages[0].schemes",
        ),
        ([{**MIXED, "max_size_bytes": 10**30}], "invalid_value", "recipe.stages[0].max_size_bytes"),
        ([{**MIXED, "max_size_bytes": 1000}], "budget_too_small", "recipe.stages[0].max_size_bytes"),
        ([GPTQ, PRUNING], "stages_conflict", "recipe.stages[1].technique"),
        ([GPTQ, GPTQ], "stages_conflict", "recipe.stages[1].technique"),
        ([PRUNING, {**PRUNING, "sparsity": 0.3}], "stages_conflict", "recipe.stages[1].sparsity"),
        ([TWO_OF_FOUR, {**PRUNING, "sparsity": 0.5}], "stages_conflict", "recipe.stages[1].sparsity"),
        ([TWO_OF_FOUR, {**TWO_OF_FOUR, "mask_structure": "4:8"}], "stages_conflict", "recipe.stages[1].mask_structure"),
        ([{**GPTQ, "group_size": 100}], "group_size_fits_no_layer", "recipe.stages[0].group_size"),
        ([PRUNING, {**GPTQ, "group_size": 256}], "group_size_fits_no_layer", "recipe.stages[1].group_size"),
        ([{**PRUNING, "mask_structure": "3:7"}], "mask_structure_fits_no_layer", "recipe.stages[0].mask_structure"),
    ],
)
def test_a_wrong_stage_is_named(refused: Refused, stages: Any, code: str, param: str) -> None:
    problem = refused(422, recipe={"stages": stages})
    assert (problem["code"], problem["param"]) == (code, param)


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [("group_size", 128, "null"), ("symmetric", False, "true"), ("embeddings", True, "false")],
)
def test_an_option_with_one_value_says_it_in_the_words_of_json(
    refused: Refused, option: str, value: Any, told: str
) -> None:
    problem = refused(422, recipe={"stages": [{"technique": "dynamic_int8", option: value}]})
    assert (problem["param"], problem["detail"]) == (f"recipe.stages[0].{option}", f"Input should be {told}.")


@pytest.mark.parametrize("stage", [GPTQ, PRUNING, NF4, {**MIXED, "average_bits": 5.0}])
def test_a_limit_that_no_result_of_the_recipe_keeps_is_refused(refused: Refused, stage: dict[str, Any]) -> None:
    problem = refused(422, recipe={"stages": [stage]}, constraints={"max_size_bytes": 50_000})
    assert (problem["code"], problem["param"]) == ("constraint_impossible", "constraints.max_size_bytes")
    needed = int(problem["hint"].split()[3].replace(",", ""))
    assert 50_000 < needed < 400_000
    assert f"{needed:,} bytes" in problem["detail"]


def test_a_limit_of_bytes_needs_packed_codes(refused: Refused) -> None:
    recipe = {"stages": [{**MIXED, "max_size_bytes": 10**9}], "output": {"format": "safetensors"}}
    problem = refused(422, recipe=recipe)
    assert (problem["code"], problem["param"]) == ("output_format_impossible", "recipe.output.format")


def test_quantized_activations_need_a_format_that_says_so(refused: Refused) -> None:
    recipe = {"stages": [{"technique": "dynamic_int8"}], "output": {"format": "safetensors"}}
    problem = refused(422, recipe=recipe)
    assert (problem["code"], problem["param"]) == ("output_format_impossible", "recipe.output.format")


@pytest.mark.parametrize(
    ("stage", "output", "param"),
    [
        (NF4, {"format": "compressed-tensors"}, "recipe.output.format"),
        (NF4, {"packing": "pack-quantized"}, "recipe.output.packing"),
        (GPTQ, {"format": "bitsandbytes"}, "recipe.output.format"),
        (PRUNING, {"format": "bitsandbytes"}, "recipe.output.format"),
    ],
)
def test_nf4_and_bitsandbytes_belong_together(
    refused: Refused, stage: dict[str, Any], output: dict[str, str], param: str
) -> None:
    problem = refused(422, recipe={"stages": [stage], "output": output})
    assert (problem["code"], problem["param"]) == ("output_format_impossible", param)


def test_a_width_that_no_layout_packs_is_refused_in_a_packed_format(refused: Refused) -> None:
    recipe = {"stages": [{**GPTQ, "scheme": "W3A16"}], "output": {"format": "compressed-tensors"}}
    problem = refused(422, recipe=recipe)
    assert (problem["code"], problem["param"]) == ("output_format_impossible", "recipe.output.format")


@pytest.mark.parametrize(
    ("part", "value", "code", "param"),
    [
        ("output", {"format": "gguf"}, "invalid_value", "recipe.output.format"),
        ("output", {"packing": "int-quantized"}, "output_format_impossible", "recipe.output.packing"),
        ("output", {"format": "sparse-bitmask"}, "output_format_impossible", "recipe.output.format"),
        ("calibration", {"dataset": {"texts": []}}, "invalid_value", "recipe.calibration.dataset.texts"),
        ("calibration", {"dataset": {"texts": [" \n"]}}, "empty_dataset", "recipe.calibration.dataset"),
        ("calibration", {"dataset": {"texts": ["a", 1]}}, "invalid_type", "recipe.calibration.dataset.texts[1]"),
        ("calibration", {"dataset": {"texts": ["a"], "x": 1}}, "unknown_field", "recipe.calibration.dataset.x"),
        ("calibration", {"dataset": "builtin:other"}, "invalid_value", "recipe.calibration.dataset"),
        ("calibration", {"dataset": "http://x"}, "invalid_value", "recipe.calibration.dataset"),
        ("calibration", {"dataset": 1}, "invalid_type", "recipe.calibration.dataset"),
        ("calibration", {"dataset": "file:../x.txt"}, "invalid_dataset", "recipe.calibration.dataset"),
        ("calibration", {"dataset": "file:nothing.txt"}, "dataset_not_found", "recipe.calibration.dataset"),
        ("calibration", {"dataset": "file:empty.txt"}, "empty_dataset", "recipe.calibration.dataset"),
        (
            "calibration",
            {"dataset": "file:table.csv", "text_field": "body"},
            "text_field_missing",
            "recipe.calibration.text_field",
        ),
        ("calibration", {"num_samples": 0}, "invalid_value", "recipe.calibration.num_samples"),
        ("evaluation", {"dataset": "file:empty.txt"}, "empty_dataset", "recipe.evaluation.dataset"),
        ("training", {}, "missing_field", "recipe.training.dataset"),
        ("seed", -1, "invalid_value", "recipe.seed"),
        ("seed", True, "invalid_type", "recipe.seed"),
        ("version", 2, "invalid_value", "recipe.version"),
        ("trust_remote_code", True, "unknown_field", "recipe.trust_remote_code"),
    ],
)
def test_a_wrong_recipe_is_named(
    refused: Refused, settings: Settings, part: str, value: Any, code: str, param: str
) -> None:
    (settings.model_roots[0] / "empty.txt").write_text("\n \n")
    (settings.model_roots[0] / "table.csv").write_text("text\nwords\n")
    problem = refused(422, recipe={"stages": [GPTQ], part: value})
    assert (problem["code"], problem["param"]) == (code, param)


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"recipe": "int3"}, "unknown_preset", "recipe"),
        ({"recipe": None}, "invalid_type", "recipe"),
        ({"recipe": []}, "invalid_type", "recipe"),
        ({"model": "tiny"}, "invalid_type", "model"),
        ({"model": {}}, "missing_field", "model.id"),
        ({"model": {"id": ""}}, "invalid_value", "model.id"),
        ({"model": {"id": "x" * 601}}, "invalid_value", "model.id"),
        ({"model": {"id": "a", "trust_remote_code": True}}, "unknown_field", "model.trust_remote_code"),
        ({"constraints": {"max_size": 1}}, "unknown_field", "constraints.max_size"),
        ({"constraints": {"max_perplexity_ratio": 0}}, "invalid_value", "constraints.max_perplexity_ratio"),
        ({"constraints": {"min_accuracy": 2}}, "invalid_value", "constraints.min_accuracy"),
        ({"constraints": {"max_size_bytes": 2**63}}, "invalid_value", "constraints.max_size_bytes"),
        ({"queue": "../cpu"}, "invalid_value", "queue"),
        ({"priority": 101}, "invalid_value", "priority"),
        ({"timeout_seconds": 0}, "invalid_value", "timeout_seconds"),
        ({"metadata": {"a": 1}}, "invalid_type", "metadata.a"),
        ({"metadata": {"a": "x" * 513}}, "invalid_value", "metadata.a"),
        ({"metadata": {str(number): "" for number in range(33)}}, "invalid_value", "metadata"),
        ({"metadata": {"a": "nul \0"}}, "invalid_text", "metadata.a"),
        ({"metadata": {"nul \0": "a"}}, "invalid_text", "metadata"),
        ({"metadata": {"a": "\ud800"}}, "invalid_text", "metadata.a"),
        ({"extra": 1}, "unknown_field", "extra"),
    ],
)
def test_a_wrong_field_is_named(refused: Refused, changes: dict[str, Any], code: str, param: str) -> None:
    problem = refused(422, **changes)
    assert (problem["code"], problem["param"]) == (code, param)


def test_every_fault_of_a_request_is_told(refused: Refused) -> None:
    problem = refused(422, priority="high", queue=7, recipe={"stages": [{"technique": "gtpq"}]})
    assert {error["param"] for error in problem["errors"]} == {"priority", "queue", "recipe.stages[0].technique"}


def test_an_unknown_technique_comes_with_the_known_ones(refused: Refused) -> None:
    hint = refused(422, recipe={"stages": [{"technique": "gtpq"}]})["hint"]
    assert hint == f"One of: {', '.join(sorted(TECHNIQUES))}."


def test_a_group_size_that_fits_no_layer_comes_with_sizes_that_do(refused: Refused) -> None:
    assert "32, 64, 128" in refused(422, recipe={"stages": [{**GPTQ, "group_size": 100}]})["hint"]


@pytest.mark.parametrize(
    ("body", "content_type", "status", "code"),
    [
        (b"{", "application/json", 400, "invalid_json"),
        (b"\xff\xfe", "application/json", 400, "invalid_json"),
        (b"[" * 100_000, "application/json", 400, "invalid_json"),
        (b'{"priority": ' + b"9" * 5000 + b"}", "application/json", 400, "invalid_json"),
        (b"", "application/json", 422, "missing_field"),
        (b"[]", "application/json", 422, "invalid_type"),
        (b'"text"', "application/json", 422, "invalid_type"),
        (b"model=a", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(
    client: TestClient, auth: dict[str, str], body: bytes, content_type: str, status: int, code: str
) -> None:
    headers = {**auth, "Content-Type": content_type, "Idempotency-Key": "two"}
    answer = client.post("/v1/jobs", content=body, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["sparsity", "max_perplexity_ratio"])
def test_what_is_no_number_is_refused(
    client: TestClient, auth: dict[str, str], model_id: str, field: str, number: str
) -> None:
    stage = '{"technique": "magnitude", "sparsity": 0.5}'
    body = f'{{"model": {{"id": "{model_id}"}}, "recipe": {{"stages": [{stage}]}}, "constraints": {{}}}}'
    value = f'"{field}": {number}'
    body = body.replace('"sparsity": 0.5', value) if field == "sparsity" else body.replace("{}", "{" + value + "}")
    answer = client.post("/v1/jobs", content=body, headers={**auth, "Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_value")
    assert answer.json()["param"].endswith(field)


def test_a_wrong_key_is_refused_before_the_model_is_looked_at(client: TestClient) -> None:
    answer = client.post(
        "/v1/jobs", json={"model": {"id": "org/name"}, "recipe": "int8"}, headers={"Authorization": "Bearer x"}
    )
    assert (answer.status_code, answer.json()["code"]) == (401, "invalid_api_key")


def test_many_faults_and_long_keys_are_refused_in_no_time(refused: Refused) -> None:
    begin = time.monotonic()
    refused(422, **{f"field_{number}": 0 for number in range(20_000)})
    refused(422, **{"k" * 100_000: [0] * 100_000})
    refused(422, recipe={"stages": [5] * 500_000})
    refused(422, recipe={"stages": [GPTQ], "calibration": {"dataset": {"texts": [5] * 500_000}}})
    refused(422, metadata={str(number): 5 for number in range(100_000)})
    assert time.monotonic() - begin < 30  # what grows with the square would take hours


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({"extra": 1}, "constraints, metadata, model, priority, queue, recipe, timeout_seconds"),
        ({"constraints": {"max_size": 1}}, "max_perplexity_ratio, max_size_bytes, min_accuracy"),
        (
            {"recipe": {"stages": [GPTQ], "evaluation": {"tokens": 1}}},
            "allow_overlap, dataset, label_field, max_seq_length",
        ),
        ({"recipe": {"stages": [{**PRUNING, "sparsety": 0.5}]}}, "allocation, ignore, mask_structure, sparsity"),
        ({"recipe": {"stages": [GPTQ], "calibration": {"dataset": {"texts": ["a"], "x": 1}}}}, "labels, texts"),
    ],
)
def test_an_unknown_field_is_answered_with_those_there_are(
    refused: Refused, changes: dict[str, Any], known: str
) -> None:
    problem = refused(422, **changes)
    assert problem["code"] == "unknown_field"
    assert f"The fields here: {known}" in problem["hint"]


@pytest.mark.parametrize(
    ("changes", "param", "nearest"),
    [
        ({"recipe": {"stage": [GPTQ]}}, "recipe.stage", "stages"),
        ({"recipe": {"Stages": [GPTQ]}}, "recipe.Stages", "stages"),
        ({"recipe": {"stages": [{**PRUNING, "sparsety": 0.5}]}}, "recipe.stages[0].sparsety", "sparsity"),
        ({"constraints": {"max_size": 1}}, "constraints.max_size", "max_size_bytes"),
    ],
)
def test_a_misspelt_field_is_named_before_the_one_that_is_missing(
    refused: Refused, changes: dict[str, Any], param: str, nearest: str
) -> None:
    problem = refused(422, **changes)
    assert (problem["code"], problem["param"]) == ("unknown_field", param)
    assert problem["hint"].startswith(f"Is {nearest!r} meant?")


def test_an_unknown_field_elsewhere_does_not_come_before_what_is_missing(refused: Refused) -> None:
    problem = refused(422, recipe={}, queu="cpu")
    assert [fault["param"] for fault in problem["errors"]] == ["recipe.stages", "queu"]


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"recipe": {"stages": [{**PRUNING, "sparsity": 50}]}}, "Give a fraction: 0.5 for 50 %."),
        ({"recipe": {"stages": [{**PRUNING, "sparsity": 12.5}]}}, "Give a fraction: 0.125 for 12.5 %."),
        ({"recipe": {"stages": [{**PRUNING, "sparsity": "50%"}]}}, "Give a number: 50 % is 0.5."),
        ({"recipe": {"stages": [{**GPTQ, "damping": 5}]}}, "Give a fraction: 0.05 for 5 %."),
        (
            {"recipe": {"stages": [{"technique": "smoothquant", "smoothing_strength": 80}]}},
            "Give a fraction: 0.8 for 80 %.",
        ),
        ({"constraints": {"min_accuracy": 90}}, "Give a fraction: 0.9 for 90 %."),
        ({"recipe": {"stages": [{**MIXED, "average_bits": 50}]}}, None),
        ({"recipe": {"stages": [{**PRUNING, "sparsity": 500}]}}, None),
        ({"recipe": {"stages": [{**PRUNING, "sparsity": "half"}]}}, None),
        ({"recipe": {"stages": [{**PRUNING, "sparsity": -1}]}}, None),
    ],
)
def test_a_percentage_is_answered_with_its_fraction(
    refused: Refused, changes: dict[str, Any], hint: str | None
) -> None:
    assert refused(422, **changes)["hint"] == hint


def test_a_queue_of_another_form_is_answered_with_the_form(refused: Refused) -> None:
    problem = refused(422, queue="GPU")
    assert problem["param"] == "queue"
    assert problem["detail"] == "'GPU' does not have the form ^[a-z0-9][a-z0-9_-]{0,63}$."
