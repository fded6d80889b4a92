"""How fast models answer: first-token latency and tokens a second, written or read, measured in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from workers.errors import CrashError, JobError, UserError, is_out_of_memory, model_unusable
from workers.sources.tokenizer_file import tokenizer_failures

NUM_NEW_TOKENS = 32
NUM_ROUNDS = 3
PASSES_A_ROUND = 4  # of an encoder over one sequence


@dataclass(frozen=True)
class Speed:
    """Medians over the rounds, batch of one, greedy decoding; encoders write nothing, and are timed as they read."""

    first_token_seconds: float | None
    tokens_per_second: float


@torch.inference_mode()
def measure_speed(
    models: Mapping[str, Any], tokenizers: Mapping[str, Any], prompt: str
) -> tuple[dict[str, Speed], dict[str, str]]:
    """The speed of each model, and what each writes after ``prompt``, with its own tokenizer.

    Models take turns, so that a machine that slows down slows all of them down. Models have to be warm.
    """
    first: dict[str, list[float]] = {name: [] for name in models}
    rates: dict[str, list[float]] = {name: [] for name in models}
    texts: dict[str, str] = {}
    for _ in range(NUM_ROUNDS):
        for name, model in models.items():
            tokenizer = tokenizers[name]
            inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
            begin = time.perf_counter()
            _generate(model, inputs, 1)
            once = time.perf_counter() - begin
            begin = time.perf_counter()
            output = _generate(model, inputs, NUM_NEW_TOKENS)
            whole = time.perf_counter() - begin
            first[name].append(once)
            rates[name].append((NUM_NEW_TOKENS - 1) / max(whole - once, 1e-9))
            texts[name] = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    speeds = {name: Speed(statistics.median(first[name]), statistics.median(rates[name])) for name in models}
    return speeds, texts


@torch.inference_mode()
def measure_reading(models: Mapping[str, Any], input_ids: Mapping[str, torch.Tensor]) -> dict[str, Speed]:
    """How many tokens of its sequence each model reads in a second; models take turns, and have to be warm."""
    rates: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(NUM_ROUNDS):
        for name, model in models.items():
            begin = time.perf_counter()
            for _ in range(PASSES_A_ROUND):
                _read(model, input_ids[name])
            rates[name].append(PASSES_A_ROUND * input_ids[name].numel() / (time.perf_counter() - begin))
    return {name: Speed(None, statistics.median(values)) for name, values in rates.items()}


@torch.inference_mode()
def check_reads(model: Any, input_ids: torch.Tensor) -> None:
    """Have the model read a sequence; raises UserError ``model_unusable`` where it cannot."""
    try:
        _read(model, input_ids)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise model_unusable(error) from error


def check_prompt(tokenizer: Any, prompt: str, max_positions: int) -> None:
    """Raise UserError ``prompt_too_long`` where the model has no positions for ``prompt`` and what it will write."""
    with tokenizer_failures("invalid_tokenizer", "The tokenizer failed on the prompt"):
        num_tokens = len(tokenizer(prompt, verbose=False)["input_ids"])
    longest = max_positions - NUM_NEW_TOKENS + 1  # what is written last is not read
    if num_tokens > longest:
        raise UserError(
            "prompt_too_long",
            f"The prompt has {num_tokens} tokens, {NUM_NEW_TOKENS} are written after it, and the model has "
            f"{max_positions} positions.",
            param="recipe.evaluation.prompt",
            hint=f"Shorten it to {longest} tokens." if longest > 0 else "The model has too few positions to be timed.",
        )


def check_runs(model: Any, tokenizer: Any, prompt: str) -> None:
    """Have the model continue ``prompt`` by two tokens; raises UserError ``model_unusable`` where it cannot."""
    try:
        _generate(model, tokenizer(prompt, return_tensors="pt", return_token_type_ids=False), 2)
    except Exception as error:
        if isinstance(error, JobError) or is_out_of_memory(error):
            raise
        raise model_unusable(error) from error


def _read(model: Any, input_ids: torch.Tensor) -> None:
    model(input_ids=input_ids.unsqueeze(0).to(model.device))
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def _generate(model: Any, inputs: Any, num_tokens: int) -> torch.Tensor:
    """Exactly ``num_tokens`` more, the likeliest each time."""
    # A model's own generation_config.json may stop after a millisecond, search beams or repeat: what is measured must
    # be the same work for every model. generate() fills gaps from the model's, so that one is set aside.
    own, model.generation_config = model.generation_config, GenerationConfig(pad_token_id=0)  # type: ignore[no-untyped-call]
    try:
        output: torch.Tensor = model.generate(
            **inputs.to(model.device), max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False
        )
    finally:
        model.generation_config = own
    if output.device.type == "cuda":
        torch.cuda.synchronize()
    num_new = output.shape[1] - inputs["input_ids"].shape[1]
    if num_new != num_tokens:
        raise CrashError("speed_not_measured", f"{num_new} tokens were generated where {num_tokens} were asked for.")
    return output
