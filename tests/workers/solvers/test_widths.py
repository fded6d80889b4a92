"""A choice for each of many things under one budget, against every combination."""

from __future__ import annotations

import itertools
import random

import pytest

from workers.solvers.widths import Choices, choose


def convex(generator: random.Random) -> Choices:
    """Widths 2, 3, 4 and 8 of a layer, whose loss falls fourfold with each bit."""
    size, loss = generator.randint(1, 9), generator.uniform(0.1, 10)
    return Choices(tuple(size * width for width in (2, 3, 4, 8)), tuple(loss * 4.0**-width for width in (2, 3, 4, 8)))


def total(things: list[Choices], chosen: tuple[int, ...] | list[int]) -> tuple[int, float]:
    """Cost and loss of a choice."""
    return (
        sum(thing.costs[choice] for thing, choice in zip(things, chosen, strict=True)),
        sum(thing.losses[choice] for thing, choice in zip(things, chosen, strict=True)),
    )


@pytest.mark.parametrize("seed", range(40))
def test_the_budget_is_kept_and_at_most_one_step_is_lost(seed: int) -> None:
    generator = random.Random(seed)
    things = [convex(generator) for _ in range(5)]
    least, most = total(things, [0] * 5)[0], total(things, [3] * 5)[0]
    budget = generator.randint(least, most)
    cost, loss = total(things, choose(things, budget))
    assert cost <= budget
    combinations = itertools.product(range(4), repeat=5)
    best = min(loss for cost, loss in (total(things, chosen) for chosen in combinations) if cost <= budget)
    step = max(thing.losses[i] - thing.losses[i + 1] for thing in things for i in range(3))
    assert loss <= best + step


def test_with_room_for_all_everything_is_at_its_best() -> None:
    things = [convex(random.Random(seed)) for seed in range(4)]
    assert choose(things, 10**6) == [3, 3, 3, 3]


def test_what_loses_most_gets_the_room() -> None:
    robust, sensitive = Choices((2, 4), (0.1, 0.0)), Choices((2, 4), (5.0, 0.1))
    assert choose([robust, sensitive], 6) == [0, 1]


def test_a_choice_that_costs_more_and_loses_as_much_is_not_made() -> None:
    assert choose([Choices((2, 4), (0.0, 0.0))], 100) == [0]
