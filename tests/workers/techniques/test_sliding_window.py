"""Attention within a window: the same model on short texts, no token further back on long ones, and a smaller cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from tests.models import write_tiny_model
from tests.workers.attempts import TEXTS, Attempt, certified, compressed, fetched
from workers.certify import certify
from workers.errors import CrashError, UserError
from workers.evaluation.context import context_lengths, kv_cache_bytes
from workers.evaluation.locality import blocks_seeing
from workers.formats.opening import open_checkpoint
from workers.pipeline import compress
from workers.recipe import Recipe
from workers.shapes import config_after
from workers.shapes.attention import windows_of
from workers.training import loop
from workers.training.step_journal import StepJournal

WINDOW = 16
SIZES: dict[str, Any] = {"num_key_value_heads": 2, "intermediate_size": 128, "scale": 4.0}
# Two blocks each; those of Gemma have a window already.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "phi3": {},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"head_dim": 32},
    "gemma3_text": {"head_dim": 16, "sliding_window": 64},
}
DISTIL: dict[str, Any] = {
    "technique": "logit_distillation", "num_steps": 60, "batch_size": 8, "max_seq_length": 64, "num_evaluations": 3,
    "precision": "float32", "alpha": 0.0, "temperature": 1.0, "learning_rate": 2e-3,
}  # fmt: skip
TRAINING = {"dataset": {"texts": TEXTS[:150]}}


class Stopped(BaseException):
    """The run ends here."""


def stage_of(window: int = WINDOW, **options: Any) -> dict[str, Any]:
    return {"technique": "sliding_window", "window": window, **options}


def write_model(folder: Path, model_type: str, **config: Any) -> Path:
    write_tiny_model(folder, model_type, **{**SIZES, **SHAPES.get(model_type, {}), **config})
    return folder


def with_config(folder: Path, *removed: str, **changes: Any) -> Path:
    """Say something else in the model's config.json."""
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in removed}
    path.write_text(json.dumps({**config, **changes}))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("roots") / "full", "llama")


@torch.inference_mode()
def logits_of(folder: Path, ids: Tensor) -> Tensor:
    """What plain transformers gives, float32, tokens × vocabulary."""
    opened: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits: Tensor = opened.eval()(input_ids=ids.unsqueeze(0)).logits[0]
    return logits


def refusal_of(attempt: Attempt) -> UserError:
    with pytest.raises(UserError) as caught:
        compress(attempt.work, attempt.request, attempt.events.append)
    return caught.value


