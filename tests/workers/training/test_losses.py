"""Losses against plain computations: the whole head at once, and probabilities written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from workers.training import losses
from workers.training.losses import (
    ROWS_AT_A_TIME,
    LossOfPieces,
    LossOfRows,
    distance,
    divergence,
    divergence_of_top,
    logits_of,
    loss_of_head,
)

NUM_ROWS, HIDDEN_SIZE, NUM_TOKENS = ROWS_AT_A_TIME + 37, 8, 23


def cross_entropy_with(targets: Tensor) -> LossOfPieces:
    def of_piece(piece: slice) -> LossOfRows:
        own = targets[piece]
        return lambda logits, rows: nn.functional.cross_entropy(logits, own[rows], reduction="sum")

    return of_piece


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_cached", [1, 100, NUM_ROWS])
def test_a_head_read_in_pieces_gives_the_loss_and_gradients_of_one_read_at_once(
    num_cached: int, bias: bool, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_CACHED_BYTES", 4 * NUM_TOKENS * num_cached)
    targets = torch.randint(NUM_TOKENS, (NUM_ROWS,), generator=torch.Generator().manual_seed(1))
    found = []
    for whole in (True, False):
        torch.manual_seed(0)
        body, head = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE), nn.Linear(HIDDEN_SIZE, NUM_TOKENS, bias=bias)
        hidden = body(drawn(NUM_ROWS, HIDDEN_SIZE))
        if whole:
            logits = head(hidden) if cap is None else cap * torch.tanh(head(hidden) / cap)
            loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        else:
            loss = loss_of_head(hidden, head, cap, cross_entropy_with(targets))
        (2 * loss).backward()  # type: ignore[no-untyped-call]
        found.append([loss.detach(), *(each.grad for each in (*body.parameters(), *head.parameters()))])
    for expected, given in zip(*found, strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-3)


def test_a_head_that_is_the_embedding_gets_the_gradients_of_both() -> None:
    weight = nn.Parameter(drawn(NUM_TOKENS, HIDDEN_SIZE))
    head = nn.Linear(HIDDEN_SIZE, NUM_TOKENS, bias=False)
    head.weight = weight
    ids, targets = torch.tensor([1, 2, 3]), torch.tensor([2, 3, 4])
    loss = loss_of_head(nn.functional.embedding(ids, weight), head, None, cross_entropy_with(targets))
    loss.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    other = weight.detach().clone().requires_grad_()
    logits = nn.functional.embedding(ids, other) @ other.T
    nn.functional.cross_entropy(logits, targets, reduction="sum").backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(weight.grad, other.grad)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_is_that_of_the_probabilities(temperature: float) -> None:
    student, teacher = drawn(5, NUM_TOKENS).double(), drawn(5, NUM_TOKENS, seed=1).double()
    p, q = ((each / temperature).softmax(dim=-1) for each in (teacher, student))
    expected = float((p * (p / q).log()).sum()) * temperature**2
    assert float(divergence(student, teacher, temperature)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_of_the_largest_logits_all_others_are_one_outcome(temperature: float) -> None:
    student, teacher = drawn(5, NUM_TOKENS), drawn(5, NUM_TOKENS, seed=1)
    values, tokens = teacher.topk(4, dim=-1)
    log_total = (teacher / temperature).logsumexp(dim=-1)
    p, q = ((each / temperature).softmax(dim=-1).double() for each in (teacher, student))
    kept = torch.zeros_like(p).scatter(-1, tokens, 1.0).bool()
    pairs = [(p[kept], q[kept]), *(((p * ~kept).sum(-1), (q * ~kept).sum(-1)),)]
    expected = sum(float((a * (a / b).log()).sum()) for a, b in pairs) * temperature**2
    found = divergence_of_top(student, values, tokens, log_total, temperature)
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_with_all_logits_the_largest_give_the_whole_divergence() -> None:
    student, teacher = drawn(5, NUM_TOKENS), drawn(5, NUM_TOKENS, seed=1)
    values, tokens = teacher.topk(NUM_TOKENS, dim=-1)
    found = divergence_of_top(student, values, tokens, teacher.logsumexp(dim=-1), 1.0)
    assert float(found) == pytest.approx(float(divergence(student, teacher, 1.0)), rel=1e-3)


def test_the_distance_of_states_is_a_fraction_of_the_teachers() -> None:
    teacher = 100 * drawn(6, HIDDEN_SIZE)
    assert float(distance(teacher, teacher)) == 0
    assert float(distance(torch.zeros_like(teacher), teacher)) == pytest.approx(1)


def test_logits_are_bent_where_a_model_bends_them() -> None:
    weight = 10 * drawn(NUM_TOKENS, HIDDEN_SIZE)
    logits = logits_of(drawn(2, HIDDEN_SIZE), weight, None, 30.0)
    assert float(logits.abs().max()) < 30
