"""The rounds of ``iterate``: in each, contained stages are run on the model that the round before has left."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from workers.engine.journal import Journal
from workers.engine.skeleton import Skeleton
from workers.stage_runs import Place, Placed, Report, report_of, runs_of
from workers.techniques import Iterate, TrainingOptions
from workers.training.model import CHECKPOINT, opened_again

# Runs stages on a model; gives what they leave, and their reports.
Change = Callable[[Skeleton, Sequence[Placed], Place, Journal], tuple[Skeleton, list[Report]]]


class _Part(NamedTuple):
    """Stages of a round that are run together."""

    round: int
    name: str
    stages: list[Placed]

    @property
    def trains(self) -> bool:
        return isinstance(self.stages[0][1], TrainingOptions)


class Rounds:
    """The rounds of one stage, whose ``journal`` holds a model for each part of them, as long as one needs it."""

    def __init__(self, stage: Iterate, param: str, journal: Journal) -> None:
        self._stage = stage
        self._journal = journal
        self._parts = [part for number in range(len(stage.fractions)) for part in _parts_of(stage, param, number)]
        self.num_done = self._first_left()  # parts that an earlier attempt has behind it

    def run(self, skeleton: Skeleton, place: Place, change: Change) -> tuple[Skeleton, Report]:
        """What all rounds leave of the model, and the stage's report. A round's models go when the next has its own."""
        stage, journal, count = self._stage, self._journal, len(self._stage.fractions)
        if self.num_done:
            skeleton = opened_again(journal.inner(self._parts[self.num_done - 1].name).folder / CHECKPOINT, skeleton)
        rounds: list[list[Report]] = [[] for _ in range(count)]
        last = report_of(stage, {})
        for done, part in enumerate(self._parts):
            reports: list[Report] = []
            if done >= self.num_done:
                span = (part.round / count, (part.round + 1) / count)
                own_place = Place(place.index, self._progress(place, done), f"{place.name}/{part.name}", span)
                skeleton, reports = change(skeleton, part.stages, own_place, journal.inner(part.name))
            reports = journal.once(_reports(done), partial(list, reports))
            if part.trains:  # all that came before is in its model
                for earlier in self._parts[:done]:
                    shutil.rmtree(journal.folder / earlier.name, ignore_errors=True)
            rounds[part.round] += reports
            if reports[-1]["layers"]:
                last = reports[-1]
        told = [
            {"fraction": fraction, "stages": [{"technique": each["technique"], **each["metrics"]} for each in reports]}
            for fraction, reports in zip(stage.fractions, rounds, strict=True)
        ]
        return skeleton, {**last, "technique": stage.technique, "metrics": {**last["metrics"], "rounds": told}}

    def _progress(self, place: Place, done: int) -> Callable[[str, int, int, float], None]:
        def progress(step: str, block: int, num_blocks: int, fraction: float) -> None:
            place.progress(step, block, num_blocks, (done + fraction) / len(self._parts))

        return progress

    def _first_left(self) -> int:
        """Which part comes after the last that has left its model, whole."""
        for done in range(len(self._parts), 0, -1):
            part = self._parts[done - 1]
            is_there = self._journal.has(_reports(done - 1)) and (self._journal.folder / part.name).exists()
            if is_there and part.trains and self._journal.inner(part.name).is_whole(CHECKPOINT):
                return done
        return 0


def _parts_of(stage: Iterate, param: str, number: int) -> list[_Part]:
    """Of one round."""
    inner = [(f"{param}.stages[{index}]", each) for index, each in stage.round(number)]
    return [_Part(number, f"round-{number:02d}-{first}", stages) for first, stages in runs_of(inner)]


def _reports(done: int) -> str:
    """Of the journal's entry with the reports of a part."""
    return f"reports-{done:03d}"
