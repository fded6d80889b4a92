"""Rebuilds a tokenizer from a GGUF file's metadata, in the files that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.errors import UserError
from workers.sources.tokenizer_file import tokenizer_failures

# Splits of text before merging that GPT-2's own rule, or a digit at a time before it, stands for.
_GPT2_SPLITS = frozenset({"gpt-2"})
_DIGITS_FIRST = frozenset({"smollm", "starcoder", "codeshell", "refact", "command-r"})
_SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}


def write_tokenizer(metadata: Mapping[str, Any], config: Mapping[str, Any], folder: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and the chat template into ``folder``.

    Raises UserError ``tokenizer_missing`` or ``unsupported_tokenizer``.
    """
    tokens = _tokens(metadata, config["vocab_size"])
    special = {
        f"{name}_token": tokens[index]
        for name, key in _SPECIAL.items()
        if type(index := metadata.get(f"tokenizer.ggml.{key}")) is int and 0 <= index < len(tokens)
    }
    _build(metadata, special).save(str(folder / "tokenizer.json"))
    settings = {
        # The generic class takes tokenizer.json as it is; a model's own class would rebuild the splitting.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        **special,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _tokens(metadata: Mapping[str, Any], vocab_size: int) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise UserError(
            "tokenizer_missing",
            "The GGUF file holds no tokenizer.",
            param="model.id",
            hint="Convert the model to GGUF together with its tokenizer.",
        )
    if len(tokens) > vocab_size:
        raise _unsupported(f"it has {len(tokens)} tokens and the embedding only {vocab_size} rows")
    return tokens


def _build(metadata: Mapping[str, Any], special: Mapping[str, str]) -> Any:
    """The ``tokenizers.Tokenizer`` of the metadata."""
    from tokenizers import pre_tokenizers, processors
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_PRE_TOKENIZER_SPLITS,
        GGUF_TOKENIZER_MAPPING,
        convert_gguf_tokenizer,
    )

    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind not in {"gpt2", "llama"}:
        raise _unsupported(f"its kind is {str(kind)[:40]!r}")
    if kind == "gpt2" and split not in {*_GPT2_SPLITS, *_DIGITS_FIRST, *GGUF_PRE_TOKENIZER_SPLITS}:
        raise _unsupported(f"its way of splitting text, {str(split)[:40]!r}, is not known")
    names = GGUF_TOKENIZER_MAPPING["tokenizer"]
    described = {new: metadata[f"tokenizer.{old}"] for old, new in names.items() if f"tokenizer.{old}" in metadata}
    with tokenizer_failures("unsupported_tokenizer", "The GGUF file's tokenizer cannot be rebuilt"):
        tokenizer, _ = convert_gguf_tokenizer(metadata["general.architecture"], described)
    if kind == "gpt2" and split in _DIGITS_FIRST:
        # transformers leaves this out and would merge digits that the model has always seen one by one.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    # A vocabulary of SentencePiece begins its text with BOS where the file does not say otherwise.
    begin = special.get("bos_token") if metadata.get("tokenizer.ggml.add_bos_token", kind == "llama") else None
    end = special.get("eos_token") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    added = [token for token in (begin, end) if token is not None]
    if added:
        first, last = ([begin] if begin else []), ([end] if end else [])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *first, "$B:1", *last],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(added)],
        )
    return tokenizer


def _unsupported(problem: str) -> UserError:
    return UserError(
        "unsupported_tokenizer",
        f"The GGUF file's tokenizer cannot be rebuilt: {problem}.",
        param="model.id",
        hint="Use the model's safetensors with its own tokenizer.json.",
    )
