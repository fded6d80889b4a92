"""What a smaller shape costs in perplexity, and what training gives back: SmolLM2-135M on WikiText-2.

    .venv/bin/python -m bench.structure [--only influence-3 width-distilled] [--num-samples 64] [--steps 100]

As bench.quality does it: the same calibration samples, the same tokens of the test text, in float32 by plain
transformers, and what was measured is kept in .bench/quality, for every number of steps apart. Stages that train read
WikiText-2's validation text. The claims below the table are paired by token; a difference counts from 2 standard
errors on.
"""

from __future__ import annotations

import argparse
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from bench.jobs import report_of, run_job
from bench.materials import FOLDER, smollm2, wikitext
from bench.quality import Losses, print_claims, shown

COUNTS = (3, 6)
DEPTH, WIDTH = {"technique": "depth_pruning"}, {"technique": "width_pruning"}
# Of 1536 neurons, 3 key-value heads with 3 heads each, and 576 channels.
PARTS = {"neurons": {"intermediate_size": 1280}, "heads": {"num_key_value_heads": 2}, "channels": {"hidden_size": 504}}
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"influence-{count}": {**DEPTH, "num_blocks": count} for count in COUNTS},
    **{f"perplexity-{count}": {**DEPTH, "method": "perplexity", "num_blocks": count} for count in COUNTS},
    # What needs no measuring: the last blocks but one.
    **{f"late-{count}": {**DEPTH, "method": "list", "blocks": list(range(29 - count, 29))} for count in COUNTS},
    **{f"{part}-activations": {**WIDTH, **sizes} for part, sizes in PARTS.items()},
    **{f"{part}-magnitude": {**WIDTH, **sizes, "importance": "magnitude"} for part, sizes in PARTS.items()},
}
CLAIMS = [
    *((f"perplexity-{count}", f"influence-{count}") for count in COUNTS),
    *((f"influence-{count}", f"late-{count}") for count in COUNTS),
    *((f"{part}-activations", f"{part}-magnitude") for part in PARTS),
]

# To 70 % of the parameters of the blocks: 9 of 30 blocks left out, or 928 of 1536 neurons left.
CUTS = {"depth": {**DEPTH, "num_blocks": 9}, "width": {**WIDTH, "intermediate_size": 928}}
# The same number by factors; and the middle blocks in pairs.
LOW_RANK = {"technique": "low_rank", "ratio": 0.7}
SHARED = {"technique": "share_layers", "groups": [[first, first + 1] for first in range(6, 24, 2)]}
ROUNDS = 4
TRAINED_CLAIMS = [
    *((f"{cut}-distilled", f"{cut}-{other}") for cut in CUTS for other in ("cut", "alone", "random")),
    ("width-distilled", "depth-distilled"),
    ("width-soft", "width-cut"),
    ("width-synthetic", "width-cut"),
    ("width-synthetic", "halfway"),
    ("width-synthetic", "halfway-with-hard-targets"),
    ("low-rank-recovered", "low-rank"),
    ("shared-recovered", "shared"),
    ("rounds", "at-once"),
    *((f"trained-{bits}", f"gptq-{bits}") for bits in (2, 3)),
    ("trained-4", "nearest-4"),
]


