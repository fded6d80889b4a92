"""How far an attempt is, and how long it will take."""

from __future__ import annotations

from workers.supervisor.messages import ProgressMessage, StageMessage
from workers.supervisor.progress import Progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def progress_message(fraction: float) -> ProgressMessage:
    return ProgressMessage(event="progress", fraction=fraction, stage=0, step="model.layers.1", block=2, num_blocks=4)


def left_after(progress: Progress, clock: Clock, seconds: float) -> int | None:
    clock.now += seconds
    return progress.eta_seconds


def test_the_fraction_weighs_the_phases_and_never_falls() -> None:
    progress = Progress(["gptq"])
    fractions = []
    for phase in ("fetch", "compress", "certify"):
        progress.begin(phase)
        for fraction in (0.0, 0.5, 0.2, 1.0):
            progress.update(progress_message(fraction))
            fractions.append(progress.snapshot()["fraction"])
    assert fractions == sorted(fractions)
    assert fractions[3] == 0.02
    assert fractions[-1] == 1


def test_the_time_left_of_steady_work_is_right_and_counts_down_between_messages() -> None:
    clock = Clock()
    progress = Progress(["gptq"], clock)
    assert left_after(progress, clock, 0) is None
    for second in range(1, 51):
        clock.now = second
        if second == 2:
            progress.begin("compress")
        if second > 2:
            progress.update(progress_message((second / 100 - 0.02) / 0.73))
    assert progress.eta_seconds == 50
    assert [left_after(progress, clock, seconds) for seconds in (10, 1000)] == [40, 1]


def test_a_quick_fetch_promises_nothing() -> None:
    clock = Clock()
    progress = Progress(["gptq"], clock)
    clock.now = 0.1
    progress.update(progress_message(1.0))
    assert progress.eta_seconds is None
    progress.begin("compress")
    clock.now = 5.1
    progress.update(progress_message(0.05))
    assert progress.eta_seconds == 95 + 34


def test_a_slow_block_changes_the_estimate_little() -> None:
    clock = Clock()
    progress = Progress(["gptq"], clock)
    progress.begin("compress")
    for second in range(1, 11):
        clock.now = second
        progress.update(progress_message(second / 100))
    before = progress.eta_seconds
    clock.now = 20
    progress.update(progress_message(0.11))
    after = progress.eta_seconds
    assert before is not None
    assert after is not None
    assert after < before * 1.5


def test_stages_gather_their_metrics() -> None:
    progress = Progress(["magnitude", "gptq"])
    assert progress.update_stage(StageMessage(event="stage", index=1, status="running", metrics={"a": 1}))
    assert progress.update_stage(StageMessage(event="stage", index=1, status="succeeded", metrics={"b": 2}))
    assert not progress.update_stage(StageMessage(event="stage", index=2, status="running"))
    assert progress.stages == [
        {"index": 0, "technique": "magnitude", "status": "pending", "metrics": {}},
        {"index": 1, "technique": "gptq", "status": "succeeded", "metrics": {"a": 1, "b": 2}},
    ]
