"""Tokens that are left out: the text reads as before, and the model says of it what it said."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from tests.workers.attempts import Attempt, certified, compressed, fetched
from tests.workers.techniques.small_tokenizers import (
    KINDS,
    OTHERS,
    TASK,
    logits_of,
    opened,
    write_model,
    write_tokenizer,
)
from workers.architectures import Task
from workers.certify import certify
from workers.errors import UserError
from workers.evaluation.pieces import Pair, Piece
from workers.evaluation.retokenized import paired_windows
from workers.formats.tokenizer_json import TokenizerJson
from workers.pipeline import compress

STAGE: dict[str, Any] = {"technique": "vocabulary_pruning"}
# A model of each kind, with a tokenizer of each kind.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "byte_fallback", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", "ignore_merges", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "gemma3_text": ("gemma3_text", "unigram", {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16}),
    "gpt2": ("gpt2", "byte_level", {}),
    "gpt_neox": ("gpt_neox", "suffixed", {"tie_word_embeddings": False}),
    "opt": ("opt", "byte_level", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "bert masked": ("bert", "word_piece", {"task": "masked"}),
    "bert classes": ("bert", "word_piece", {"task": "classification", "num_labels": 3}),
    "roberta masked": ("roberta", "byte_level", {"task": "masked"}),
    "roberta classes": ("roberta", "byte_level", {"task": "classification", "num_labels": 3}),
    "distilbert masked": (
        "distilbert",
        "word_level",
        {"task": "masked", "dim": 64, "hidden_dim": 128, "n_heads": 4},
    ),
}


class Stopped(BaseException):
    """The run ends here."""


def recipe(*stages: dict[str, Any], evaluation: list[str] | None = None, **calibration: Any) -> dict[str, Any]:
    return {
        "stages": list(stages),
        "calibration": {"dataset": {"texts": TASK}, "num_samples": 8, "max_seq_length": 64, **calibration},
        "evaluation": {
            "dataset": {"texts": evaluation or TASK[20:]},
            "num_tokens": 512,
            "max_seq_length": 64,
            "allow_overlap": True,
            "prompt": "The parcel number",
        },
    }


def written(folder: Path, name: str) -> Task:
    model_type, kind, config = MODELS[name]
    return write_model(folder, model_type, kind, **config)


def kept_rows(before: Any, after: Any) -> list[int]:
    """The original's id of each row of the artifact."""
    old = before.get_vocab()
    return [old[token] for token, _ in sorted(after.get_vocab().items(), key=lambda item: item[1])]


@pytest.fixture(scope="module", params=MODELS)
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Task, Path, Attempt]:
    """A model, and what the technique made of it."""
    folder = tmp_path_factory.mktemp("pruned")
    task = written(folder / "model", request.param)
    return request.param, task, folder / "model", certified(folder / "work", folder / "model", recipe(STAGE))


def test_the_logits_on_the_task_are_those_of_the_kept_tokens(pruned: tuple[str, Task, Path, Attempt]) -> None:
    _, task, source, attempt = pruned
    (model, tokenizer), (after, new_tokenizer) = opened(source, task), opened(attempt.artifact, task)
    rows = kept_rows(tokenizer, new_tokenizer)
    assert len(rows) < 0.8 * len(tokenizer)
    for text in (*TASK[:5], "\n\n".join(TASK[7:9])):
        before, ids = tokenizer(text).input_ids, new_tokenizer(text).input_ids
        assert [rows[index] for index in ids] == before
        expected, found = logits_of(model, before), logits_of(after, ids)
        torch.testing.assert_close(
            found, expected if task == "classification" else expected[:, rows], rtol=1e-4, atol=1e-4
        )
    # The ids that settings name are still those of the same tokens.
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if (old := getattr(model.config, name, None)) is not None:
            assert rows[getattr(after.config, name)] == old, name


