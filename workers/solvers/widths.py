"""Which of several choices to make for each of many things under one budget: a knapsack of choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choices:
    """What one thing may be: what each choice costs of the budget, and what is lost by it. Cheapest first."""

    costs: tuple[int, ...]
    losses: tuple[float, ...]


def choose(things: Sequence[Choices], budget: int) -> list[int]:
    """The number of the choice for each thing: the sum of costs at most ``budget``, the sum of losses small.

    From the cheapest choices on, the step that saves most loss for its cost is taken as long as one fits (Everett's
    Lagrange multipliers, 1963, along the convex hull of each thing's choices, then what is left of the budget spent
    on what still fits). Less than one step of one thing is lost against the best choice.
    The cheapest choices have to fit.
    """
    chosen = [0] * len(things)
    room = budget - sum(thing.costs[0] for thing in things)
    assert room >= 0, "even the cheapest choices cost more than the budget"
    while True:
        steps = [
            (_saving(thing, chosen[number], choice), -number, choice)
            for number, thing in enumerate(things)
            for choice in range(chosen[number] + 1, len(thing.costs))
            if thing.costs[choice] - thing.costs[chosen[number]] <= room
        ]
        if not steps or (best := max(steps))[0] <= 0.0:
            return chosen
        number, choice = -best[1], best[2]
        room -= things[number].costs[choice] - things[number].costs[chosen[number]]
        chosen[number] = choice


def _saving(thing: Choices, before: int, after: int) -> float:
    """Loss saved for each unit of the budget."""
    cost = thing.costs[after] - thing.costs[before]
    saved = thing.losses[before] - thing.losses[after]
    return saved / cost if cost > 0 else float("inf") * saved if saved > 0 else 0.0
