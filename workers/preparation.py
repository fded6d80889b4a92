"""The early stages of a recipe, each of which leaves a model for the next: another shape, or other weights.

What is left for the engine's last pass are the stages that compress layers while the artifact is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
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
from workers.rounds import Rounds
from workers.stage_report import stage_report
from workers.stage_runs import Place, Placed, Report, report_of, runs_of
from workers.techniques import (
    GPTQ,
    Iterate,
    LayerOptions,
    LogitDistillation,
    QuantizationAwareFineTuning,
    SparsityOptions,
    StructureOptions,
    TrainingOptions,
    VocabularyPruning,
)
from workers.texts import Texts
from workers.training.model import CHECKPOINT, opened_again
from workers.training.seeds import seed_of
from workers.training.stage import TrainingStage

Progress = Callable[[int, str, int, int, float], None]  # stage, step, block, num_blocks, fraction of the stage

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
        self.keeps_zeros = False  # whether weights that are zero were pruned, and have to stay so

    def run(self, skeleton: Skeleton) -> Skeleton:
        """The model as the early stages leave it.

        Raises:
            UserError: the model cannot become what a stage asks for.
        """
        teacher = skeleton
        early = [(self._recipe.param(index), stage) for index, stage in enumerate(self._recipe.early_stages)]
        for first, stages in runs_of(early):
            place, journal = self._place(first, len(stages)), self._journal.inner(stage_name(first))
            is_whole, [_, stage] = skeleton is teacher, stages[0]
            if isinstance(stage, VocabularyPruning) and not is_whole:
                # A student can learn of tokens that it has alone, and reads text by them.
                teacher, _ = self._change(teacher, teacher, stages, place, journal)
            skeleton, reports = self._change(skeleton, teacher, stages, place, journal)
            # What learned its task before anything was taken from it is what a student learns from.
            takes_nothing = isinstance(stage, TrainingOptions) and not isinstance(stage, SparsityOptions)
            if is_whole and ((takes_nothing and not stage.reshapes) or isinstance(stage, VocabularyPruning)):
                teacher = skeleton
            for index, report in enumerate(reports, first):
                self.reports.append(report)
                self._finished(index, report["metrics"])
        if self._recipe.trains_codes:
            last = self._recipe.stages[-1]
            assert isinstance(last, QuantizationAwareFineTuning)
            skeleton, report = self._train_codes(skeleton, teacher, last, self._place(len(self._recipe.stages) - 1))
            self.training_of_codes = report["metrics"]
        return skeleton

    def _place(self, first: int, num_stages: int = 1) -> Place:
        """Of stages of the recipe that are run together; the last of them is said to be under way."""
        return Place(first, partial(self._progress, first + num_stages - 1), str(first))

    def _train_codes(
        self, skeleton: Skeleton, teacher: Skeleton, stage: QuantizationAwareFineTuning, place: Place
    ) -> tuple[Skeleton, Report]:
        journal, param = self._journal.inner(stage_name(place.index)), self._recipe.param(place.index)
        first_codes: Path | None = None
        if stage.initialization == "gptq":
            beginning = journal.inner("beginning")
            first_codes = beginning.folder / CHECKPOINT / _CODES
            if not journal.is_whole(CHECKPOINT):
                names = ("scheme", "group_size", "symmetric", "ignore")
                gptq = GPTQ.model_validate({name: getattr(stage, name) for name in names})
                self._compress_layers(skeleton, [(param, gptq)], place, beginning, keeps_codes=True)
        return self._train(skeleton, teacher, (param, stage), place, journal, first_codes)

    def _change(
        self, skeleton: Skeleton, teacher: Skeleton, stages: Sequence[Placed], place: Place, journal: Journal
    ) -> tuple[Skeleton, list[Report]]:
        """The model after one run of stages, and their reports."""
        param, stage = stages[0]
        if isinstance(stage, LayerOptions):
            skeleton, reports = self._compress_layers(skeleton, stages, place, journal)
            self.keeps_zeros |= any(isinstance(each, SparsityOptions) for _, each in stages)
            return skeleton, reports
        if isinstance(stage, Iterate):
            rounds = Rounds(stage, param, journal)
            self.keeps_zeros |= rounds.num_done > 0 and isinstance(stage.pruning, SparsityOptions)
            skeleton, report = rounds.run(
                skeleton, place, lambda before, inner, *where: self._change(before, teacher, inner, *where)
            )
        elif isinstance(stage, StructureOptions):
            shaping = Shaping(skeleton, param, self._texts, journal, self._waiting_bytes, place.progress)
            skeleton, metrics = reshape(shaping, stage)
            report = report_of(stage, metrics)
        elif isinstance(stage, LogitDistillation) and stage.student is not None:
            skeleton, report = self._make_and_train(skeleton, teacher, param, stage, place, journal)
        else:
            skeleton, report = self._train(skeleton, teacher, stages[0], place, journal)
            self.keeps_zeros |= isinstance(stage, SparsityOptions)
        return skeleton, [report]

    def _make_and_train(
        self,
        skeleton: Skeleton,
        teacher: Skeleton,
        param: str,
        stage: LogitDistillation,
        place: Place,
        journal: Journal,
    ) -> tuple[Skeleton, Report]:
        """Make the student of a stage, which is trained then; each has a journal of its own."""

        def progress(step: str, block: int, num_blocks: int, fraction: float) -> None:
            place.progress(step, block, num_blocks, _MAKING_SHARE * fraction)

        shaping = Shaping(skeleton, param, self._texts, journal.inner("student"), self._waiting_bytes, progress)
        student, made = make_student(shaping, stage, seed_of(self._recipe.seed, place.index, "student"))
        skeleton, report = self._train(student, teacher, (param, stage), place, journal.inner("training"))
        made["teacher_num_parameters"] = teacher.num_parameters
        return skeleton, {**report, "metrics": {**report["metrics"], "student": made}}

    def _train(
        self,
        skeleton: Skeleton,
        teacher: Skeleton,
        placed_stage: Placed,
        place: Place,
        journal: Journal,
        first_codes: Path | None = None,
    ) -> tuple[Skeleton, Report]:
        param, stage = placed_stage
        assert isinstance(stage, TrainingOptions)
        training = TrainingStage(
            stage,
            param,
            self._recipe,
            skeleton,
            teacher,
            place,
            self._texts,
            journal,
            partial(self._measured, place.index),
            keeps_zeros=self.keeps_zeros,
            first_codes=first_codes,
        )
        report = {"technique": stage.technique, **training.run()}
        return opened_again(journal.folder / CHECKPOINT, skeleton), report

    def _compress_layers(
        self,
        skeleton: Skeleton,
        stages: Sequence[Placed],
        place: Place,
        journal: Journal,
        *,
        keeps_codes: bool = False,
    ) -> tuple[Skeleton, list[Report]]:
        """Run stages over all layers as the artifact's last ones are, and leave a checkpoint.

        With ``keeps_codes`` what stands for quantized layers lies in a folder of it, whether or not they changed.
        """
        recipe = self._recipe.with_stages(stages)
        recipe = recipe.model_copy(update={"output": Output(format="safetensors")})
        codes_too = Parts(journal.folder / _CODES) if keeps_codes else None

        def compressed(folder: Path) -> list[Report]:
            calibration, probe = self._texts.calibration(skeleton), self._texts.probe(skeleton)
            stream = Stream(
                skeleton,
                recipe,
                journal,
                place.progress,
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


def stage_name(index: int) -> str:
    """Of the inner journal of an early stage."""
    return f"stage-{index:02d}"