def test_the_report_says_what_became_of_the_vocabulary(pruned: tuple[str, Task, Path, Attempt]) -> None:
    _, task, source, attempt = pruned
    report, metrics = attempt.report, attempt.report["stages"][0]["metrics"]
    (model, tokenizer), (after, new_tokenizer) = opened(source, task), opened(attempt.artifact, task)
    assert (metrics["original_vocab_size"], metrics["vocab_size"]) == (640, len(new_tokenizer))
    assert metrics["num_retokenized"] == 0
    for key, each in (("original_parameters", model), ("artifact_parameters", after)):
        assert report["size"][key] == sum(parameter.numel() for parameter in each.parameters())
    # All that both models are asked is asked alike: there is nothing that one of them lost.
    quality = report["quality"]
    assert quality["num_retokenized"] == 0
    assert quality["kl_divergence"] == pytest.approx(0, abs=1e-5)
    if task == "classification":
        assert quality["top1_agreement"] == 1
    else:
        # Of the probability that went to other tokens, every kept one has its share now.
        assert quality["perplexity"] < quality["original_perplexity"]
    counted = Counter(index for text in TASK for index in tokenizer(text).input_ids)
    if task != "causal":
        assert metrics["num_counted_tokens"] == counted.total()
        assert metrics["num_used_tokens"] == len(counted)


def test_another_text_is_written_with_what_is_left(pruned: tuple[str, Task, Path, Attempt]) -> None:
    name, task, source, attempt = pruned
    kind = MODELS[name][1]
    (_, tokenizer), (_, after) = opened(source, task), opened(attempt.artifact, task)
    if kind in ("word_level", "suffixed"):
        pytest.skip("it cannot write words, or characters at their ends, that it does not know")
    for text in OTHERS:
        before = tokenizer(text, add_special_tokens=False).input_ids
        ids = after(text, add_special_tokens=False).input_ids
        assert len(ids) > len(before)
        assert after.unk_token_id is None or after.unk_token_id not in ids
        assert after.decode(ids) == tokenizer.decode(before)


@torch.inference_mode()
def test_it_goes_on_as_the_original_does_with_kept_tokens(pruned: tuple[str, Task, Path, Attempt]) -> None:
    _, task, source, attempt = pruned
    if task != "causal":
        pytest.skip("it writes nothing")
    (model, tokenizer), (after, new_tokenizer) = opened(source, task), opened(attempt.artifact, task)
    rows = kept_rows(tokenizer, new_tokenizer)
    others = [index for index in range(640) if index not in rows]
    ids = tokenizer("The parcel number 7 was", return_tensors="pt").input_ids
    new = new_tokenizer("The parcel number 7 was", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False, suppress_tokens=others)
    found = after.generate(new, max_new_tokens=24, min_new_tokens=24, do_sample=False)
    assert [rows[index] for index in found[0].tolist()] == expected[0].tolist()


UNKNOWN = "The parcel of quarks and sourdough number 7 was returned to the hadrons; the courier's fee is gluons."


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
@torch.inference_mode()
def test_perplexities_compare_where_tokens_are_missing(name: str, tmp_path: Path) -> None:
    written(tmp_path / "model", name)
    body = recipe(STAGE, evaluation=[UNKNOWN])
    body["evaluation"]["max_seq_length"] = 256
    attempt = certified(tmp_path / "work", tmp_path / "model", body)
    quality = attempt.report["quality"]
    (model, tokenizer), (after, new_tokenizer) = (
        opened(tmp_path / "model", "causal"),
        opened(attempt.artifact, "causal"),
    )
    ids, new = tokenizer(UNKNOWN).input_ids, new_tokenizer(UNKNOWN).input_ids
    assert len(ids) < len(new) < 256
    nats = [
        float(nn.functional.cross_entropy(logits_of(each, these)[:-1], torch.tensor(these[1:]), reduction="sum"))
        for each, these in ((model, ids), (after, new))
    ]
    # Both are of the same text, and divided by the same number: that of the original's tokens.
    assert quality["num_tokens"] == len(ids) - 1
    assert quality["original_perplexity"] == pytest.approx(math.exp(nats[0] / (len(ids) - 1)), rel=1e-4)
    assert quality["perplexity"] == pytest.approx(math.exp(nats[1] / (len(ids) - 1)), rel=1e-4)
    assert quality["perplexity_ratio"] == pytest.approx(quality["perplexity"] / quality["original_perplexity"])
    missing = sum(token not in new_tokenizer.get_vocab() for token in tokenizer.convert_ids_to_tokens(ids))
    assert 0 < missing <= quality["num_retokenized"] < len(ids)
    assert [event["code"] for event in attempt.events if event.get("code") == "much_retokenized"] == [
        "much_retokenized"
    ]


