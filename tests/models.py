"""Small random models with real tokenizers, written as `save_pretrained` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workers.architectures import AUTO_CLASSES, Task

_SPECIAL_TOKENS = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "mask_token": "<mask>"}
_SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "Large language models are made smaller by pruning and quantization.",
    "def compress(model): return model  # a comment with 0123456789 numbers",
    "A statement is executed for its effect; an expression is evaluated for its value.",
)


def write_tiny_llama(
    folder: Path,
    *,
    num_layers: int = 2,
    hidden_size: int = 64,
    intermediate_size: int = 128,
    vocab_size: int = 384,
    tie: bool = True,
    seed: int = 0,
) -> None:
    """Write a random Llama in bfloat16, its tokenizer trained on a few sentences, to ``folder``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_tokenizer(folder, vocab_size)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tie,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        dtype="bfloat16",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.bfloat16()
    model.save_pretrained(folder)


def write_tiny_model(
    folder: Path, model_type: str, *, task: Task = "causal", seed: int = 0, scale: float = 1.0, **config: Any
) -> None:
    """Write a random two-block model of ``model_type`` in bfloat16, with a tokenizer, to ``folder``.

    ``scale`` multiplies the weights of its linear layers.
    """
    import torch
    import transformers

    write_tokenizer(folder, 384, is_encoder=task != "causal")
    sizes = {
        "vocab_size": 384,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 0 if task == "causal" else 2,
        "pad_token_id": 0 if task == "causal" else 1,
        "dtype": "bfloat16",
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        auto: Any = getattr(transformers, AUTO_CLASSES[task])
        model = auto.from_config(transformers.CONFIG_MAPPING[model_type](**{**sizes, **config}))
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.data *= scale
            # Norms and biases that are all one, or all zero, would hide that they were left out.
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
    model.bfloat16()
    model.save_pretrained(folder)


def write_tokenizer(folder: Path, vocab_size: int, *, is_encoder: bool = False) -> None:
    """Write a byte-level BPE tokenizer of at most ``vocab_size`` tokens; any text can be encoded.

    That of an encoder puts its special tokens around a text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL_TOKENS.values()) if is_encoder else ["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    if is_encoder:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL_TOKENS).save_pretrained(folder)  # type: ignore[no-untyped-call]
        return
    special = "<|endoftext|>"
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=special, eos_token=special, pad_token=special
    ).save_pretrained(folder)
