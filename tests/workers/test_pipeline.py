"""One job's compression and proof on a tiny model, each process's work in turn: what every recipe has to hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.models import write_tiny_llama, write_tiny_model
from tests.workers.attempts import certified, compressed
from workers.certify import certify
from workers.errors import CrashError, UserError

GPTQ = {"technique": "gptq", "scheme": "W4A16", "group_size": 32}
NEAREST = {"technique": "round_to_nearest", "scheme": "W4A16", "group_size": 32}
NF4 = {"technique": "round_to_nearest", "scheme": "NF4"}
INT8 = {"technique": "round_to_nearest", "scheme": "W8A16", "group_size": None}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every parameter of the model that plain transformers opens."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        model(input_ids=torch.zeros((1, 1), dtype=torch.int64))  # packed weights are unpacked when first used
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "recipe",
    [
        {"stages": [NEAREST]},
        {"stages": [{**NEAREST, "symmetric": False}]},
        {"stages": [{**NEAREST, "group_size": None}]},
        {"stages": [{**NEAREST, "group_size": None, "symmetric": False, "clip_search": True}]},
        {"stages": [INT8]},
        {"stages": [{**INT8, "symmetric": False}], "output": {"packing": "int-quantized"}},
        {"stages": [{**INT8, "group_size": 16}], "output": {"packing": "int-quantized"}},
        {"stages": [GPTQ]},
        {"stages": [{**GPTQ, "symmetric": False, "act_order": False, "clip_search": False}]},
        {"stages": [{**GPTQ, "scheme": "W8A16", "group_size": None}]},
        {"stages": [{**GPTQ, "scheme": "W3A16"}]},
        {"stages": [{**GPTQ, "asymmetric_calibration": True, "embeddings": True}]},
        {"stages": [{"technique": "sparsegpt", "asymmetric_calibration": True}, {"technique": "smoothquant"}]},
        {"stages": [{**GPTQ, "embeddings": True}]},
        {"stages": [{**INT8, "embeddings": True}]},
        {"stages": [{**NEAREST, "symmetric": False, "embeddings": True, "ignore": ["*.0.self_attn.*"]}]},
        {"stages": [{**NEAREST, "scheme": "W5A16", "embeddings": True}]},
        {"stages": [{"technique": "gptq", "scheme": "W8A8"}]},
        {"stages": [{"technique": "dynamic_int8"}]},
        {"stages": [{"technique": "dynamic_int8", "symmetric_activations": True}]},
        {"stages": [{"technique": "smoothquant"}]},
        {"stages": [{"technique": "magnitude", "sparsity": 0.4}, {"technique": "smoothquant"}]},
        {"stages": [{"technique": "awq", "group_size": 32}]},
        {"stages": [{"technique": "awq", "scheme": "W3A16", "group_size": 32, "symmetric": False}]},
        {"stages": [{"technique": "sparsegpt", "sparsity": 0.4}, {"technique": "awq", "group_size": 32}]},
        {"stages": [{"technique": "round_to_nearest", "scheme": "FP8"}]},
        {"stages": [{"technique": "wanda", "sparsity": 0.5}, {"technique": "round_to_nearest", "scheme": "FP8"}]},
        {"stages": [NF4]},
        {"stages": [{**NF4, "group_size": 32, "double_quant": False, "ignore": ["*.0.self_attn.*"]}]},
        {"stages": [{"technique": "sparsegpt", "mask_structure": "2:4"}, NF4]},
        {"stages": [{"technique": "wanda", "sparsity": 0.5}, {**NF4, "double_quant": False}]},
        {"stages": [NF4], "output": {"format": "safetensors"}},
        {"stages": [{**NEAREST, "scheme": "W6A16", "symmetric": False}]},
        {"stages": [{"technique": "magnitude", "mask_structure": "2:4"}, {**GPTQ, "scheme": "W2A16"}]},
        {"stages": [{"technique": "magnitude", "sparsity": 0.5}]},
        {"stages": [{"technique": "magnitude", "mask_structure": "2:4"}]},
        {"stages": [{"technique": "magnitude", "sparsity": 0.3}, GPTQ]},
        {"stages": [{"technique": "wanda", "sparsity": 0.5}]},
        {"stages": [{"technique": "wanda", "mask_structure": "2:4"}, NEAREST]},
        {"stages": [{"technique": "sparsegpt", "sparsity": 0.6}]},
        {"stages": [{"technique": "sparsegpt", "mask_structure": "2:4"}, GPTQ]},
        {"stages": [{"technique": "magnitude", "sparsity": 0.2}, {"technique": "sparsegpt", "sparsity": 0.5}]},
        {"stages": [{"technique": "magnitude", "mask_structure": "1:4"}, {**INT8, "symmetric": False}]},
    ],
    ids=lambda recipe: "+".join(
        "-".join(str(value) for value in stage.values()) for stage in recipe["stages"]
    ) + "".join(recipe.get("output", {}).values()),
)  # fmt: skip
def test_an_artifact_is_proven_and_measured(recipe: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    """Certification itself compares the reopened artifact's logits with the engine's."""
    attempt = certified(tmp_path / "work", tiny_llama, recipe)
    quality = attempt.report["quality"]
    assert quality["perplexity"] > 1
    assert quality["original_perplexity"] > 1
    assert quality["kl_divergence"] >= 0
    assert attempt.outcome["constraints_violated"] == []
    statuses = [event["status"] for event in attempt.events if event["event"] == "stage"]
    assert statuses.count("succeeded") == len(recipe["stages"])
    if "quantization_config" in json.loads((attempt.artifact / "config.json").read_text()):
        assert attempt.outcome["result"]["compression_ratio"] > 1


def test_the_report_states_what_plain_transformers_measures(tiny_llama: Path, tmp_path: Path) -> None:
    attempt = certified(tmp_path / "work", tiny_llama, {"stages": [GPTQ]})
    model: Any = AutoModelForCausalLM.from_pretrained(attempt.artifact, dtype=torch.float32)
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(attempt.artifact)
    texts = [json.loads(line)["text"] for line in (attempt.work / "source/evaluation.jsonl").read_text().splitlines()]
    ids = torch.tensor(tokenizer("\n\n".join(texts))["input_ids"][:512]).view(-1, 128)
    with torch.inference_mode():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids]
    expected = torch.tensor(losses).mean().exp().item()
    assert attempt.report["quality"]["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_codes_that_are_not_stored_are_proven_by_the_values(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = {"stages": [GPTQ], "output": {"format": "safetensors"}}
    plain = certified(tmp_path / "plain", tiny_llama, recipe)
    packed = certified(tmp_path / "packed", tiny_llama, {"stages": [GPTQ]})
    assert "quantization_config" not in json.loads((plain.artifact / "config.json").read_text())
    theoretical = plain.report["stages"][0]["metrics"]["theoretical_packed_bytes"]
    codes = [tensor for name, tensor in load_file(packed.artifact / "model.safetensors").items() if "_proj.we" in name]
    stored = sum(tensor.numel() * tensor.element_size() for tensor in codes if tensor.dtype != torch.int64)
    assert theoretical == stored
    # The same codes: apart from rounding to the checkpoint's dtype the two compute the same.
    assert plain.report["quality"]["perplexity"] == pytest.approx(packed.report["quality"]["perplexity"], rel=1e-2)


@pytest.mark.parametrize("double_quant", [True, False])
def test_values_of_nf4_stand_for_the_same_codes(double_quant: bool, tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "model", hidden_size=256, intermediate_size=512)
    stage = {**NF4, "double_quant": double_quant}
    plain = certified(tmp_path / "plain", tmp_path / "model", {"stages": [stage], "output": {"format": "safetensors"}})
    coded = certified(tmp_path / "coded", tmp_path / "model", {"stages": [stage]})
    codes = load_file(coded.artifact / "model.safetensors")
    kept = (".weight", ".absmax", ".nested_absmax")
    stored = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in codes.items()
        if "_proj." in name and name.endswith(kept)
    )
    theoretical = plain.report["stages"][0]["metrics"]["theoretical_packed_bytes"]
    assert theoretical == pytest.approx(stored, rel=1e-3)
    assert plain.report["quality"]["perplexity"] == pytest.approx(coded.report["quality"]["perplexity"], rel=1e-2)


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_packed_embedding_is_stored_once_for_all_that_share_it(is_tied: bool, tmp_path: Path) -> None:
    write_tiny_model(
        tmp_path / "model", "llama", num_key_value_heads=2, intermediate_size=128, tie_word_embeddings=is_tied
    )
    attempt = certified(tmp_path / "work", tmp_path / "model", {"stages": [{**GPTQ, "embeddings": True}]})
    stored = load_file(attempt.artifact / "model.safetensors")
    assert "model.embed_tokens.weight_packed" in stored
    assert ("lm_head.weight_packed" in stored) != is_tied
    assert not any(name.endswith("embed_tokens.weight") or name == "lm_head.weight" for name in stored)
    names = set(attempt.report["stages"][0]["layers"])
    assert {"model.embed_tokens", "lm_head"} & names == (
        {"model.embed_tokens"} if is_tied else {"model.embed_tokens", "lm_head"}
    )
    again = certified(
        tmp_path / "again", attempt.artifact, {"stages": [{**NEAREST, "scheme": "W2A16", "embeddings": True}]}
    )
    assert again.outcome["result"]["original_size_bytes"] <= attempt.outcome["result"]["size_bytes"]


@pytest.mark.parametrize(("scheme", "dtype"), [("BF16", torch.bfloat16), ("FP16", torch.float16)])
def test_a_cast_stores_the_whole_model_in_half_the_bytes(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "model")
    tensors = {name: tensor.float() for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    stages = [{"technique": "wanda", "sparsity": 0.5}, {"technique": "round_to_nearest", "scheme": scheme}]
    attempt = certified(tmp_path / "work", tmp_path / "model", {"stages": stages})
    assert {tensor.dtype for tensor in load_file(attempt.artifact / "model.safetensors").values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(attempt.artifact).dtype == dtype
    assert attempt.outcome["result"]["compression_ratio"] == pytest.approx(2, rel=0.05)
    with pytest.raises(UserError) as caught:
        certified(tmp_path / "again", attempt.artifact, {"stages": stages[1:]})
    assert caught.value.code == "not_smaller"


def test_pruned_weights_are_still_zero_after_quantization(tiny_llama: Path, tmp_path: Path) -> None:
    pruning = {"technique": "magnitude", "mask_structure": "2:4"}
    pruned = weights(compressed(tmp_path / "pruned", tiny_llama, {"stages": [pruning]}).artifact)
    both = weights(compressed(tmp_path / "both", tiny_llama, {"stages": [pruning, GPTQ]}).artifact)
    for name, weight in pruned.items():
        if name.endswith("proj.weight"):
            assert int((weight == 0).sum()) >= weight.numel() // 2
            assert bool((both[name][weight == 0] == 0).all())


@pytest.mark.parametrize(
    "pruning",
    [{"technique": "magnitude", "mask_structure": "2:4"}, {"technique": "magnitude", "sparsity": 0.5}],
    ids=["pattern", "sparsity"],
)
def test_zeros_of_nf4_are_those_that_its_codes_stand_for(
    pruning: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    coded, plain = (
        certified(tmp_path / form, tiny_llama, {"stages": [pruning, NF4], "output": {"format": form}})
        for form in ("bitsandbytes", "safetensors")
    )
    metrics = coded.report["stages"][0]["metrics"]
    assert metrics["num_zeros"] == plain.report["stages"][0]["metrics"]["num_zeros"]
    assert metrics["sparsity"] >= 0.5


def test_gptq_is_closer_to_the_original_than_rounding_to_nearest(tiny_llama: Path, tmp_path: Path) -> None:
    three = {
        name: certified(tmp_path / name, tiny_llama, {"stages": [stage]}).report["quality"]["kl_divergence"]
        for name, stage in (("gptq", GPTQ), ("nearest", NEAREST), ("int8", INT8))
    }
    assert three["int8"] < three["gptq"] < three["nearest"]


@pytest.mark.parametrize("last", [GPTQ, NF4], ids=["gptq", "nf4"])
def test_the_same_recipe_gives_the_same_bytes(last: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    recipe = {"stages": [{"technique": "magnitude", "sparsity": 0.3}, last], "seed": 7}
    first, second = (compressed(tmp_path / name, tiny_llama, recipe).artifact for name in ("first", "second"))
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_an_earlier_result_can_be_compressed_again(tiny_llama: Path, tmp_path: Path) -> None:
    first = certified(tmp_path / "first", tiny_llama, {"stages": [INT8]})
    (tmp_path / "roots").mkdir()
    first.artifact.rename(tmp_path / "roots" / "int8")
    again = certified(tmp_path / "again", tmp_path / "roots" / "int8", {"stages": [GPTQ]})
    assert again.outcome["result"]["size_bytes"] < first.outcome["result"]["size_bytes"]


def test_an_artifact_that_was_tampered_with_is_not_certified(tiny_llama: Path, tmp_path: Path) -> None:
    attempt = compressed(tmp_path / "work", tiny_llama, {"stages": [NEAREST]})
    path = attempt.artifact / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.05
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CrashError) as caught:
        certify(attempt.work, attempt.request, attempt.events.append)
    assert caught.value.code == "artifact_mismatch"


def test_a_missing_weight_is_noticed(tiny_llama: Path, tmp_path: Path) -> None:
    attempt = compressed(tmp_path / "work", tiny_llama, {"stages": [NEAREST]})
    path = attempt.artifact / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "norm" not in name}, path, {"format": "pt"})
    with pytest.raises(CrashError) as caught:
        certify(attempt.work, attempt.request, attempt.events.append)
    assert caught.value.code == "artifact_incomplete"