@pytest.mark.parametrize("name", ["gpt2", "bert masked", "roberta classes"])
def test_the_original_is_measured_as_in_any_other_job(name: str, tmp_path: Path) -> None:
    """Texts are cut, and tokens masked, where they would be without a second tokenizer."""
    written(tmp_path / "model", name)
    long = [" ".join(TASK[index : index + 5]) for index in range(0, 20, 4)]
    names = ("original_perplexity", "original_perplexity_standard_error", "num_tokens", "num_windows", "max_seq_length")
    found = []
    for number, stage in enumerate(({"technique": "round_to_nearest", "group_size": 32}, STAGE)):
        body = recipe(stage, evaluation=long)
        body["output"] = {"format": "safetensors"}
        quality = certified(tmp_path / f"{number}", tmp_path / "model", body).report["quality"]
        assert quality["num_retokenized"] == 0
        assert quality["num_windows"] > len(long) - 1
        found.append([quality[key] for key in names])
    assert found[0] == pytest.approx(found[1], nan_ok=True)


@pytest.mark.parametrize("has_labels", [True, False])
@torch.inference_mode()
def test_a_classifier_reads_each_text_by_its_own_tokenizer(has_labels: bool, tmp_path: Path) -> None:
    written(tmp_path / "model", "bert classes")
    texts = [*TASK[:6], UNKNOWN, *OTHERS]
    body = recipe(STAGE, evaluation=texts)
    body["evaluation"]["max_seq_length"] = 256
    if has_labels:
        body["evaluation"]["dataset"]["labels"] = [0, 1, 2] * 3 + [0, 1]
    attempt = certified(tmp_path / "work", tmp_path / "model", body)
    both = [opened(folder, "classification") for folder in (tmp_path / "model", attempt.artifact)]
    found = [
        torch.stack([torch.as_tensor(model(**tokenizer(text, return_tensors="pt")).logits[0]) for text in texts])
        for model, tokenizer in both
    ]
    before, after = (logits.double().log_softmax(dim=-1) for logits in found)
    divergence = (before.exp() * (before - after)).sum(dim=-1).mean()
    quality = attempt.report["quality"]
    assert quality["kl_divergence"] == pytest.approx(float(divergence), rel=1e-3, abs=1e-7)
    assert quality["num_retokenized"] > 5
    assert (quality["accuracy"] is not None) == has_labels


def test_pieces_are_the_same_text_in_both(tmp_path: Path) -> None:
    written(tmp_path / "model", "gpt2")
    attempt = compressed(tmp_path / "work", tmp_path / "model", recipe(STAGE))
    (_, tokenizer), (_, after) = opened(tmp_path / "model", "causal"), opened(attempt.artifact, "causal")
    text = "\n\n".join([UNKNOWN, *OTHERS, *TASK[:3]])
    ((begin, pieces, end),) = Pair(tokenizer, after).pieces([text])
    # Its tokenizer puts special tokens around a text.
    assert [piece.ids for piece in begin + end] == [([0], [0]), ([2], [2])]
    for side, each in enumerate((tokenizer, after)):
        ids = [index for piece in pieces for index in piece.ids[side]]
        assert ids == each(text, add_special_tokens=False).input_ids
    for piece in pieces:
        assert tokenizer.decode(piece.ids[0]) == after.decode(piece.ids[1])
        assert piece.is_same == (len(piece.ids[0]) == len(piece.ids[1]) == 1)
    assert 0.2 < sum(piece.is_same for piece in pieces) / len(pieces) < 0.9


