"""Masks: exactly as many zeros as asked for, and always the smallest weights."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.solvers.pruning import magnitude_mask, wanda_mask


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), sparsity=st.floats(0.01, 0.99), rows=st.integers(1, 9), columns=st.integers(2, 40))
def test_unstructured_masks_take_exactly_the_smallest(seed: int, sparsity: float, rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    mask = magnitude_mask(weight, sparsity, None)
    assert int(mask.sum()) == round(sparsity * weight.numel())
    if mask.any() and not mask.all():
        assert float(weight[mask].abs().max()) <= float(weight[~mask].abs().min())


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    pattern=st.sampled_from([(2, 4), (1, 4), (4, 8), (1, 2), (3, 5)]),
    columns=st.integers(5, 43),
)
def test_every_group_of_m_keeps_exactly_its_n_largest(seed: int, pattern: tuple[int, int], columns: int) -> None:
    n, m = pattern
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(seed))
    mask = magnitude_mask(weight, 1 - n / m, pattern)
    whole = columns - columns % m
    groups, kept = weight[:, :whole].reshape(6, -1, m).abs(), ~mask[:, :whole].reshape(6, -1, m)
    assert bool((kept.sum(dim=-1) == n).all())
    expected = groups.topk(n, dim=-1).values.sum(dim=-1)
    torch.testing.assert_close((groups * kept).sum(dim=-1), expected)
    assert not bool(mask[:, whole:].any())


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    pattern=st.sampled_from([None, (2, 4), (1, 4), (3, 5)]),
    columns=st.integers(5, 43),
    parts=st.lists(st.floats(0, 1), min_size=1, max_size=4),
)
def test_a_part_of_a_mask_is_its_smallest_weights_and_grows_to_all_of_it(
    seed: int, pattern: tuple[int, int] | None, columns: int, parts: list[float]
) -> None:
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(seed))
    sparsity = 0.6 if pattern is None else 1 - pattern[0] / pattern[1]
    whole = magnitude_mask(weight, sparsity, pattern)
    for part in sorted(parts):
        before, weight = weight, weight.clone()
        mask = magnitude_mask(weight, sparsity, pattern, part=part)
        assert abs(int(mask.sum()) - part * int(whole.sum())) <= 1
        assert bool(whole[mask].all())
        assert not bool(((before == 0) & ~mask).any())
        if mask.any() and (whole & ~mask).any():
            assert float(weight[mask].abs().max()) <= float(weight[whole & ~mask].abs().min())
        weight[mask] = 0
    assert torch.equal(magnitude_mask(weight, sparsity, pattern), whole)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), sparsity=st.floats(0.01, 0.99), rows=st.integers(1, 9), columns=st.integers(2, 40))
def test_wanda_takes_the_least_important_of_every_row(seed: int, sparsity: float, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, norms = torch.randn(rows, columns, generator=generator), torch.rand(columns, generator=generator)
    mask = wanda_mask(weight, norms, sparsity, None)
    assert int(mask.sum()) == round(sparsity * weight.numel())
    score = weight.abs() * norms
    for row in range(rows):
        assert abs(int(mask[row].sum()) - sparsity * columns) < 1.01
        if mask[row].any() and not mask[row].all():
            assert float(score[row][mask[row]].max()) <= float(score[row][~mask[row]].min())


def test_wanda_weighs_by_the_input() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    norms = torch.tensor([10.0, 10.0, 0.1, 0.0])
    assert wanda_mask(weight, norms, 0.5, None).tolist() == [[False, False, True, True]]
    assert wanda_mask(weight, norms, 0.5, (2, 4)).tolist() == [[False, False, True, True]]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), sparsity=st.floats(0.0, 1.0), rows=st.integers(1, 9), columns=st.integers(1, 40))
def test_wanda_takes_the_first_of_equal_scores(seed: int, sparsity: float, rows: int, columns: int) -> None:
    weight = torch.randint(-2, 3, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    mask = wanda_mask(weight, torch.ones(columns), sparsity, None)
    order = weight.abs().argsort(dim=1, stable=True)
    for row in range(rows):
        assert sorted(order[row, : int(mask[row].sum())].tolist()) == mask[row].nonzero().flatten().tolist()


def test_equal_weights_are_pruned_in_a_fixed_order() -> None:
    assert magnitude_mask(torch.ones(2, 4), 0.5, None).flatten().tolist() == [True] * 4 + [False] * 4
