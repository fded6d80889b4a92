"""A classifier made small: MiniLM tuned on a task, then half as deep, in 4 bits, and both, against the same rows.

    .venv/bin/python -m bench.classifier [--data phishing spam] [--epochs 3] [--student-epochs 3] \
        [--half-epochs 6]

Rows are divided by a seed. Every number is on the held-out ones, in float32 by plain transformers, of artifacts that
jobs of this program have made; differences are paired by row, with their 95 % interval.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from app.catalog.presets import PRESETS
from bench.jobs import report_of, run_job
from bench.materials import FOLDER, minilm, shared_file

INTERVAL = 1.96  # standard errors to each side
MAX_LENGTH = 128
# Half of six blocks, and what teaches the others. Without the teacher `alpha` is 1, and all else is the same.
HALF = {"technique": "depth_pruning", "method": "divergence", "num_blocks": 3}
TAUGHT = {
    "technique": "logit_distillation",
    "alpha": 0.0,
    "max_seq_length": MAX_LENGTH,
    "learning_rate": 3e-4,
    "augmentation": {"mask_probability": 0.1, "delete_probability": 0.1},
}


@dataclass(frozen=True)
class Task:
    """Labelled rows."""

    file: str
    num_held_out: int
    rows: Callable[[Path], list[tuple[str, str]]]
    positive: str  # the label that F1 is of


def _phishing(path: Path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["url"], row["status"]) for row in csv.DictReader(file)]


def _spam(path: Path) -> list[tuple[str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(text, label) for label, _, text in (line.partition("\t") for line in lines) if text.strip()]


TASKS = {
    # Some rows repeat and are left out of evaluation: so many are left of which 1,500 are to be.
    "phishing": Task("phishing_urls.csv", 1_600, _phishing, "phishing"),
    "spam": Task("sms_spam.tsv", 1_700, _spam, "spam"),
}


def divided(name: str) -> tuple[Path, list[tuple[str, str]]]:
    """A folder with ``train.csv`` and ``held_out.csv``, and the held-out rows."""
    task, folder = TASKS[name], FOLDER / "data" / name
    # The same text under one label or two would be learned by heart, or never.
    rows = sorted({text.strip(): label for text, label in task.rows(shared_file(task.file))}.items())
    random.Random(0).shuffle(rows)
    parts = {"held_out": rows[: task.num_held_out], "train": rows[task.num_held_out :]}
    folder.mkdir(parents=True, exist_ok=True)
    for part, chosen in parts.items():
        with (folder / f"{name}-{part}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label"))
            writer.writerows(chosen)
    return folder, parts["held_out"]


def recipe_of(name: str, *stages: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """The stages on the task's rows."""
    fields = {"text_field": "text", "label_field": "label"}
    return {
        "stages": list(stages),
        "training": {"dataset": f"file:{name}-train.csv", **fields},
        "evaluation": {
            "dataset": f"file:{name}-held_out.csv",
            **fields,
            "num_tokens": 4_194_304,
            "max_seq_length": MAX_LENGTH,
        },
        "seed": seed,
    }


@torch.inference_mode()
def read(artifact: Path, rows: list[tuple[str, str]]) -> tuple[list[str], list[float]]:
    """The label that a classifier gives each row, and its cross entropy with the row's own (nats)."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(artifact, dtype=torch.float32)
    model.eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(artifact)
    found: list[str] = []
    losses: list[float] = []
    for begin in range(0, len(rows), 32):
        texts = [text for text, _ in rows[begin : begin + 32]]
        encoded = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=MAX_LENGTH)
        logits: Tensor = model(**encoded).logits
        found += [model.config.id2label[index] for index in logits.argmax(dim=-1).tolist()]
        numbers = torch.tensor([model.config.label2id[label] for _, label in rows[begin : begin + 32]])
        losses += torch.nn.functional.cross_entropy(logits, numbers, reduction="none").tolist()
    return found, losses


def f1(labels: list[str], found: list[str], positive: str) -> float:
    """Of one class."""
    both = sum(label == positive == guess for label, guess in zip(labels, found, strict=True))
    claimed, there = found.count(positive), labels.count(positive)
    return 2 * both / (claimed + there) if claimed + there else 0.0


def shown(ours: list[float], theirs: list[float], scale: float, unit: str, digits: int) -> str:
    """Mean of the differences by row, and its 95 % interval."""
    values = scale * (torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64))
    mean, error = float(values.mean()), float(values.std() / len(ours) ** 0.5)
    low, high = mean - INTERVAL * error, mean + INTERVAL * error
    return f"{mean:+.{digits}f} {unit} [{low:+.{digits}f}, {high:+.{digits}f}]"


def shown_f1(labels: list[str], one: list[str], other: list[str], positive: str) -> str:
    """The difference of F1 and its 95 % interval, by resampling rows."""
    generator = random.Random(0)
    drawn = []
    for _ in range(2_000):
        rows = [generator.randrange(len(labels)) for _ in labels]
        chosen = [[each[row] for row in rows] for each in (labels, one, other)]
        drawn.append(100 * (f1(chosen[0], chosen[1], positive) - f1(chosen[0], chosen[2], positive)))
    drawn.sort()
    mean = 100 * (f1(labels, one, positive) - f1(labels, other, positive))
    return f"{mean:+.2f} points [{drawn[50]:+.2f}, {drawn[1949]:+.2f}]"


def main() -> None:
    """Make what is not there yet, and print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", nargs="*", choices=TASKS, default=list(TASKS))
    arguments.add_argument("--epochs", type=float, default=3.0)
    arguments.add_argument("--student-epochs", type=float, default=3.0)
    arguments.add_argument("--half-epochs", type=float, default=6.0)
    options = arguments.parse_args()
    for name in options.data:
        measure(name, options.epochs, options.student_epochs, options.half_epochs)