def test_windows_hold_whole_pieces_within_what_models_read() -> None:
    one, three = Piece(([1], [1]), is_same=True), Piece(([2], [3, 4, 5]), is_same=False)
    windows = paired_windows([one, three, three, one, one, three], 5, 4)
    assert [window.original.ids.tolist() for window in windows] == [[1, 2], [2, 1]]
    assert [window.artifact.ids.tolist() for window in windows] == [[1, 3, 4, 5], [3, 4, 5, 1]]
    # Of the second, whose first piece is read and not scored, the artifact's fourth token is.
    assert (windows[1].artifact.positions.tolist(), windows[1].artifact.targets.tolist()) == ([2], [1])
    assert [window.num_retokenized for window in windows] == [1, 1]


def test_options_say_how_many_tokens_stay(tmp_path: Path) -> None:
    written(tmp_path / "model", "gpt2")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    counts = Counter(index for text in TASK for index in tokenizer(text).input_ids)
    sizes = {}
    settings: dict[str, dict[str, Any]] = {
        "all": {},
        "frequent": {"min_count": 40},
        "few": {"num_tokens": 290},
        "filled": {"multiple_of": 64},
        "kept": {"keep": ["Ġgluons", "Ġbread"]},
    }
    for name, options in settings.items():
        attempt = compressed(tmp_path / name, tmp_path / "model", recipe({**STAGE, **options}))
        after: Any = transformers.AutoTokenizer.from_pretrained(attempt.artifact)
        config = json.loads((attempt.artifact / "config.json").read_text())
        assert config["vocab_size"] == len(after)
        sizes[name] = set(after.get_vocab())
        metrics = json.loads((attempt.work / "compressed.json").read_text())["stages"][0]["metrics"]
        assert (metrics["num_retokenized"] > 0) == (name in ("frequent", "few"))
    used = {tokenizer.convert_ids_to_tokens(index) for index in counts}
    assert used <= sizes["all"] <= sizes["filled"]
    assert len(sizes["filled"]) == -(-len(sizes["all"]) // 64) * 64
    assert len(sizes["few"]) == 290
    frequent = {tokenizer.convert_ids_to_tokens(index) for index, count in counts.items() if count >= 40}
    assert frequent <= sizes["frequent"] < sizes["all"]
    assert sizes["kept"] - sizes["all"] >= {"Ġgluons", "Ġbread"} - sizes["all"] != set()


@torch.inference_mode()
def test_positions_begin_where_they_did(tmp_path: Path) -> None:
    """RoBERTa's first position is the one after the padding token's id."""
    written(tmp_path / "model", "roberta masked")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": 400}))
    attempt = compressed(tmp_path / "work", tmp_path / "model", recipe(STAGE))
    config = json.loads((attempt.artifact / "config.json").read_text())
    assert (config["pad_token_id"], config["vocab_size"] < 600) == (400, True)
    (model, tokenizer), (after, new_tokenizer) = (
        opened(tmp_path / "model", "masked"),
        opened(attempt.artifact, "masked"),
    )
    rows = kept_rows(tokenizer, new_tokenizer)
    for text in TASK[:3]:
        expected = logits_of(model, tokenizer(text).input_ids)[:, rows]
        torch.testing.assert_close(logits_of(after, new_tokenizer(text).input_ids), expected, rtol=1e-4, atol=1e-4)


def test_settings_keep_naming_the_same_tokens(tmp_path: Path) -> None:
    written(tmp_path / "model", "llama")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer.get_vocab()
    ends, gone = [ids["<extra>"], ids["</s>"], 630], ids["▁gluons"] if "▁gluons" in ids else ids["▁quarks"]
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "model" / name
        settings = {**json.loads(path.read_text()), "eos_token_id": ends}
        if name.startswith("generation"):
            settings |= {"suppress_tokens": [gone, ids["<s>"]], "forced_eos_token_id": ids["<extra>"]}
            settings |= {"bad_words_ids": [[gone], [ids["<extra>"], ids["<s>"]]], "do_sample": False}
        path.write_text(json.dumps(settings))
    attempt = certified(tmp_path / "work", tmp_path / "model", recipe(STAGE))
    after = transformers.AutoTokenizer.from_pretrained(attempt.artifact).get_vocab()
    config = json.loads((attempt.artifact / "config.json").read_text())
    settings = json.loads((attempt.artifact / "generation_config.json").read_text())
    # The row without a token that settings speak of stays, the last one.
    assert config["eos_token_id"] == settings["eos_token_id"] == [after["<extra>"], after["</s>"], len(after)]
    assert config["vocab_size"] == len(after) + 1
    assert (settings["suppress_tokens"], settings["forced_eos_token_id"]) == ([after["<s>"]], after["<extra>"])
    assert settings["bad_words_ids"] == [[after["<extra>"], after["<s>"]]]


def test_all_of_the_text_is_counted_and_a_part_of_it_read(tmp_path: Path) -> None:
    """What runs through the model is cut to a budget; a word of the last text is as much the task's as of the first."""
    written(tmp_path / "model", "gpt2")
    texts = [*TASK, "The last word is sourdough."]
    stages = ({"technique": "gptq", "group_size": 32}, {**STAGE})
    output = {"format": "safetensors"}
    found = []
    for number, order in enumerate((stages[:1], stages[::-1])):
        body = {**recipe(*order, dataset={"texts": texts}, num_samples=2, max_seq_length=32), "output": output}
        found.append(compressed(tmp_path / f"{number}", tmp_path / "model", body))
    read = [json.loads((each.work / "compressed.json").read_text())["num_calibration_tokens"] for each in found]
    assert read[0] == read[1] == 64
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    after: Any = transformers.AutoTokenizer.from_pretrained(found[1].artifact)
    # The model reads the same samples: its layers are those of a job that counts nothing.
    before, now = (load_file(each.artifact / "model.safetensors") for each in found)
    for name, tensor in now.items():
        assert name.startswith("transformer.wte") or torch.equal(tensor, before[name]), name
    assert after.convert_ids_to_tokens(after(texts[-1]).input_ids) == tokenizer.tokenize(
        texts[-1], add_special_tokens=True
    )


def test_other_stages_follow_and_go_before(tmp_path: Path) -> None:
    written(tmp_path / "model", "llama")
    cut = {"technique": "depth_pruning", "num_blocks": 1, "keep_last": 0}
    rounded = {"technique": "gptq", "group_size": 32, "embeddings": True}
    for number, stages in enumerate(
        (
            [STAGE, {"technique": "tie_embeddings"}, cut, rounded],
            [cut, STAGE, {**rounded, "technique": "round_to_nearest"}],
        )
    ):
        attempt = certified(tmp_path / f"{number}", tmp_path / "model", recipe(*stages))
        metrics = {each["technique"]: each["metrics"] for each in attempt.report["stages"]}
        config = json.loads((attempt.artifact / "config.json").read_text())
        assert metrics["vocabulary_pruning"]["vocab_size"] == config["vocab_size"] < 600
        assert metrics["depth_pruning"]["num_blocks"] == config["num_hidden_layers"] == 1
        assert config["tie_word_embeddings"] == (number == 0)
        assert attempt.report["size"]["compression_ratio"] > 2


@pytest.mark.parametrize("name", ["llama", "bert masked"])
def test_models_that_are_read_by_block_are_measured_alike(name: str, tmp_path: Path) -> None:
    written(tmp_path / "model", name)
    stages = [STAGE, {"technique": "tie_embeddings"}][: 2 if name == "llama" else 1]
    attempt = certified(tmp_path / "work", tmp_path / "model", recipe(*stages, evaluation=[UNKNOWN, *TASK]))
    whole = attempt.report["quality"]
    certify(attempt.work, attempt.request, attempt.events.append, memory_limit_bytes=1)
    assert attempt.report["opened"] == {"original": "by_block", "artifact": "by_block"}
    assert whole["num_retokenized"] > 0
    by_block = attempt.report["quality"]
    assert [name for name in whole if (whole[name] is None) != (by_block[name] is None)] == []
    assert by_block["text"] == whole["text"]
    measured = [name for name in whole if isinstance(whole[name], int | float)]
    assert [by_block[name] for name in measured] == pytest.approx(
        [whole[name] for name in measured], rel=1e-3, abs=1e-7
    )


def test_a_tokenizer_of_older_files_gets_a_tokenizer_json(tmp_path: Path) -> None:
    written(tmp_path / "model", "gpt2")
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())["model"]
    (tmp_path / "model" / "vocab.json").write_text(json.dumps(content["vocab"]))
    (tmp_path / "model" / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, content["merges"])]))
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "</s>"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    path.unlink()
    attempt = certified(tmp_path / "work", tmp_path / "model", recipe(STAGE))
    assert {path.name for path in attempt.artifact.iterdir()} & {"vocab.json", "merges.txt", "tokenizer.json"} == {
        "tokenizer.json"
    }
    (_, tokenizer), (_, after) = opened(tmp_path / "model", "causal"), opened(attempt.artifact, "causal")
    assert len(after) < 0.8 * len(tokenizer)
    assert after.tokenize(TASK[3]) == tokenizer.tokenize(TASK[3])


