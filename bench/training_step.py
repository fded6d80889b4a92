"""Where a step of distillation spends its time: SmolLM2-135M, and itself as the student.

    .venv/bin/python -m bench.training_step [--threads 1] [--steps 3]

The losses of the head are timed twice, with logits taken some rows at a time and a whole piece at once, by turns.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from bench.materials import smollm2
from workers.engine.device import keeping_freed_memory, return_freed_memory, training_products
from workers.training import losses
from workers.training.losses import LossOfRows, divergence, logits_of, loss_of_head

BATCH = (4, 256)


def main() -> None:
    """Print the median seconds of each part."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--steps", type=int, default=3)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    return_freed_memory()
    teacher, student = _opened().eval().requires_grad_(False), _opened().train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    in_cache = losses._CACHED_BYTES
    found: dict[str, list[float]] = defaultdict(list)
    with keeping_freed_memory():
        for step in range(2 * options.steps + 2):
            whole = step % 2 == 1
            losses._CACHED_BYTES = 2**40 if whole else in_cache
            seconds = _step(teacher, student, optimizer)
            if step > 1:  # the first two take the memory
                for part, each in seconds.items():
                    found[f"{part}, at once" if whole and part == "head" else part].append(each)
    for part, every in found.items():
        print(f"| {part} | {median(every):.2f} |")


def _opened() -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)


def _step(teacher: Any, student: Any, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Seconds by part."""
    seconds: dict[str, float] = {}

    def timed(part: str, call: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = call()
        seconds[part] = time.perf_counter() - begin
        return result

    def hidden_of(model: Any) -> torch.Tensor:
        hidden: torch.Tensor = model.model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)

    ids = torch.randint(student.config.vocab_size, BATCH)
    targets = ids.flatten()
    optimizer.zero_grad(set_to_none=True)
    with training_products("auto"):
        with torch.no_grad():
            taught = timed("teacher, blocks", lambda: hidden_of(teacher))
        hidden = timed("student, blocks", lambda: hidden_of(student))

        def of_pieces(piece: slice) -> LossOfRows:
            with torch.no_grad():
                own = logits_of(taught[piece], teacher.lm_head.weight, None, None)
            expected = targets[piece]

            def loss_of(logits: torch.Tensor, rows: slice) -> torch.Tensor:
                hard = nn.functional.cross_entropy(logits, expected[rows], reduction="sum")
                return 0.5 * hard + 0.5 * divergence(logits, own[rows], 1.0)

            return loss_of

        loss = timed("head", lambda: loss_of_head(hidden, student.lm_head, None, of_pieces))
    timed("way back through the blocks", (loss / len(targets)).backward)
    timed("optimizer", optimizer.step)
    return seconds


if __name__ == "__main__":
    main()