def measure(name: str, epochs: float, student_epochs: float, half_epochs: float) -> None:
    """One task."""
    folder, rows = divided(name)
    shape = {"max_seq_length": MAX_LENGTH, "learning_rate": 1e-4, "num_epochs": epochs}
    tune = {"technique": "fine_tuning", "task": "classification", **shape}
    teacher = run_job(f"{name}-teacher", minilm(), recipe_of(name, tune), folder)
    preset = PRESETS["classifier-7x"].recipe["stages"]
    preset = [stage | ({"num_epochs": student_epochs} if "num_epochs" in stage else {}) for stage in preset]
    taught = {**TAUGHT, "num_epochs": half_epochs}
    alone = {**taught, "alpha": 1.0}
    made = {
        "teacher": teacher,
        "half, distilled": run_job(f"{name}-half", teacher, recipe_of(name, HALF, taught), folder),
        "half, tuned without the teacher": run_job(f"{name}-half-alone", teacher, recipe_of(name, HALF, alone), folder),
        "half, cut alone": run_job(f"{name}-half-cut", teacher, recipe_of(name, HALF), folder),
        "classifier-7x": run_job(f"{name}-7x", teacher, recipe_of(name, *preset), folder),
        "classifier-7x, fewer tokens": run_job(
            f"{name}-7x-tokens", teacher, recipe_of(name, {"technique": "vocabulary_pruning"}, *preset), folder
        ),
    }
    labels, positive = [label for _, label in rows], TASKS[name].positive
    answers = {each: read(artifact, rows) for each, artifact in made.items()}
    found = {each: labels_found for each, (labels_found, _) in answers.items()}
    losses = {each: row_losses for each, (_, row_losses) in answers.items()}
    right = {each: [float(a == b) for a, b in zip(labels, guesses, strict=True)] for each, guesses in found.items()}
    print(f"\n{name}: {len(rows)} held-out rows\n\n| model | accuracy | F1 | cross entropy | bytes | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    original_bytes = report_of(teacher)["size"]["artifact_bytes"]
    for each, artifact in made.items():
        report = report_of(artifact)
        size, nats = report["size"]["artifact_bytes"], sum(losses[each]) / len(rows)
        accuracy = 100 * sum(right[each]) / len(rows)
        score = 100 * f1(labels, found[each], positive)
        print(f"| {each} | {accuracy:.2f} % | {score:.2f} | {nats:.3f} | {size:,} | {original_bytes / size:.2f} |")
    print()
    for one, other in (
        ("classifier-7x", "teacher"),
        ("classifier-7x, fewer tokens", "teacher"),
        ("half, distilled", "teacher"),
        ("half, distilled", "half, tuned without the teacher"),
        ("half, distilled", "half, cut alone"),
    ):
        accuracy_difference = shown(right[one], right[other], 100, "points", 2)
        nats_difference = shown(losses[one], losses[other], 1, "nats", 3)
        print(f"{one} less {other}: accuracy {accuracy_difference}, cross entropy {nats_difference}, F1", end=" ")
        print(shown_f1(labels, found[one], found[other], positive))
    kept = sum(right["half, distilled"]) / sum(right["teacher"])
    speeds = report_of(made["half, distilled"])["speed"]
    ratio = speeds["artifact"]["tokens_per_second"] / speeds["original"]["tokens_per_second"]
    print(f"half the blocks keep {100 * kept:.1f} % of the teacher's accuracy and read {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