def test_it_may_be_done_again(tmp_path: Path) -> None:
    written(tmp_path / "model", "gpt2")
    once = compressed(tmp_path / "once", tmp_path / "model", recipe({**STAGE, "min_count": 30}))
    twice = compressed(tmp_path / "twice", tmp_path / "model", recipe(STAGE, {**STAGE, "min_count": 30}))
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        assert (once.artifact / name).read_bytes() == (twice.artifact / name).read_bytes(), name


@pytest.mark.parametrize("step", ["tokens.count", "tokens.compare", "model.layers.0"])
def test_a_stopped_job_goes_on_and_gives_the_same_bytes(step: str, tmp_path: Path) -> None:
    written(tmp_path / "model", "llama")
    body = recipe(STAGE, {"technique": "gptq", "group_size": 32})
    undisturbed = compressed(tmp_path / "undisturbed", tmp_path / "model", body)
    attempt = fetched(tmp_path / "work", tmp_path / "model", body)

    def emit(event: dict[str, Any]) -> None:
        if str(event.get("step")).startswith(step):
            raise Stopped

    with pytest.raises(Stopped):
        compress(attempt.work, attempt.request, emit)
    compress(attempt.work, attempt.request, attempt.events.append)
    for path in undisturbed.artifact.iterdir():
        assert path.read_bytes() == (attempt.artifact / path.name).read_bytes(), path.name
    counted = [event for event in attempt.events if event.get("step") == "tokens.count"]
    assert len(counted) == (step == "tokens.count")


