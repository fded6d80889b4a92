"""Tokens that are left out: the text reads as before, and the model says of it what it said."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
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
from workers.errors import UserError
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
    name, task, source, attempt = pruned
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
    assert name


def test_another_text_is_written_with_what_is_left(pruned: tuple[str, Task, Path, Attempt]) -> None:
    name, task, source, attempt = pruned
    kind = MODELS[name][1]
    (_, tokenizer), (_, after) = opened(source, task), opened(attempt.artifact, task)
    for text in OTHERS:
        before, ids = (
            tokenizer(text, add_special_tokens=False).input_ids,
            after(text, add_special_tokens=False).input_ids,
        )
        if kind in ("word_level", "suffixed"):  # words, or characters at their ends, that it does not know
            continue
        assert len(ids) > len(before)
        assert after.unk_token_id is None or after.unk_token_id not in ids
        assert after.decode(ids) == tokenizer.decode(before)


@torch.inference_mode()
def test_it_goes_on_as_the_original_does_with_kept_tokens(pruned: tuple[str, Task, Path, Attempt]) -> None:
    _, task, source, attempt = pruned
    if task != "causal":
        return
    (model, tokenizer), (after, new_tokenizer) = opened(source, task), opened(attempt.artifact, task)
    rows = kept_rows(tokenizer, new_tokenizer)
    others = [index for index in range(640) if index not in rows]
    ids = tokenizer("The parcel number 7 was", return_tensors="pt").input_ids
    new = new_tokenizer("The parcel number 7 was", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False, suppress_tokens=others)
    found = after.generate(new, max_new_tokens=24, min_new_tokens=24, do_sample=False)
    assert [rows[index] for index in found[0].tolist()] == expected[0].tolist()


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
