"""What people read: progress in one line, plain lines in a file, and no control characters from elsewhere."""

import io
from typing import Any

import pytest
from rich.console import Console

from app.cli.display import JobDisplay, describe
from app.cli.output import duration, number, plain, size
from app.cli.report import print_report


def job(status: str = "running", **progress: Any) -> dict[str, Any]:
    return {
        "status": status,
        "attempt": 1,
        "queue": "cpu",
        "stages": [{"technique": "gptq"}],
        "progress": {"fraction": 0.0, **progress},
    }


def test_a_running_job_is_described_by_stage_block_and_time_left() -> None:
    running = job(stage=0, step="model.layers.11", block=11, num_blocks=30, eta_seconds=84)
    assert describe(running) == "running · gptq, block 12 of 30 · 1:24 left"


def test_a_training_counts_its_steps() -> None:
    training = job(stage=0, step="train", block=176, num_blocks=900)
    assert describe(training) == "running · gptq, step 176 of 900"


def test_a_plan_is_told_from_the_blocks_that_follow_it() -> None:
    planning = job(stage=0, step="plan.model.layers.11", block=11, num_blocks=30)
    assert describe(planning) == "running · gptq, planning, block 12 of 30"


def test_a_waiting_job_is_described_by_its_place() -> None:
    assert describe(job("queued", queue_position=2)) == "queued · number 2 in queue cpu"


def test_certification_is_no_stage() -> None:
    assert describe(job(stage=0, step="certify.open_original")) == "running · certify: open original"


def test_several_stages_and_attempts_are_counted() -> None:
    running = job(stage=1, step="load") | {"attempt": 2, "stages": [{"technique": "magnitude"}, {"technique": "gptq"}]}
    assert describe(running) == "running · stage 2 of 2: gptq, load · attempt 2"


def test_a_file_gets_plain_lines_and_few_of_them() -> None:
    output = io.StringIO()
    with JobDisplay(Console(file=output)) as display:
        for step in range(101):
            display.show(job(fraction=step / 100, stage=0))
    lines = output.getvalue().splitlines()
    assert 8 <= len(lines) <= 12
    assert "\x1b" not in output.getvalue()
    assert lines[0] == "  0 %  running · gptq"


def test_a_file_is_not_filled_by_a_job_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    hours = iter(range(0, 36_000_000, 3600))
    monkeypatch.setattr("time.monotonic", lambda: float(next(hours)))
    waiting = job() | {"status": "queued", "queue": "cpu"}
    with JobDisplay(Console(file=output)) as display:
        for _ in range(10):
            display.show(waiting)
    assert len(output.getvalue().splitlines()) == 1


def test_a_terminal_gets_a_live_line() -> None:
    output = io.StringIO()
    with JobDisplay(Console(file=output, force_terminal=True, width=80)) as display:
        display.show(job(fraction=0.5, stage=0))
    assert "\x1b[" in output.getvalue()


def test_control_characters_are_not_shown() -> None:
    assert plain("a\x1b[31mb\rc\nd\x07") == "a�[31mb�c\nd�"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_950, "1.0 MB"),
        (269_030_000, "269.0 MB"),
        (5e15, "5000.0 TB"),
        (None, "-"),
    ],
)
def test_sizes(num_bytes: float | None, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (84.4, "1:24"), (3765, "1:02:45"), (None, "-")])
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_numbers() -> None:
    assert (number(1234.5678, 2), number(None)) == ("1,234.57", "-")


REPORT: dict[str, Any] = {
    "model": {"id": "file:tiny", "revision": "0123456789abcdef"},
    "size": {
        "original_bytes": 269_030_000,
        "artifact_bytes": 110_000_000,
        "compression_ratio": 2.4457,
        "dense_bytes": 2.7e8,
    },
    "quality": {
        "num_tokens": 16384,
        "original_perplexity": 21.5,
        "original_perplexity_standard_error": 0.4,
        "perplexity": 24.25,
        "perplexity_standard_error": 0.5,
        "perplexity_ratio": 1.128,
        "kl_divergence": 0.1234,
        "kl_divergence_standard_error": 0.002,
        "top1_agreement": 0.871,
    },
    "quality_apart": {
        "text": "general",
        "num_tokens": 4095,
        "original_perplexity": 31.0,
        "original_perplexity_standard_error": 1.0,
        "perplexity": 62.0,
        "perplexity_standard_error": 2.0,
        "perplexity_ratio": 2.0,
    },
    "speed": {"original": {"tokens_per_second": 30.0}, "artifact": {"tokens_per_second": 25.0}},
    "generation": {"prompt": "The capital", "original": " of France", "artifact": " of [bold]Spain\x1b[2J"},
    "stages": [{"technique": "gptq", "metrics": {}, "fallbacks": [{"module": "x"}]}],
    "constraints": [{"name": "max_perplexity_ratio", "limit": 1.25, "value": 1.128, "status": "kept"}],
    "load_snippet": 'AutoModelForCausalLM.from_pretrained("here")',
}


