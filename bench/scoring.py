"""Losses of every token, by the model as its user opens it, and what two models' losses say together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from workers.evaluation.estimates import Estimate, mean_with_error
from workers.formats import bitsandbytes
from workers.formats.shipped_loader import loader_of, name_of_loader

WINDOW = 1_024


@torch.inference_mode()
def token_losses(folder: Path, ids: Tensor) -> Tensor:
    """The loss (nats, float64) of every token but each window's first, in float32."""
    has_loader = name_of_loader(folder) is not None
    opens: Any = loader_of(folder).load_model if has_loader else AutoModelForCausalLM.from_pretrained
    model = opens(folder, dtype=torch.float32)
    bitsandbytes.to_float32(model)
    parts = []
    for window in torch.split(ids, WINDOW):
        logits = model(input_ids=window.unsqueeze(0), use_cache=False).logits[0, :-1]
        parts.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").double())
    return torch.cat(parts)


def perplexity(losses: Tensor) -> Estimate:
    """The exponential of the mean loss, with its standard error."""
    mean = mean_with_error(losses)
    return Estimate(math.exp(mean.value), math.exp(mean.value) * mean.standard_error)


def paired_difference(ours: Tensor, theirs: Tensor) -> Estimate:
    """Mean of ours less theirs, token by token: negative where ours is better."""
    return mean_with_error(ours - theirs)
