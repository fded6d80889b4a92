"""Whole jobs on encoders: what is measured is what plain transformers measures, and every checkpoint of old is read."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.models import write_tiny_model
from tests.workers.attempts import TEXTS, certified, compressed, fetched
from workers.certify import certify
from workers.errors import CrashError, UserError
from workers.evaluation.quality import MASKED_FRACTION
from workers.pipeline import compress
from workers.sources.inspection import inspect_model

GPTQ = {"technique": "gptq", "scheme": "W4A16", "group_size": 32}
INT8 = {"technique": "round_to_nearest", "scheme": "W8A16", "group_size": None}
NAMES: dict[str, Any] = {"id2label": {0: "even", 1: "odd"}, "label2id": {"even": 0, "odd": 1}}
SHORT = [f"Number {number}, {'pruning ' * (number % 7)}and quantization." for number in range(90)]
CALIBRATION = {"dataset": {"texts": TEXTS}, "num_samples": 16, "max_seq_length": 64}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roots") / "classifier"
    write_tiny_model(folder, "bert", task="classification", scale=8.0, intermediate_size=128, **NAMES)
    return folder


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roots") / "masked"
    write_tiny_model(folder, "roberta", task="masked", scale=8.0, intermediate_size=128)
    return folder


def plain(auto: Any, folder: Path) -> tuple[Any, Any]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return auto.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


def predicted(folder: Path, texts: list[str], max_length: int) -> list[int]:
    model, tokenizer = plain(AutoModelForSequenceClassification, folder)
    with torch.inference_mode():
        batches = [tokenizer(text, return_tensors="pt", truncation=True, max_length=max_length) for text in texts]
        return [int(model(input_ids=batch["input_ids"]).logits[0].argmax()) for batch in batches]


def test_a_labelled_classifier_is_measured_as_its_user_would(classifier: Path, tmp_path: Path) -> None:
    words = [name if number % 3 else str(number % 2) for number, name in enumerate(["even", "odd"] * 45)]
    root = classifier.parent
    (root / "rows.jsonl").write_text(
        "".join(json.dumps({"sms": text, "kind": label}) + "\n" for text, label in zip(SHORT, words, strict=True))
    )
    evaluation = {
        "dataset": "file:rows.jsonl",
        "text_field": "sms",
        "label_field": "kind",
        "num_tokens": 2048,
        "max_seq_length": 16,
    }
    recipe = {"stages": [GPTQ], "calibration": CALIBRATION, "evaluation": evaluation}
    attempt = certified(
        tmp_path / "work", classifier, recipe, constraints={"min_accuracy": 0.99, "max_perplexity_ratio": 1.1}
    )
    report, quality = attempt.report, attempt.report["quality"]
    rows = [json.loads(line) for line in (attempt.work / "source/evaluation.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == SHORT
    labels = [row["label"] for row in rows]
    assert labels == [0, 1] * 45
    for prefix, folder in (("original_", classifier), ("", attempt.artifact)):
        classes = predicted(folder, SHORT, 16)
        accuracy = sum(a == b for a, b in zip(classes, labels, strict=True)) / len(labels)
        assert quality[f"{prefix}accuracy"] == pytest.approx(accuracy)
        expected_error = math.sqrt(accuracy * (1 - accuracy) / (len(labels) - 1))
        assert quality[f"{prefix}accuracy_standard_error"] == pytest.approx(expected_error)
        assert attempt.outcome["result"][f"{prefix}accuracy"] == quality[f"{prefix}accuracy"]
    assert quality["perplexity"] is attempt.outcome["result"]["perplexity"] is None
    assert quality["macro_f1"] <= 1
    assert {each["name"]: each["status"] for each in report["constraints"]} == {
        "min_accuracy": "violated",
        "max_perplexity_ratio": "not_applicable",
    }
    assert [each["name"] for each in attempt.outcome["constraints_violated"]] == ["min_accuracy"]
    assert (report["task"], report["generation"]) == ("classification", None)
    assert report["speed"]["artifact"]["first_token_seconds"] is None
    assert report["speed"]["artifact"]["tokens_per_second"] > 0
    card = (attempt.artifact / "README.md").read_text()
    assert "| accuracy |" in card
    assert "perplexity" not in card.partition("## Recipe")[0]


def test_a_masked_lm_is_scored_at_the_masked_tokens(masked: Path, tmp_path: Path) -> None:
    attempt = certified(tmp_path / "work", masked, {"stages": [GPTQ]}, constraints={"max_perplexity_ratio": 100.0})
    quality = attempt.report["quality"]
    texts = [json.loads(line)["text"] for line in (attempt.work / "source/evaluation.jsonl").read_text().splitlines()]
    assert quality["num_tokens"] == pytest.approx(MASKED_FRACTION * 512, rel=0.15)
    for prefix, folder in (("original_", masked), ("", attempt.artifact)):
        model, tokenizer = plain(AutoModelForMaskedLM, folder)
        losses, num_tokens = 0.0, 0
        for number in range(quality["num_windows"]):
            ids = torch.tensor(tokenizer(texts[number])["input_ids"])
            ordinary = [index for index, token in enumerate(ids.tolist()) if token not in tokenizer.all_special_ids]
            shuffled = torch.randperm(len(ordinary), generator=torch.Generator().manual_seed(number))
            chosen = [ordinary[index] for index in shuffled[: max(1, round(0.15 * len(ordinary)))].tolist()]
            labels = torch.full_like(ids, -100)
            labels[chosen] = ids[chosen]
            ids[chosen] = tokenizer.mask_token_id
            with torch.inference_mode():
                losses += model(input_ids=ids[None], labels=labels[None]).loss.item() * len(chosen)
            num_tokens += len(chosen)
        assert num_tokens == quality["num_tokens"]
        assert quality[f"{prefix}perplexity"] == pytest.approx(math.exp(losses / num_tokens), rel=1e-4)
    assert attempt.report["constraints"][0]["status"] == "met"
    assert attempt.outcome["result"]["accuracy"] is None


@pytest.mark.parametrize("name", ["classifier", "masked"])
def test_the_lines_of_the_model_card_run(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    attempt = certified(tmp_path / "work", request.getfixturevalue(name), {"stages": [INT8]})
    lines = attempt.report["load_snippet"].replace("path/to/artifact", str(attempt.artifact))
    said: list[str] = []
    exec(lines, {"print": said.append})
    assert len(said) == 1
    assert name == "masked" or said[0] in ("even", "odd")


def test_a_second_stage_of_work_starts_from_an_earlier_result(classifier: Path, tmp_path: Path) -> None:
    first = certified(tmp_path / "first", classifier, {"stages": [INT8]})
    (tmp_path / "roots").mkdir()
    first.artifact.rename(tmp_path / "roots" / "int8")
    again = certified(tmp_path / "again", tmp_path / "roots" / "int8", {"stages": [GPTQ]})
    assert again.outcome["result"]["size_bytes"] < first.outcome["result"]["size_bytes"]


def test_what_lies_outside_the_blocks_is_ignored_by_loaders(classifier: Path, tmp_path: Path) -> None:
    attempt = compressed(tmp_path / "work", classifier, {"stages": [GPTQ]})
    quantization = json.loads((attempt.artifact / "config.json").read_text())["quantization_config"]
    assert quantization["ignore"] == ["bert.pooler.dense", "classifier"]
    before, after = load_file(classifier / "model.safetensors"), load_file(attempt.artifact / "model.safetensors")
    for name in ("bert.pooler.dense.weight", "classifier.weight", "bert.embeddings.word_embeddings.weight"):
        assert torch.equal(before[name], after[name])


@pytest.mark.parametrize("name", ["bert.encoder.layer.0.attention.self.value.bias", "bert.pooler.dense.weight"])
def test_a_classifier_that_was_tampered_with_is_not_certified(name: str, classifier: Path, tmp_path: Path) -> None:
    attempt = compressed(tmp_path / "work", classifier, {"stages": [GPTQ]})
    path = attempt.artifact / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors[name] * 1.1
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CrashError) as caught:
        certify(attempt.work, attempt.request, attempt.events.append)
    assert caught.value.code == "artifact_mismatch"


@pytest.mark.parametrize("stage", [{"technique": "awq", "group_size": 32}, {"technique": "smoothquant"}])
def test_only_what_attention_passes_on_takes_over_a_scale(
    stage: dict[str, Any], classifier: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(classifier, model)
    before = load_file(model / "model.safetensors")
    values = [f"bert.encoder.layer.{block}.attention.self.value" for block in (0, 1)]
    for value in values:
        before[f"{value}.weight"][:3] *= 64  # outliers, which a scale helps against
    save_file(before, model / "model.safetensors", {"format": "pt"})
    attempt = certified(tmp_path / "work", model, {"stages": [stage]})
    after = load_file(attempt.artifact / "model.safetensors")
    changed = {
        name
        for name in set(before) & set(after)
        if before[name].dtype == after[name].dtype and not torch.equal(before[name], after[name])
    }
    assert changed == {f"{value}.bias" for value in values}


def test_an_encoder_that_was_stopped_goes_on_and_gives_the_same_bytes(masked: Path, tmp_path: Path) -> None:
    class Stopped(BaseException):
        pass

    def stop(event: dict[str, Any]) -> None:
        if event.get("block") == 1:
            raise Stopped

    recipe = {"stages": [{"technique": "wanda", "sparsity": 0.3}, GPTQ]}
    whole = compressed(tmp_path / "whole", masked, recipe)
    for name in ("kept", "lost"):
        attempt = fetched(tmp_path / name, masked, recipe)
        with pytest.raises(Stopped):
            compress(attempt.work, attempt.request, stop)
        if name == "lost":
            for path in (attempt.work / "journal" / "activations").iterdir():
                path.unlink()
        compress(attempt.work, attempt.request, attempt.events.append)
        assert {event["block"] for event in attempt.events if "dense" in str(event.get("step"))} == {1}
        for path in whole.artifact.iterdir():
            assert path.read_bytes() == (attempt.artifact / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"dim": -1}, "invalid_config"),
        ({"hidden_dim": "128"}, "invalid_config"),
        ({"n_heads": None}, "invalid_config"),
        ({"n_layers": 3}, "invalid_config"),
        ({"vocab_size": 385}, "invalid_config"),
        ({"tie_word_embeddings": False}, "weights_missing"),
        ({"architectures": ["DistilBertForSequenceClassification"]}, "weights_missing"),
    ],
)
def test_a_config_that_the_weights_contradict_is_refused_at_preflight(
    changes: dict[str, Any], code: str, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    write_tiny_model(model, "distilbert", task="masked", dim=64, hidden_dim=128, n_layers=2, n_heads=4)
    facts = inspect_model("file:model", model_roots=[tmp_path])
    assert facts.linear_in_features == (64, 128)
    assert facts.parameter_bytes == sum(
        tensor.numel() * tensor.element_size() for tensor in load_file(model / "model.safetensors").values()
    )
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError) as raised:
        inspect_model("file:model", model_roots=[tmp_path])
    assert (raised.value.code, raised.value.param) == (code, "model.id")


@pytest.mark.parametrize("has_prefix", [True, False])
def test_a_checkpoint_as_the_first_berts_were_stored_is_read(has_prefix: bool, tmp_path: Path) -> None:
    """Norms by other names, another task's head, buffers, and, in a bare body, no prefix."""
    model = tmp_path / "model"
    task: Any = "masked" if has_prefix else "classification"
    write_tiny_model(model, "bert", task=task, scale=8.0, intermediate_size=128)
    tensors = load_file(model / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(512)[None]
    if has_prefix:
        old["bert.pooler.dense.weight"] = torch.ones((64, 64))
        old["cls.seq_relationship.weight"] = torch.ones((2, 64))
        old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
        old["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    else:
        old = {name.removeprefix("bert."): tensor for name, tensor in old.items()}
    save_file(old, model / "model.safetensors", {"format": "pt"})
    attempt = certified(tmp_path / "work", model, {"stages": [{"technique": "wanda", "sparsity": 0.5}]})
    assert set(load_file(attempt.artifact / "model.safetensors")) == set(tensors)
    assert attempt.outcome["result"]["original_size_bytes"] == sum(
        tensor.numel() * tensor.element_size() for tensor in tensors.values()
    )


def test_a_tied_bias_that_is_another_one_is_refused(masked: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(masked, model)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.decoder.bias"] = tensors["lm_head.bias"] + 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head\.decoder\.bias differs") as raised:
        compressed(tmp_path / "work", model, {"stages": [INT8]})
    assert raised.value.code == "checkpoint_mismatch"


def test_a_tokenizer_without_a_mask_ends_the_job_before_the_work(masked: Path, tmp_path: Path) -> None:
    attempt = fetched(tmp_path / "work", masked, {"stages": [GPTQ]})
    path = attempt.work / "source" / "model" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["mask_token"]
    path.unlink()
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no mask token") as raised:
        compress(attempt.work, attempt.request, attempt.events.append)
    assert (raised.value.code, raised.value.param) == ("invalid_tokenizer", "model.id")


def test_text_longer_than_the_models_positions_is_cut_to_them(tmp_path: Path) -> None:
    """RoBERTa's positions begin after the padding token's number: of 40 it uses 38."""
    write_tiny_model(tmp_path / "model", "roberta", task="masked", intermediate_size=128, max_position_embeddings=40)
    long = " ".join(TEXTS)
    recipe = {
        "stages": [GPTQ],
        "calibration": {"dataset": {"texts": [long]}, "num_samples": 4, "max_seq_length": 512},
        "evaluation": {"dataset": {"texts": [long[::-1]]}, "num_tokens": 512},
    }
    assert certified(tmp_path / "work", tmp_path / "model", recipe).report["quality"]["max_seq_length"] == 38