def test_a_report_shows_before_and_after_with_errors() -> None:
    output = io.StringIO()
    print_report(Console(file=output, width=120, markup=False), REPORT)
    text = " ".join(output.getvalue().split())
    for expected in (
        "269.0 MB 110.0 MB 2.45 times smaller",
        "bytes of its dense form 270.0 MB",
        "perplexity (16,384 tokens) 21.50 ± 0.40 24.25 ± 0.50 × 1.128",
        "perplexity (4,095 tokens of general text) 31.00 ± 1.00 62.00 ± 2.00 × 2.000",
        "0.1234 ± 0.0020",
        "87.1 %",
        "max_perplexity_ratio: limit 1.250, measured 1.128: kept",
        "1 layer fell back",
        "from_pretrained",
    ):
        assert expected in text
    assert "[bold]Spain�[2J" in text, "a model's text is shown as it is, and moves no cursor"


def test_what_was_read_by_block_shows_no_speed_and_no_text() -> None:
    nothing = dict.fromkeys(("load_seconds", "first_token_seconds", "tokens_per_second"))
    generation = {"prompt": "The capital", "original": None, "artifact": " of Spain"}
    report = REPORT | {"opened": {"original": "by_block", "artifact": "whole"}, "generation": generation}
    report["speed"] = {"original": nothing, "artifact": {**nothing, "tokens_per_second": 25.0}}
    output = io.StringIO()
    print_report(Console(file=output, width=120, markup=False), report)
    text = " ".join(output.getvalue().split())
    assert "tokens per second - 25.0" in text
    assert "the original was read block by block" in text
    assert "The result continues: The capital" in text
    assert "of Spain" in text
    report |= {"opened": {"original": "by_block", "artifact": "by_block"}, "generation": None}
    report["speed"] = {"original": nothing, "artifact": nothing}
    output = io.StringIO()
    print_report(Console(file=output, width=120, markup=False), report)
    assert "speed is not measured" in output.getvalue()
    assert "tokens per second" not in output.getvalue()


def test_a_report_without_measurements_is_still_shown() -> None:
    output = io.StringIO()
    print_report(Console(file=output), {"model": {"id": "m", "revision": None}})
    assert output.getvalue()


def test_a_classifiers_report_shows_accuracy_and_no_perplexity() -> None:
    quality = {
        "num_tokens": 20_000,
        "num_windows": 800,
        "original_accuracy": 0.9321,
        "original_accuracy_standard_error": 0.0089,
        "accuracy": 0.925,
        "accuracy_standard_error": 0.0093,
        "accuracy_difference": -0.0071,
        "accuracy_difference_standard_error": 0.0031,
        "perplexity": None,
        "kl_divergence": 0.0123,
        "kl_divergence_standard_error": None,
        "top1_agreement": 0.985,
    }
    speed = {"load_seconds": 1.5, "first_token_seconds": None, "tokens_per_second": 900.0}
    report = REPORT | {"task": "classification", "quality": quality, "quality_apart": None, "generation": None}
    report["speed"] = {"original": speed, "artifact": speed}
    output = io.StringIO()
    print_report(Console(file=output, width=140, markup=False), report)
    text = " ".join(output.getvalue().split())
    assert "accuracy (800 texts) 0.9321 ± 0.0089 0.9250 ± 0.0093 -0.0071 ± 0.0031" in text
    assert "same class as the original 98.5 %" in text
    for absent in ("perplexity (", "first token", "Both continue"):
        assert absent not in text