@pytest.mark.parametrize(
    ("options", "texts", "code", "param"),
    [
        ({"num_tokens": 20}, TASK, "invalid_value", "recipe.stages[0].num_tokens"),
        ({"multiple_of": 1024}, TASK, "invalid_value", "recipe.stages[0].multiple_of"),
        ({"keep": ["Ġgluons", "no token"]}, TASK, "invalid_value", "recipe.stages[0].keep[1]"),
    ],
)
def test_what_cannot_be_is_refused(
    options: dict[str, Any], texts: list[str], code: str, param: str, tmp_path: Path
) -> None:
    written(tmp_path / "model", "gpt2")
    attempt = fetched(tmp_path / "work", tmp_path / "model", recipe({**STAGE, **options}, dataset={"texts": texts}))
    with pytest.raises(UserError) as caught:
        compress(attempt.work, attempt.request, attempt.events.append)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_a_text_that_uses_every_token_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "model", "gpt2")
    once = compressed(tmp_path / "once", tmp_path / "model", recipe(STAGE))
    shutil.copytree(once.artifact, tmp_path / "again")
    attempt = fetched(tmp_path / "work", tmp_path / "again", recipe(STAGE))
    with pytest.raises(UserError) as caught:
        compress(attempt.work, attempt.request, attempt.events.append)
    assert (caught.value.code, caught.value.param) == ("nothing_changed", "recipe.stages[0]")


def test_a_tokenizer_that_reads_otherwise_with_fewer_tokens_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "model", "gpt2")
    attempt = fetched(tmp_path / "work", tmp_path / "model", recipe(STAGE))
    # As if a token's own merges did not matter: those that make it are gone then.
    monkeypatch.setattr(TokenizerJson, "closure", lambda self, token: {self.ids[token]})
    with pytest.raises(UserError) as caught:
        compress(attempt.work, attempt.request, attempt.events.append)
    assert caught.value.code == "tokenizer_not_reproduced"


