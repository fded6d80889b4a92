"""The early stages of a recipe, each of which leaves a model for the next: another shape, or other weights.

What is left for the engine's last pass are the stages that compress layers while the artifact is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from workers.architectures.compact import Compact
from workers.disk import write_json
from workers.engine.change import check_changed
from workers.engine.journal import Journal
from workers.engine.reshaping import reshape
from workers.engine.shaping import Shaping
from workers.engine.skeleton import Skeleton
from workers.engine.stream import Stream
from workers.engine.student import make_student
from workers.export import copy_companions, plain_config
from workers.formats.parts import Parts
from workers.recipe import Recipe
from workers.recipe_parts import Output
from workers.stage_report import stage_report
from workers.techniques import (
    GPTQ,
    Iterate,
    LayerOptions,
    LogitDistillation,
    QuantizationAwareFineTuning,
    SparsityOptions,
    StageOptions,
    StructureOptions,
    TrainingOptions,
    VocabularyPruning,
)
from workers.texts import Texts
from workers.training.model import CHECKPOINT, opened_again
from workers.training.seeds import seed_of
from workers.training.stage import TrainingStage

Progress = Callable[[int, str, int, int, float], None]  # stage, step, block, num_blocks, fraction of the stage
Report = dict[str, Any]
Placed = tuple[str, StageOptions]  # a stage, and where it is in the recipe

_MAKING_SHARE = 0.05  # of the time of a stage that makes a student and trains it, roughly
_CODES = "codes"  # the folder with codes of a checkpoint that training begins with


class Preparation:
    """Runs the early stages of one job, and gathers what the report says of them."""

    def __init__(
        self,
        recipe: Recipe,
        texts: Texts,
        journal: Journal,
        waiting_bytes: int,
        progress: Progress,
        measured: Callable[[int, dict[str, Any]], None],
        finished: Callable[[int, dict[str, Any]], None],
    ) -> None:
        """What was decided is kept in ``journal``.

        ``measured`` hears of what a stage that trains measures on its way, ``finished`` of each stage with its metrics.
        """
        self.reports: list[Report] = []
        self.training_of_codes: dict[str, Any] = {}  # metrics, where the last stage trains what it then stores
        self._recipe = recipe
        self._texts = texts
        self._journal = journal
        self._waiting_bytes = waiting_bytes
        self._progress = progress
        self._measured = measured
        self._finished = finished
        self._round = ""  # of a stage that contains stages: which of them is run
        self._span = (0.0, 1.0)  # of the fall of the learning rate: the part that a stage has, of a round
        self.keeps_zeros = False  # whether weights that are zero were pruned, and have to stay so

    def run(self, skeleton: Skeleton) -> Skeleton:
        """The model as the early stages leave it.

        Raises:
            UserError: the model cannot become what a stage asks for.
        """
        teacher = skeleton
        early = [(self._recipe.param(index), stage) for index, stage in enumerate(self._recipe.early_stages)]
        for first, stages in _runs(early):
            journal = self._journal.inner(stage_name(first))
            is_whole, [_, stage] = skeleton is teacher, stages[0]
            if isinstance(stage, VocabularyPruning) and not is_whole:
                # A student can learn of tokens that it has alone, and reads text by them.
                teacher, _ = self._change(teacher, teacher, stages, first, journal)
            skeleton, reports = self._change(skeleton, teacher, stages, first, journal)
            # What learned its task before anything was taken from it is what a student learns from.
            takes_nothing = isinstance(stage, TrainingOptions) and not isinstance(stage, SparsityOptions)
            if is_whole and ((takes_nothing and not stage.reshapes) or isinstance(stage, VocabularyPruning)):
                teacher = skeleton
            for index, report in enumerate(reports, first):
                self.reports.append(report)
                self._finished(index, report["metrics"])
        if self._recipe.trains_codes:
            index, last = len(self._recipe.stages) - 1, self._recipe.stages[-1]
            assert isinstance(last, QuantizationAwareFineTuning)
            skeleton, told = self._train_codes(skeleton, teacher, last, index)
            self.training_of_codes = told["metrics"]
        return skeleton

    def _train_codes(
        self, skeleton: Skeleton, teacher: Skeleton, stage: QuantizationAwareFineTuning, index: int
    ) -> tuple[Skeleton, dict[str, Any]]:
        journal = self._journal.inner(stage_name(index))
        param = self._recipe.param(index)
        first_codes: Path | None = None
        if stage.initialization == "gptq":
            beginning = journal.inner("beginning")
            first_codes = beginning.folder / CHECKPOINT / _CODES
            if not journal.is_whole(CHECKPOINT):
                names = ("scheme", "group_size", "symmetric", "ignore")
                gptq = GPTQ.model_validate({name: getattr(stage, name) for name in names})
                self._compress_layers(skeleton, [(param, gptq)], index, beginning, keeps_codes=True)
        return self._train(skeleton, teacher, stage, param, index, journal, first_codes)

    def _change(
        self, skeleton: Skeleton, teacher: Skeleton, stages: Sequence[Placed], index: int, journal: Journal
    ) -> tuple[Skeleton, list[Report]]:
        """The model after one run of stages, the first of which is in stage ``index`` of the recipe; their reports."""
        param, stage = stages[0]
        if isinstance(stage, LayerOptions):
            skeleton, reports = self._compress_layers(skeleton, stages, index, journal)
            self.keeps_zeros |= any(isinstance(each, SparsityOptions) for _, each in stages)
            return skeleton, reports
        if isinstance(stage, Iterate):
            skeleton, report = self._iterate(skeleton, teacher, stage, param, index, journal)
            return skeleton, [report]
        if isinstance(stage, StructureOptions):
            shaping = Shaping(
                skeleton, param, self._texts, journal, self._waiting_bytes, partial(self._progress, index)
            )
            skeleton, metrics = reshape(shaping, stage)
        elif isinstance(stage, LogitDistillation) and stage.student is not None:
            skeleton, told = self._make_and_train(skeleton, teacher, stage, param, index, journal)
            return skeleton, [{"technique": stage.technique, **told}]
        else:
            assert isinstance(stage, TrainingOptions)
            skeleton, told = self._train(skeleton, teacher, stage, param, index, journal)
            self.keeps_zeros |= isinstance(stage, SparsityOptions)
            return skeleton, [{"technique": stage.technique, **told}]
        return skeleton, [_report(stage, metrics)]

    def _make_and_train(
        self,
        skeleton: Skeleton,
        teacher: Skeleton,
        stage: LogitDistillation,
        param: str,
        index: int,
        journal: Journal,
    ) -> tuple[Skeleton, dict[str, Any]]:
        """Make the student of a stage, which is trained then; each has a journal of its own."""

        def progress(step: str, block: int, num_blocks: int, fraction: float) -> None:
            self._progress(index, step, block, num_blocks, _MAKING_SHARE * fraction)

        shaping = Shaping(skeleton, param, self._texts, journal.inner("student"), self._waiting_bytes, progress)
        student, made = make_student(shaping, stage, seed_of(self._recipe.seed, index, "student"))
        skeleton, told = self._train(student, teacher, stage, param, index, journal.inner("training"))
        made["teacher_num_parameters"] = teacher.num_parameters
        return skeleton, {**told, "metrics": {**told["metrics"], "student": made}}

    def _train(
        self,
        skeleton: Skeleton,
        teacher: Skeleton,
        stage: TrainingOptions,
        param: str,
        index: int,
        journal: Journal,
        first_codes: Path | None = None,
    ) -> tuple[Skeleton, dict[str, Any]]:
        training = TrainingStage(
            stage,
            param,
            self._recipe,
            skeleton,
            teacher,
            f"{index}{self._round}",
            self._texts,
            journal,
            partial(self._progress, index),
            partial(self._measured, index),
            keeps_zeros=self.keeps_zeros,
            first_codes=first_codes,
            span=self._span,
        )
        told = training.run()
        return opened_again(journal.folder / CHECKPOINT, skeleton), told

    def _compress_layers(
        self,
        skeleton: Skeleton,
        stages: Sequence[Placed],
        index: int,
        journal: Journal,
        *,
        keeps_codes: bool = False,
    ) -> tuple[Skeleton, list[Report]]:
        """Run stages over all layers as the artifact's last ones are, and leave a checkpoint.

        With ``keeps_codes`` what stands for quantized layers lies in a folder of it, whether or not they changed.
        """
        recipe = self._recipe.with_stages(stages)
        recipe = recipe.model_copy(update={"output": Output(format="safetensors")})
        last = index + len(stages) - 1
        codes_too = Parts(journal.folder / _CODES) if keeps_codes else None

        def compressed(folder: Path) -> list[Report]:
            def progress(step: str, block: int, num_blocks: int, fraction: float) -> None:
                self._progress(last, step, block, num_blocks, fraction)

            calibration, probe = self._texts.calibration(skeleton), self._texts.probe(skeleton)
            stream = Stream(
                skeleton,
                recipe,
                journal,
                progress,
                self._waiting_bytes,
                keeps_zeros=self.keeps_zeros,
                codes_too=codes_too,
            )
            streamed = stream.run(calibration, probe)
            if codes_too is not None:
                shutil.copytree(codes_too.folder, folder / _CODES, dirs_exist_ok=True)
            else:
                check_changed(recipe, streamed, skeleton.checkpoint, journal.parts)
            journal.parts.assemble(folder)
            ranks = {name: found["rank"] for name, found in streamed.metrics(0).items() if found.get("rank")}
            write_json(folder / "config.json", plain_config(skeleton.checkpoint) | Compact(ranks).to_config())
            copy_companions(skeleton.checkpoint, folder)
            return [stage_report(recipe, number, streamed, skeleton) for number in range(len(stages))]

        reports: list[Report] = journal.folder_once(CHECKPOINT, compressed)
        shutil.rmtree(journal.parts.folder, ignore_errors=True)
        return opened_again(journal.folder / CHECKPOINT, skeleton), reports

    @staticmethod
    def _first_left(parts: Sequence[tuple[int, str, list[Placed]]], journal: Journal) -> int:
        """Which part of the rounds comes after the last that has left its model, whole."""
        for done in range(len(parts), 0, -1):
            _, name, inner = parts[done - 1]
            is_there = journal.has(f"reports-{done - 1:03d}") and (journal.folder / name).exists()
            if is_there and isinstance(inner[0][1], TrainingOptions) and journal.inner(name).is_whole(CHECKPOINT):
                return done
        return 0

    def _iterate(
        self, skeleton: Skeleton, teacher: Skeleton, stage: Iterate, param: str, index: int, journal: Journal
    ) -> tuple[Skeleton, Report]:
        """Run the rounds; a round's models are removed when the next one has its own."""
        rounds: list[list[Report]] = []
        own_progress = self._progress
        parts = [part for number in range(len(stage.fractions)) for part in _inner_runs(stage, param, number)]
        first = self._first_left(parts, journal)
        if first:
            skeleton = opened_again(journal.inner(parts[first - 1][1]).folder / CHECKPOINT, skeleton)
            self.keeps_zeros |= isinstance(stage.pruning, SparsityOptions)
        last: Report = _report(stage, {})
        for done, (number, name, inner) in enumerate(parts):

            def progress(_: int, step: str, block: int, num_blocks: int, fraction: float, done: int = done) -> None:
                own_progress(index, step, block, num_blocks, (done + fraction) / len(parts))

            self._progress, self._round = progress, f"/{name}"
            self._span = (number / len(stage.fractions), (number + 1) / len(stage.fractions))
            reports: list[Report] = []
            if done >= first:
                skeleton, reports = self._change(skeleton, teacher, inner, index, journal.inner(name))
            reports = journal.once(f"reports-{done:03d}", partial(list, reports))
            if isinstance(inner[0][1], TrainingOptions):  # all that came before is in its model
                for _, earlier, _ in parts[:done]:
                    shutil.rmtree(journal.folder / earlier, ignore_errors=True)
            if number == len(rounds):
                rounds.append([])
            rounds[-1] += reports
            if reports[-1]["layers"]:
                last = reports[-1]
        self._round, self._span = "", (0.0, 1.0)
        self._progress = own_progress
        told = [
            {"fraction": fraction, "stages": [{"technique": each["technique"], **each["metrics"]} for each in reports]}
            for fraction, reports in zip(stage.fractions, rounds, strict=True)
        ]
        metrics = {**last["metrics"], "rounds": told}
        return skeleton, {**last, "technique": stage.technique, "metrics": metrics}


def _runs(stages: Sequence[Placed]) -> list[tuple[int, list[Placed]]]:
    """Neighbours that compress layers together, all others alone; each run with the index of its first stage."""

    def is_in_a_run(placed_stage: Placed) -> bool:
        _, stage = placed_stage
        return isinstance(stage, LayerOptions) and not stage.leaves_model

    runs = groupby(enumerate(stages), lambda each: -1 if is_in_a_run(each[1]) else each[0])
    found = [list(run) for _, run in runs]
    return [(run[0][0], [stage for _, stage in run]) for run in found]


def _inner_runs(stage: Iterate, param: str, number: int) -> list[tuple[int, str, list[Placed]]]:
    """Of a round: its number, and the name of each of its parts with its stages."""
    inner = [(f"{param}.stages[{index}]", each) for index, each in stage.round(number)]
    return [(number, f"round-{number:02d}-{first}", stages) for first, stages in _runs(inner)]


def _report(stage: StageOptions, metrics: dict[str, Any]) -> Report:
    return {"technique": stage.technique, "metrics": metrics, "fallbacks": [], "layers": {}}


def stage_name(index: int) -> str:
    """Of the inner journal of an early stage."""
    return f"stage-{index:02d}"