@pytest.mark.parametrize("model_type", SHAPES)
def test_it_is_the_original_on_short_texts_and_forgets_what_is_further_back(model_type: str, tmp_path: Path) -> None:
    original = write_model(tmp_path / "model", model_type)
    attempt = certified(tmp_path / "work", original, {"stages": [stage_of()]})
    short = torch.arange(5, 5 + WINDOW)
    assert torch.equal(logits_of(attempt.artifact, short), logits_of(original, short))
    # Two blocks, in each of which a token sees the 15 before it: 30 back, and no further.
    text = torch.arange(5, 5 + 40)
    other = text.clone()
    other[0] = 300
    reach = 2 * (WINDOW - 1)
    here = [logits_of(attempt.artifact, ids) for ids in (text, other)]
    there = [logits_of(original, ids) for ids in (text, other)]
    assert torch.equal(here[0][reach + 1 :], here[1][reach + 1 :])
    assert not torch.equal(here[0][reach], here[1][reach])
    assert not torch.equal(there[0][-1], there[1][-1])
    config = AutoConfig.from_pretrained(attempt.artifact)
    assert config.sliding_window == WINDOW
    assert config.model_type == ("mistral" if model_type == "llama" else model_type)
    metrics = attempt.report["stages"][0]["metrics"]
    assert (metrics["window"], metrics["num_local_blocks"], metrics["full_blocks"]) == (WINDOW, 2, [])
    assert (metrics["original_model_type"], metrics["model_type"]) == (model_type, config.model_type)
    size = attempt.report["size"]
    assert size["artifact_parameters"] == size["original_parameters"] == metrics["num_parameters"]


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_some_blocks_may_go_on_seeing_everything(model_type: str, tmp_path: Path) -> None:
    original = write_model(tmp_path / "model", model_type, num_hidden_layers=3)
    attempt = certified(tmp_path / "work", original, {"stages": [stage_of(full_blocks=[1])]})
    config = json.loads((attempt.artifact / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    artifact = open_checkpoint(attempt.artifact, torch.device("cpu"))
    assert blocks_seeing(artifact, WINDOW) == [1]
    assert blocks_seeing(artifact, WINDOW - 1) == [0, 1, 2]
    assert attempt.report["stages"][0]["metrics"]["full_blocks"] == [1]
    # A second stage leaves those alone that see everything now, and narrows the others.
    again = certified(tmp_path / "again", attempt.artifact, {"stages": [stage_of(WINDOW // 2)]})
    assert windows_of(json.loads((again.artifact / "config.json").read_text())) == [8, None, 8]


def test_gemma_keeps_its_blocks_of_each_kind(tmp_path: Path) -> None:
    original = write_model(tmp_path / "model", "gemma3_text", num_hidden_layers=6)
    attempt = certified(tmp_path / "work", original, {"stages": [stage_of()]})
    short = torch.arange(5, 5 + WINDOW)
    assert torch.equal(logits_of(attempt.artifact, short), logits_of(original, short))
    assert blocks_seeing(open_checkpoint(attempt.artifact, torch.device("cpu")), WINDOW) == [5]


@pytest.mark.parametrize(
    ("removed", "changes"),
    [
        (["rope_parameters"], {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}}),
        (["rope_parameters"], {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
        (["num_key_value_heads", "max_position_embeddings"], {}),
        (["head_dim", "rms_norm_eps"], {"pretraining_tp": 2, "attention_bias": False, "layer_types": None}),
        ([], {"rms_norm_eps": 0.1, "hidden_act": "gelu", "architectures": None}),
    ],
)
def test_llama_with_other_words_in_its_config_is_the_same_as_mistral(
    removed: list[str], changes: dict[str, Any], tmp_path: Path
) -> None:
    shape = {"num_key_value_heads": 4} if "num_key_value_heads" in removed else {"tie_word_embeddings": True}
    original = with_config(write_model(tmp_path / "model", "llama", **shape), *removed, **changes)
    attempt = certified(tmp_path / "work", original, {"stages": [stage_of()]})
    ids = torch.arange(5, 5 + WINDOW)
    assert torch.equal(logits_of(attempt.artifact, ids), logits_of(original, ids))
    written = json.loads((attempt.artifact / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert not {"attention_bias", "mlp_bias", "pretraining_tp", "layer_types"} & written.keys()
    said, meant = AutoConfig.from_pretrained(original), AutoConfig.from_pretrained(attempt.artifact)
    for name in ("num_key_value_heads", "head_dim", "max_position_embeddings", "rope_parameters", "eos_token_id"):
        assert getattr(said, name) == getattr(meant, name), name


@pytest.mark.parametrize("model_type", SHAPES)
@torch.inference_mode()
def test_the_cache_has_as_many_bytes_as_that_of_transformers(model_type: str, tmp_path: Path) -> None:
    original = write_model(tmp_path / "model", model_type)
    attempt = compressed(tmp_path / "work", original, {"stages": [stage_of()]})
    for folder in (original, attempt.artifact):
        opened: Any = AutoModelForCausalLM.from_pretrained(folder)
        assert opened.dtype == torch.bfloat16
        for length in (WINDOW // 2, WINDOW, 3 * WINDOW, 100):
            ids = torch.arange(length).unsqueeze(0)
            static, dynamic = StaticCache(opened.config, max_cache_len=length), DynamicCache(config=opened.config)
            for cache in (static, dynamic):
                opened(input_ids=ids, past_key_values=cache, use_cache=True)
            assert nbytes(static) == kv_cache_bytes(opened.config, length, 2)
            # This one leaves out the token that the next one does not see any more.
            windows = [getattr(layer, "sliding_window", None) for layer in dynamic.layers]
            num_left_out = sum(window is not None and length >= window for window in windows)
            a_token = kv_cache_bytes(opened.config, 1, 2) // len(windows)
            assert nbytes(dynamic) == kv_cache_bytes(opened.config, length, 2) - num_left_out * a_token


def nbytes(cache: Any) -> int:
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


def test_the_report_has_memory_and_perplexity_at_several_lengths(model: Path, tmp_path: Path) -> None:
    attempt = certified(tmp_path / "work", model, {"stages": [stage_of()]})
    context = attempt.report["context"]
    lengths = [entry["length"] for entry in context["lengths"]]
    assert lengths == [8, 16, 32, 64, 128, 256]
    assert (context["window"], context["max_positions"]) == (WINDOW, 512)
    a_token = 2 * 2 * 2 * 16 * 2  # keys and values, blocks, heads, values of a head, bytes
    for entry in context["lengths"]:
        assert entry["original_kv_cache_bytes"] == a_token * entry["length"]
        assert entry["kv_cache_bytes"] == a_token * min(entry["length"], WINDOW)
    assert (context["original_kv_cache_bytes"], context["kv_cache_bytes"]) == (a_token * 512, a_token * WINDOW)
    for entry in context["lengths"][:2]:
        assert (entry["perplexity_ratio"], entry["perplexity_ratio_standard_error"]) == (1.0, 0.0)
    assert all(entry["perplexity"] != entry["original_perplexity"] for entry in context["lengths"][2:])
    assert all(entry["perplexity_ratio_standard_error"] > 0 for entry in context["lengths"][2:])
    card = (attempt.artifact / "README.md").read_text()
    assert "| KV cache of 512 tokens, bytes | 131,072 | 4,096 |" in card


@torch.inference_mode()
def test_perplexity_at_a_length_is_that_of_the_second_halves(model: Path, tmp_path: Path) -> None:
    from workers.engine.text import read_documents, tokenize

    attempt = certified(tmp_path / "work", model, {"stages": [stage_of()]})
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    ids = tokenize(tokenizer, read_documents(attempt.work / "source" / "evaluation.jsonl"), param="")[:512]
    entries = {entry["length"]: entry for entry in attempt.report["context"]["lengths"]}
    for length, num_scored in ((32, 16), (256, 64)):  # of evaluation.max_seq_length, 128, one half at most
        for name, folder in (("original_perplexity", model), ("perplexity", attempt.artifact)):
            losses = []
            for start in range(0, 512, length):
                text = ids[start : start + length]
                logits = logits_of(folder, text)[-num_scored - 1 : -1]
                losses.append(nn.functional.cross_entropy(logits, text[-num_scored:], reduction="none"))
            assert entries[length][name] == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-4)
        assert entries[length]["num_tokens"] == 512 // length * num_scored


def test_only_recipes_with_a_window_pay_for_contexts(model: Path, tmp_path: Path) -> None:
    attempt = certified(tmp_path / "work", model, {"stages": [{"technique": "round_to_nearest", "group_size": 32}]})
    assert attempt.report["context"] is None
    assert "certify.context" not in {event.get("step") for event in attempt.events}


@pytest.mark.parametrize(
    ("window", "longest", "lengths"),
    [
        (64, 1 << 20, [32, 64, 128, 256, 512, 1024]),
        (64, 300, [32, 64, 128, 256]),
        (100, 300, [64, 128, 256]),
        (1024, 2048, [512, 1024, 2048]),
        (1024, 1500, [512, 1024, 1500]),
        (96, 120, [32, 64, 120]),
        (512, 100, [16, 32, 64]),
        (8, 8, [4, 8]),
    ],
)
def test_lengths_lie_on_both_sides_of_the_window(window: int, longest: int, lengths: list[int]) -> None:
    assert context_lengths(window, longest) == lengths


def test_a_text_that_is_too_short_to_show_the_cost_is_said_to_be(model: Path, tmp_path: Path) -> None:
    evaluation = {"dataset": {"texts": TEXTS[150:]}, "num_tokens": 96, "max_seq_length": 64}
    attempt = certified(tmp_path / "work", model, {"stages": [stage_of(200)], "evaluation": evaluation})
    [warning] = [event for event in attempt.events if event["event"] == "warning"]
    assert (warning["code"], warning["param"]) == ("short_context", "recipe.evaluation.num_tokens")


@pytest.mark.parametrize("hidden_weight", [0.0, 1.0])
def test_recovery_wins_back_what_the_window_lost(hidden_weight: float, model: Path, tmp_path: Path) -> None:
    evaluation = {"dataset": {"texts": TEXTS[150:]}, "num_tokens": 512, "max_seq_length": 64}
    recipe: dict[str, Any] = {"training": TRAINING, "evaluation": evaluation}
    narrow = stage_of(8)
    bare = certified(tmp_path / "bare", model, {**recipe, "stages": [narrow]})
    recovered = certified(
        tmp_path / "recovered", model, {**recipe, "stages": [narrow, {**DISTIL, "hidden_weight": hidden_weight}]}
    )
    metrics = recovered.report["stages"][1]["metrics"]
    assert metrics["held_out_loss"] < metrics["original_held_out_loss"]
    lost, left = (each.report["quality"]["kl_divergence"] for each in (bare, recovered))
    assert left < 0.9 * lost
    # The teacher saw everything: within the window the original gives the same as the student did at first.
    assert recovered.report["context"]["lengths"][0]["perplexity_ratio"] != 1.0
    assert json.loads((recovered.artifact / "config.json").read_text())["sliding_window"] == 8


def test_a_killed_job_gives_the_same_bytes(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SECONDS_A_STATE", 0.0)
    stages = [stage_of(8), {**DISTIL, "num_steps": 6}, {"technique": "gptq", "group_size": 32}]
    recipe = {"stages": stages, "training": TRAINING}
    undisturbed = compressed(tmp_path / "undisturbed", model, recipe)
    attempt = fetched(tmp_path / "work", model, recipe)
    own_write = StepJournal.write
    for stop_at in (1, 4):

        def stopped(self: StepJournal, curve: Any, tensors: Any, stop_at: int = stop_at) -> None:
            own_write(self, curve, tensors)
            if curve.step == stop_at:
                raise Stopped

        monkeypatch.setattr(StepJournal, "write", stopped)
        with pytest.raises(Stopped):
            compress(attempt.work, attempt.request, attempt.events.append)
    monkeypatch.setattr(StepJournal, "write", own_write)

    def stops_in_block(event: dict[str, Any]) -> None:
        if str(event.get("step")).startswith("model.layers.1"):
            raise Stopped

    with pytest.raises(Stopped):
        compress(attempt.work, attempt.request, stops_in_block)
    compress(attempt.work, attempt.request, attempt.events.append)
    names = sorted(path.name for path in undisturbed.artifact.iterdir())
    assert names == sorted(path.name for path in attempt.artifact.iterdir())
    for name in names:
        assert (undisturbed.artifact / name).read_bytes() == (attempt.artifact / name).read_bytes(), name


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_other_stages_come_before_and_after(model_type: str, tmp_path: Path) -> None:
    original = write_model(tmp_path / "model", model_type, num_hidden_layers=5)
    full = {"full_blocks": [0]} if model_type == "qwen2" else {}
    stages: list[dict[str, Any]] = [
        {"technique": "depth_pruning", "method": "list", "blocks": [1]},
        stage_of(64, **full),
        {"technique": "depth_pruning", "num_blocks": 1},
        stage_of(32),
        {"technique": "magnitude", "sparsity": 0.3},
        {"technique": "gptq", "group_size": 32},
    ]
    attempt = certified(tmp_path / "work", original, {"stages": stages})
    config = json.loads((attempt.artifact / "config.json").read_text())
    assert windows_of(config) == [None if full else 32, 32, 32]
    assert [report["metrics"].get("window") for report in attempt.report["stages"]] == [
        None, 64, None, 32, None, None,
    ]  # fmt: skip
    assert attempt.report["size"]["compression_ratio"] > 1.2


def test_codes_are_given_a_window_too(model: Path, tmp_path: Path) -> None:
    source = certified(tmp_path / "coded", model, {"stages": [{"technique": "round_to_nearest", "group_size": 32}]})
    attempt = certified(tmp_path / "work", source.artifact, {"stages": [stage_of()]})
    ids = torch.arange(5, 5 + WINDOW)
    # What codes stand for is stored in bfloat16.
    torch.testing.assert_close(logits_of(attempt.artifact, ids), logits_of(source.artifact, ids), rtol=0.05, atol=0.05)


def test_models_that_are_read_by_block_are_proven_and_measured_alike(model: Path, tmp_path: Path) -> None:
    attempt = compressed(tmp_path / "work", model, {"stages": [stage_of()]})
    certify(attempt.work, attempt.request, attempt.events.append)
    whole = attempt.report
    certify(attempt.work, attempt.request, attempt.events.append, 1)
    by_block = attempt.report
    assert by_block["opened"] == {"original": "by_block", "artifact": "by_block"}
    for one, other in zip(whole["context"]["lengths"], by_block["context"]["lengths"], strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-7)


def test_an_artifact_whose_config_lost_the_window_is_refused(model: Path, tmp_path: Path) -> None:
    attempt = compressed(tmp_path / "work", model, {"stages": [stage_of(64)]})
    with_config(attempt.artifact, sliding_window=65)
    with pytest.raises(CrashError) as caught:
        certify(attempt.work, attempt.request, attempt.events.append)
    assert caught.value.code == "window_missing"


def test_an_artifact_whose_attention_is_not_local_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import masking_utils

    # As wide as the text whose logits are compared: those tell nothing.
    attempt = compressed(tmp_path / "work", model, {"stages": [stage_of(64)]})
    mistral = "transformers.models.mistral.modeling_mistral.create_sliding_window_causal_mask"
    monkeypatch.setattr(mistral, masking_utils.create_causal_mask)
    with pytest.raises(CrashError) as caught:
        certify(attempt.work, attempt.request, attempt.events.append)
    assert caught.value.code == "not_local"


def test_a_window_that_no_block_heeds_changed_nothing(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "llama")
    opened: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for block in opened.model.layers:
        block.self_attn.o_proj.weight.data.zero_()
    opened.save_pretrained(tmp_path / "model")
    attempt = compressed(tmp_path / "work", tmp_path / "model", {"stages": [stage_of()]})
    with pytest.raises(UserError) as caught:
        certify(attempt.work, attempt.request, attempt.events.append)
    assert (caught.value.code, caught.value.param) == ("nothing_changed", "recipe.stages")


def test_a_window_whose_blocks_are_all_left_out_later_changed_nothing(tmp_path: Path) -> None:
    original = write_model(tmp_path / "model", "qwen3", num_hidden_layers=3)
    stages = [stage_of(full_blocks=[0, 1]), {"technique": "depth_pruning", "method": "list", "blocks": [2]}]
    attempt = compressed(tmp_path / "work", original, {"stages": stages})
    with pytest.raises(UserError) as caught:
        certify(attempt.work, attempt.request, attempt.events.append)
    assert caught.value.code == "nothing_changed"


@pytest.mark.parametrize(
    ("model_type", "config", "options", "code", "param"),
    [
        ("llama", {"attention_bias": True}, {}, "unsupported_architecture", "technique"),
        ("llama", {"mlp_bias": True}, {}, "unsupported_architecture", "technique"),
        ("llama", {}, {"window": 512}, "invalid_value", "window"),
        ("llama", {}, {"full_blocks": [0]}, "invalid_value", "full_blocks"),
        ("mistral", {"sliding_window": 16}, {}, "invalid_value", "window"),
        ("mistral", {"sliding_window": 15}, {}, "invalid_value", "window"),
        ("phi3", {"sliding_window": 16}, {}, "invalid_value", "window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 15, "max_window_layers": 1}, {}, "invalid_value",
         "window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}, {"full_blocks": [1]},
         "invalid_value", "full_blocks"),
        ("qwen3", {}, {"full_blocks": [2]}, "invalid_value", "full_blocks"),
        ("qwen3", {}, {"full_blocks": [0, 1]}, "invalid_value", "full_blocks"),
        ("gemma3_text", {}, {"full_blocks": [0]}, "invalid_value", "full_blocks"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 2}, {}, "invalid_value", "technique"),
        ("gemma3_text", {}, {"window": 64}, "invalid_value", "window"),
        ("gpt2", {"num_key_value_heads": None}, {}, "unsupported_architecture", "technique"),
        ("gpt_neox", {}, {}, "unsupported_architecture", "technique"),
        ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}, {}, "unsupported_architecture", "technique"),
    ],
)  # fmt: skip
def test_what_a_model_cannot_be_given_is_refused(
    model_type: str, config: dict[str, Any], options: dict[str, Any], code: str, param: str, tmp_path: Path
) -> None:
    original = write_model(tmp_path / "model", model_type, **config)
    error = refusal_of(fetched(tmp_path / "work", original, {"stages": [stage_of(**options)]}))
    assert (error.code, error.param) == (code, f"recipe.stages[0].{param}")


@pytest.mark.parametrize("task", ["masked", "classification"])
def test_an_encoder_is_refused(task: Any, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", "bert", task=task, intermediate_size=128, scale=8.0)
    error = refusal_of(fetched(tmp_path / "work", tmp_path / "model", {"stages": [stage_of()]}))
    assert error.code == "unsupported_architecture"


def test_every_block_may_get_the_window_that_some_have(tmp_path: Path) -> None:
    original = write_model(
        tmp_path / "model", "qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    )
    stages = [stage_of(full_blocks=[])]
    attempt = certified(tmp_path / "work", original, {"stages": stages})
    assert windows_of(json.loads((attempt.artifact / "config.json").read_text())) == [WINDOW, WINDOW]


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("mistral", {}),
        ("mistral", {"sliding_window": None}),
        ("phi3", {}),
        ("phi3", {"sliding_window": 7}),
        ("qwen2", {"num_hidden_layers": 30}),
        ("qwen2", {"num_hidden_layers": 30, "use_sliding_window": True}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3, "num_hidden_layers": 5}),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}),
        ("gemma3_text", {"num_hidden_layers": 13}),
        ("gemma3_text", {"num_hidden_layers": 7, "sliding_window": 9, "sliding_window_pattern": 3}),
        ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("llama", {}),
    ],
)
def test_a_config_means_what_transformers_takes_it_to_mean(model_type: str, config: dict[str, Any]) -> None:
    from workers.evaluation.locality import block_windows

    said = {"num_hidden_layers": 2, **config, "model_type": model_type}
    meant = transformers.CONFIG_MAPPING[model_type](**{key: said[key] for key in said if key != "model_type"})
    assert windows_of(said) == block_windows(meant)


@pytest.mark.parametrize(
    ("pruning", "window", "layer_types"),
    [
        ({"method": "list", "blocks": [0]}, 8, ["full_attention", "sliding_attention", "sliding_attention"]),
        # Which blocks stay is not known yet, and what is asked for may be possible.
        ({"num_blocks": 1}, 8, ["full_attention"] * 2 + ["sliding_attention"] * 2),
    ],
)
def test_before_a_job_runs_it_is_known_what_can_be(
    pruning: dict[str, Any], window: int, layer_types: list[str]
) -> None:
    config = {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 4, "max_window_layers": 2,
        "use_sliding_window": True, "sliding_window": 16, "max_position_embeddings": 64,
    }  # fmt: skip
    stages = [{"technique": "depth_pruning", **pruning}, stage_of(window)]
    after = config_after(Recipe.model_validate({"stages": stages}).stages, config)
    assert (after["sliding_window"], after["layer_types"], after["num_hidden_layers"]) == (window, layer_types, 3)
    with pytest.raises(UserError) as caught:
        config_after(Recipe.model_validate({"stages": [stages[0], stage_of(17)]}).stages, config)
    assert caught.value.param == "recipe.stages[1].window"


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("qwen2", {"layer_types": "full_attention", "use_sliding_window": True}),
        ("qwen2", {"max_window_layers": "1", "use_sliding_window": True}),
        ("gemma3_text", {"sliding_window_pattern": 0}),
    ],
)
def test_a_config_that_says_no_blocks_is_refused_by_name(model_type: str, config: dict[str, Any]) -> None:
    config = {
        "model_type": model_type, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 64,
        **config,
    }  # fmt: skip
    with pytest.raises(UserError) as caught:
        config_after(Recipe.model_validate({"stages": [stage_of()]}).stages, config)
    assert (caught.value.code, caught.value.param) == ("invalid_config", "model.id")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mistral", "layer_types": ["full_attention"] * 4},
        {"model_type": "gemma3_text", "use_bidirectional_attention": True},
    ],
)
def test_models_that_transformers_opens_as_something_else_are_refused(config: dict[str, Any]) -> None:
    config = {"num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 64, **config}
    with pytest.raises(UserError) as caught:
        config_after(Recipe.model_validate({"stages": [stage_of()]}).stages, config)
    assert (caught.value.code, caught.value.param) == ("unsupported_architecture", "recipe.stages[0].technique")


def test_a_recipe_is_the_same_after_a_way_through_json() -> None:
    recipe = Recipe.model_validate({"stages": [stage_of(full_blocks=[1, 0]), stage_of(8)]})
    assert Recipe.model_validate(json.loads(recipe.model_dump_json())) == recipe
    assert recipe.window == 8


@pytest.mark.parametrize("tokenizer_class", [None, "LlamaTokenizer", "GPT2Tokenizer"])
def test_the_tokenizer_reads_as_it_did_whatever_class_the_type_has(tokenizer_class: str | None, tmp_path: Path) -> None:
    original = write_model(tmp_path / "model", "llama")
    write_pieces(original, tokenizer_class)
    attempt = certified(tmp_path / "work", original, {"stages": [stage_of()]})
    text = f"  {TEXTS[0]}\n\n\tan end  </s> 12345"
    said, meant = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (attempt.artifact, original))
    assert said(text)["input_ids"] == meant(text)["input_ids"]
    assert said.decode(said(text)["input_ids"]) == meant.decode(meant(text)["input_ids"])
    assert (said.eos_token_id, said.bos_token_id) == (meant.eos_token_id, meant.bos_token_id)
    assert str(tmp_path) not in (attempt.artifact / "tokenizer_config.json").read_text()


def write_pieces(folder: Path, tokenizer_class: str | None) -> None:
    """Write a tokenizer of pieces with byte fallback, as Llama 2 has it, of a class that may do more than it says."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    names: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if tokenizer_class is not None:
        names["tokenizer_class"] = tokenizer_class
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
