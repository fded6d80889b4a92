"""What is minimised: cross entropy with the text, divergence from the teacher, and distance of hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Rows of logits that are there at a time: a vocabulary may be a hundred times as wide as what it is made from.
ROWS_AT_A_TIME = 512
# Of logits that a CPU takes from product to gradient at once: the dozen tensors on the way then stay in its cache, and
# the whole head takes half the time (`bench.training_step`).
_CACHED_BYTES = 4 * 2**20

# From logits of some rows of a piece (rows × tokens of the vocabulary), and which rows of it these are, to the sum of
# their losses.
LossOfRows = Callable[[Tensor, slice], Tensor]
# From which rows a piece has to the losses of those.
LossOfPieces = Callable[[slice], LossOfRows]


class _LossOfHeads(torch.autograd.Function):
    """The loss of a wide head, some rows at a time: gradients are taken where the logits are, which then go."""

    @staticmethod
    def forward(
        context: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None, losses: LossOfPieces
    ) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        needs = context.needs_input_grad[:3]
        of_hidden = torch.zeros_like(hidden)
        of_weight = torch.zeros_like(weight) if needs[1] else None
        of_bias = torch.zeros_like(bias) if needs[2] and bias is not None else None
        # Leaves of their own for all pieces: under autocast each new one would be cast, and the cast kept.
        own_weight, own_bias = (None if each is None else each.detach().requires_grad_() for each in (weight, bias))
        for begin in range(0, hidden.shape[0], ROWS_AT_A_TIME):
            rows = slice(begin, min(begin + ROWS_AT_A_TIME, hidden.shape[0]))
            with torch.set_grad_enabled(any(needs)):
                inputs = [hidden[rows].detach().requires_grad_(), own_weight, own_bias]
                outputs = nn.functional.linear(*inputs)  # type: ignore[arg-type]
            total += _loss_and_gradient(outputs.detach(), cap, losses(rows), takes_gradient=any(needs))
            if not any(needs):
                continue
            wanted = [each for each, is_needed in zip(inputs, needs, strict=True) if is_needed and each is not None]
            found = iter(torch.autograd.grad(outputs, wanted, outputs.detach()))
            if needs[0]:
                of_hidden[rows] = next(found)
            if of_weight is not None:
                of_weight += next(found)
            if of_bias is not None:
                of_bias += next(found)
        context.save_for_backward(of_hidden, of_weight, of_bias)
        return total

    @staticmethod
    def backward(context: Any, *of_output: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if each is None else each * of_output[0] for each in context.saved_tensors]
        needed = context.needs_input_grad
        return (*(each if needed[index] else None for index, each in enumerate(scaled)), None, None)


def loss_of_head(hidden: Tensor, head: nn.Module, cap: float | None, losses: LossOfPieces) -> Tensor:
    """The sum of ``losses`` over the rows of ``hidden`` (rows × hidden size), as the linear ``head`` reads them."""
    weight, bias = head.get_parameter("weight"), getattr(head, "bias", None)
    total: Tensor = _LossOfHeads.apply(hidden, weight, bias, cap, losses)  # type: ignore[no-untyped-call]
    return total


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None) -> Tensor:
    """What a head makes of hidden states, in float32; ``cap`` is where some models bend their logits."""
    return _capped(nn.functional.linear(hidden, weight, bias), cap)


def _capped(outputs: Tensor, cap: float | None) -> Tensor:
    logits = outputs.float()
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _loss_and_gradient(outputs: Tensor, cap: float | None, loss_of: LossOfRows, *, takes_gradient: bool) -> Tensor:
    """The loss of what a head gave (rows × tokens of the vocabulary), in whose place its gradient is written."""
    num_rows, num_tokens = outputs.shape
    total = torch.zeros((), device=outputs.device)
    at_once = num_rows if outputs.is_cuda else max(1, _CACHED_BYTES // (4 * num_tokens))
    for begin in range(0, num_rows, at_once):
        rows = slice(begin, min(begin + at_once, num_rows))
        with torch.set_grad_enabled(takes_gradient):
            own = outputs[rows].requires_grad_(takes_gradient)
            loss = loss_of(_capped(own, cap), rows)
        total += loss.detach()
        if takes_gradient:
            [outputs[rows]] = torch.autograd.grad(loss, [own])
    return total


def divergence(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ student) at ``temperature``, times its square (arXiv:1503.02531): the sum over rows, nats."""
    log_student = (logits / temperature).log_softmax(dim=-1)
    log_teacher = (teacher_logits.float() / temperature).log_softmax(dim=-1)
    sums = nn.functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return sums * temperature**2


def divergence_of_top(logits: Tensor, values: Tensor, tokens: Tensor, log_total: Tensor, temperature: float) -> Tensor:
    """The same from the teacher's largest logits: all other tokens are taken together, as one outcome.

    ``values`` and ``tokens`` are rows × k, ``log_total`` the logarithm, at ``temperature``, of what all tokens sum to.
    """
    log_student = (logits / temperature).log_softmax(dim=-1).gather(-1, tokens)
    log_teacher = values.float() / temperature - log_total.unsqueeze(-1)
    of_rest = [torch.log1p(-each.exp().sum(dim=-1).clamp(max=1 - 1e-6)) for each in (log_student, log_teacher)]
    log_student, log_teacher = (
        torch.cat([each, rest.unsqueeze(-1)], dim=-1)
        for each, rest in zip((log_student, log_teacher), of_rest, strict=True)
    )
    sums = nn.functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return sums * temperature**2


def distance(states: Tensor, teacher_states: Tensor) -> Tensor:
    """Mean square of the difference of hidden states (rows × hidden size), where the teacher's are 1 on average."""
    scale = teacher_states.float().square().mean().clamp(min=1e-12)
    return (states.float() - teacher_states.float()).square().mean() / scale
