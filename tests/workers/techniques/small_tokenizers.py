"""Tokenizers of every kind, trained on a few sentences, and models that have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor

from tests.models import write_tiny_model
from workers.architectures import AUTO_CLASSES, Task

TASK = [
    f"The parcel number {number} was returned to the sender; the courier's fee is {number * 3} euros."
    for number in range(40)
]
# What the tokenizers were trained on beside it: words that the task never uses.
OTHERS = [
    "Quantum chromodynamics describes quarks, gluons and their confinement in hadrons.",
    "Sourdough bread wants flour, water, salt, patience and a warm kitchen.",
    "Der schnelle braune Fuchs springt über den faulen Hund und läuft davon.",
    "Large language models are made smaller by pruning and quantization.",
]
SIZES = {"intermediate_size": 128, "vocab_size": 640}
KINDS = ("byte_level", "byte_fallback", "word_piece", "unigram", "word_level", "ignore_merges", "suffixed")


def write_tokenizer(folder: Path, kind: str, vocab_size: int = 600) -> None:
    """Write a tokenizer of this kind to ``folder``, beside the model that is there."""
    tokenizer, trainer, special = _untrained(kind, vocab_size)
    tokenizer.train_from_iterator([*TASK, *OTHERS * 3], trainer)
    if kind in ("byte_fallback", "ignore_merges"):
        tokenizer = _changed(tokenizer, kind)
    ids = {token: tokenizer.get_vocab()[token] for token in special.values()}
    if kind in ("word_piece", "word_level"):
        sep, cls = (("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
        tokenizer.post_processor = processors.BertProcessing(sep, cls)
    if kind == "byte_level" and "</s>" in ids:
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"])),
            ]
        )
    if kind in ("byte_fallback", "unigram"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", ids["<s>"])]
        )
    tokenizer.add_tokens([AddedToken("<extra>", special=False)])
    folder.mkdir(parents=True, exist_ok=True)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)  # type: ignore[no-untyped-call]


def _untrained(kind: str, vocab_size: int) -> tuple[Tokenizer, Any, dict[str, str]]:
    of_bert = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    of_llama = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    of_roberta = {
        "cls_token": "<s>",
        "pad_token": "<pad>",
        "sep_token": "</s>",
        "mask_token": "<mask>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    options: dict[str, Any] = {"vocab_size": vocab_size, "show_progress": False}
    if kind == "word_piece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(prefix="##")
        return tokenizer, trainers.WordPieceTrainer(special_tokens=list(of_bert.values()), **options), of_bert
    if kind == "word_level":
        tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return tokenizer, trainers.WordLevelTrainer(special_tokens=list(of_bert.values()), **options), of_bert
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        return (
            tokenizer,
            trainers.UnigramTrainer(unk_token="<unk>", special_tokens=["<unk>", "<s>", "</s>"], **options),
            of_llama,
        )
    if kind == "byte_fallback":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        special_tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        return tokenizer, trainers.BpeTrainer(special_tokens=special_tokens, **options), of_llama
    if kind == "suffixed":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
        return (
            tokenizer,
            trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"], end_of_word_suffix="</w>", **options),
            of_llama,
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = of_roberta if kind == "byte_level" else {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    special_tokens = list(dict.fromkeys(named.values()))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(special_tokens=special_tokens, initial_alphabet=alphabet, **options), named


def _changed(tokenizer: Tokenizer, kind: str) -> Tokenizer:
    """The tokenizer with what no trainer makes."""
    content = json.loads(tokenizer.to_str())
    content["model"][kind] = True
    if kind == "byte_fallback":  # bytes are tokens of the model, and not looked for in a text
        content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    else:  # words that no merge makes
        vocab = content["model"]["vocab"]
        for word in ("Ġparcel", "Ġsourdough"):
            vocab.setdefault(word, len(vocab))
        content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) != "Ġparcel"]
    return Tokenizer.from_str(json.dumps(content))


def write_model(folder: Path, model_type: str, kind: str, **config: Any) -> Task:
    """Write a model with rows beyond its tokens, and a tokenizer of this kind; its task."""
    task: Task = config.pop("task", "causal")
    scratch = folder.parent / f"{folder.name}-tokenizer"
    write_tokenizer(scratch, kind)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(scratch)
    named = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids = {name: value for name, value in named.items() if value is not None}
    write_tiny_model(folder, model_type, task=task, **{**SIZES, **ids, "scale": 4.0, **config})
    for path in scratch.iterdir():
        path.rename(folder / path.name)
    return task


def opened(folder: Path, task: Task) -> tuple[Any, Any]:
    """Model and tokenizer, by plain transformers."""
    auto: Any = getattr(transformers, AUTO_CLASSES[task])
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def logits_of(model: Any, ids: list[int]) -> Tensor:
    """Tokens × vocabulary, or classes."""
    return torch.as_tensor(model(input_ids=torch.tensor([ids])).logits[0])