def test_an_unknown_character_costs_a_unigram_as_much_as_before() -> None:
    """Its cost hangs on the lowest score of all: here that of a token that no text uses."""
    from tokenizers import Tokenizer, models

    pieces = [("<unk>", 0.0), ("a", -1.0), ("abc", -40.0), ("def", -40.0), ("cdef", -1.0), ("zz", -1000.0)]
    before = Tokenizer(models.Unigram(pieces, unk_id=0))
    assert before.encode("abcdef").tokens == ["abc", "def"]
    tokens = TokenizerJson(before.to_str())
    kept = sorted(tokens.required() | {2, 3, 4})
    after = Tokenizer.from_str(tokens.pruned({old: new for new, old in enumerate(kept)}))
    assert after.encode("abcdef").tokens == ["abc", "def"]
    without = Tokenizer(models.Unigram(pieces[:-1], unk_id=0))
    assert without.encode("abcdef").tokens == ["a", "b", "cdef"]


@pytest.mark.parametrize(
    ("change", "problem"), [({"type": "Other"}, "Other"), ({"type": "BPE", "dropout": 0.1}, "dropout")]
)
def test_what_is_no_known_tokenizer_is_told(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        TokenizerJson(json.dumps({"model": {"vocab": {}, "merges": [], **change}, "added_tokens": []}))


@pytest.fixture(scope="module", params=KINDS)
def tokenizers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any, dict[int, int]]:
    """A tokenizer, the same with the tokens of half of the task, and the new ids."""
    from tokenizers import Tokenizer

    write_tokenizer(folder := tmp_path_factory.mktemp("kinds"), request.param)
    before = Tokenizer.from_file(str(folder / "tokenizer.json"))
    content = TokenizerJson(before.to_str())
    names = {index: token for token, index in content.ids.items()}
    kept = content.required()
    for text in TASK[::2]:
        for index in before.encode(text).ids:
            kept |= content.closure(names[index])
    new_id_of = {old: new for new, old in enumerate(sorted(kept))}
    assert len(new_id_of) < 0.8 * before.get_vocab_size()
    return before, Tokenizer.from_str(content.pruned(new_id_of)), new_id_of


_WORDS = sorted({word for text in [*TASK, *OTHERS] for word in text.replace(";", " ; ").split()})
_TEXTS = st.lists(st.one_of(st.sampled_from(_WORDS), st.text("abcdeprst ü'.;0123 ", max_size=8)), max_size=12).map(
    " ".join
)


@given(text=_TEXTS)
def test_whatever_is_written_with_kept_tokens_is_written_as_before(
    tokenizers: tuple[Any, Any, dict[int, int]], text: str
) -> None:
    before, after, new_id_of = tokenizers
    old, new = before.encode(text), after.encode(text)
    words: list[dict[int | None, list[int | None]]] = [{}, {}]
    for word, index in zip(old.word_ids, old.ids, strict=True):
        words[0].setdefault(word, []).append(new_id_of.get(index))
    for word, index in zip(new.word_ids, new.ids, strict=True):
        words[1].setdefault(word, []).append(index)
    for word, ids in words[0].items():
        if None not in ids:
            assert words[1][word] == ids


def test_merge_paths_are_those_of_the_library(tmp_path: Path) -> None:
    """Merges are done in order of their rank: what they pass through is what fewer of them leave."""
    from tokenizers import models

    write_tokenizer(tmp_path, "byte_level")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    tokens = TokenizerJson(json.dumps(content))
    merges = [tuple(pair) for pair in content["model"]["merges"]]
    for token in random.Random(0).sample(sorted(content["model"]["vocab"]), 30):
        if token.startswith("<"):
            continue
        passed = {tokens.ids[character] for character in token}
        for number in range(len(merges) + 1):
            model = models.BPE(content["model"]["vocab"], merges[:number])
            passed |= {piece.id for piece in model.tokenize(token)}
        assert tokens.closure(token) == passed
