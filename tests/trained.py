"""A small Llama that the tests train themselves: on it can be seen what stages take away, and what they give back."""

from __future__ import annotations

import math
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NUM_BLOCKS = 6
_VOCAB_SIZE = 768
_LENGTH, _BATCH_SIZE, _NUM_STEPS, _HIGHEST_RATE = 128, 8, 560, 5e-3  # about 100 seconds on one thread
_EVERY = 5  # document of middling length is held out


def texts() -> tuple[list[str], list[str]]:
    """Documents of the language reference: what the model is trained on, and what neither it nor a stage reads."""
    found = [text for _, text in sorted(topics.items()) if len(text) > 500]
    held_out = [text for text in found if len(text) < 8_000][::_EVERY]
    return [text for text in found if text not in held_out], held_out


def write_trained_llama(folder: Path) -> None:
    """Train a Llama of 1.3 million parameters in float32 on the first of :func:`texts`, and write it to ``folder``."""
    training, _ = texts()
    tokenizer = _tokenizer(training)
    end = tokenizer.eos_token_id
    ids = torch.tensor([token for text in training for token in (*tokenizer(text)["input_ids"], end)])
    config = LlamaConfig(
        vocab_size=_VOCAB_SIZE, hidden_size=128, intermediate_size=384, num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=end, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=_HIGHEST_RATE, betas=(0.9, 0.95), weight_decay=0.05)
        for step in range(_NUM_STEPS):
            rate = min(1.0, (step + 1) / 20) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / _NUM_STEPS)) / 2)
            optimizer.param_groups[0]["lr"] = _HIGHEST_RATE * rate
            starts = torch.randint(len(ids) - _LENGTH, (_BATCH_SIZE,)).tolist()
            batch = torch.stack([ids[start : start + _LENGTH] for start in starts])
            optimizer.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(training: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = "<|endoftext|>"
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        training,
        trainers.BpeTrainer(
            vocab_size=_VOCAB_SIZE, special_tokens=[special], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=special, eos_token=special, pad_token=special
    )