def trained_settings(num_steps: int) -> dict[str, list[dict[str, Any]]]:
    """By name, the stages of settings around so many steps of training."""
    batch = {"batch_size": 4, "max_seq_length": 256}
    shape = {"num_steps": num_steps, **batch, "learning_rate": 3e-4, "num_evaluations": 4}
    distil = {"technique": "logit_distillation", "alpha": 0.5, **shape}
    codes = {"group_size": 64}
    settings: dict[str, list[dict[str, Any]]] = {}
    for name, cut in CUTS.items():
        settings |= {
            f"{name}-cut": [cut],
            f"{name}-distilled": [cut, distil],
            f"{name}-alone": [cut, {"technique": "fine_tuning", **shape}],
            f"{name}-random": [cut, {**distil, "initialization": "random"}],
        }
    # Without hard targets: what the teacher says of real text, and of its own.
    soft = {**distil, "alpha": 0.0}
    settings["width-soft"] = [CUTS["width"], soft]
    settings["width-synthetic"] = [CUTS["width"], {**soft, "synthetic": {"num_samples": 4 * num_steps}}]
    # Adapters are small, and begin at zero.
    adapt = {**distil, "technique": "lora_recovery", "learning_rate": 1e-3}
    settings |= {"low-rank": [LOW_RANK], "low-rank-recovered": [LOW_RANK, adapt]}
    settings |= {"shared": [SHARED], "shared-recovered": [SHARED, distil]}
    prune = {"technique": "wanda", "sparsity": 0.6}
    settings["at-once"] = [prune, distil]
    inner = {**distil, "num_steps": num_steps // ROUNDS}
    settings["rounds"] = [{"technique": "iterate", "rounds": ROUNDS, "stages": [prune, inner]}]
    for bits in (2, 3, 4):
        scheme = {"scheme": f"W{bits}A16", **codes}
        trained = {**distil, "technique": "quantization_aware_finetuning", "learning_rate": 5e-5}
        settings[f"trained-{bits}"] = [{**trained, **scheme}]
        settings[f"gptq-{bits}"] = [{"technique": "gptq", **scheme}]
    settings["nearest-4"] = [{"technique": "round_to_nearest", "scheme": "W4A16", **codes}]
    return settings


def main() -> None:
    """Measure what is not known yet and print the table."""
    known = [*SETTINGS, *trained_settings(ROUNDS)]
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="*", choices=known, metavar="SETTING", default=known)
    arguments.add_argument("--num-samples", type=int, default=64)
    arguments.add_argument("--steps", type=int, default=100)
    options = arguments.parse_args()
    losses = Losses(options.num_samples)
    losses.of("original", lambda _: smollm2())
    trained = trained_settings(options.steps)
    names = {name: f"{name}@{options.steps}" for name in trained}
    for name in options.only:
        if name in SETTINGS:
            losses.of(name, partial(losses.compress, SETTINGS[name]))
        else:
            losses.of(names[name], partial(_trained, names[name], trained[name], options.num_samples))
    for name in ("original", *SETTINGS, *names.values()):
        if name in losses.known:
            print(f"| {name} | {shown(losses.known[name])} | {_speed(name)} |")
    print_claims(CLAIMS, losses.known)
    measured = {name: losses.known[label] for name, label in names.items() if label in losses.known}
    # Where text of the teacher gives back half of what real text does: by the same loss, and with hard targets too.
    for real, name in (("width-soft", "halfway"), ("width-distilled", "halfway-with-hard-targets")):
        if {"width-cut", real} <= measured.keys():
            measured[name] = (measured["width-cut"] + measured[real]) / 2
    print_claims(TRAINED_CLAIMS, measured)


def _trained(name: str, stages: list[dict[str, Any]], num_samples: int, _work: Path) -> Path:
    """The artifact of a job with a training text."""
    folder = FOLDER / "data" / "wikitext"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "wikitext-valid.txt").write_text(wikitext("valid"), encoding="utf-8")
    text = {"dataset": "file:wikitext-valid.txt"}
    recipe = {
        "stages": stages,
        "training": text,
        "calibration": {**text, "num_samples": num_samples, "max_seq_length": 512},
        "evaluation": {"num_tokens": 4_096},
    }
    artifact = run_job(f"smollm2-{name}", smollm2(), recipe, folder)
    shutil.rmtree(artifact.parent / "source", ignore_errors=True)
    return artifact


def _speed(name: str) -> str:
    """How much faster than the original the artifact read, as its report has it; nothing where no job made one."""
    artifact = FOLDER / "jobs" / f"smollm2-{name}" / "artifact"
    if not (artifact / "report.json").exists():
        return ""
    speed = report_of(artifact)["speed"]
    return f"{speed['artifact']['tokens_per_second'] / speed['original']['tokens_per_second']:.2f} ×"


if __name__ == "__main__":
    main()
