"""What every technique costs in perplexity: SmolLM2-135M on WikiText-2, ours and llm-compressor's.

    .venv/bin/python -m bench.quality [--only gptq-4 sparsegpt-50] [--num-samples 64] [--skip-peer]

Each setting is compressed with the same calibration samples (WikiText-2's validation text) and scored on the same
tokens of its test text, in float32 by plain transformers. What was measured is kept in .bench/quality and measured
again only under other samples or tokens, so that the table grows from call to call; --again forgets it. The claims
below the table are paired by token; a difference counts from 2 standard errors on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from bench.materials import FOLDER, ROOT, peer_python, smollm2, wikitext
from bench.scoring import paired_difference, perplexity, token_losses
from workers.engine.text import calibration_samples

EVALUATION_TOKENS = 33_792  # 33 windows: just above 32k scored tokens
MAX_SEQ_LENGTH = 512
WORK = FOLDER / "quality"


def _widths(technique: str, **options: Any) -> dict[str, dict[str, Any]]:
    return {
        f"{technique}-{bits}": {"technique": technique, "scheme": f"W{bits}A16", "group_size": 64, **options}
        for bits in (4, 3)
    }


def _sparsities(technique: str) -> dict[str, dict[str, Any]]:
    return {
        **{f"{technique}-{percent}": {"technique": technique, "sparsity": percent / 100} for percent in (50, 60)},
        f"{technique}-2:4": {"technique": technique, "mask_structure": "2:4"},
    }


SETTINGS: dict[str, dict[str, Any]] = {
    **_widths("round_to_nearest"),
    **_widths("awq"),
    **_widths("gptq"),
    **_sparsities("magnitude"),
    **_sparsities("wanda"),
    **_sparsities("sparsegpt"),
    **{
        f"mixed-{bits}": {
            "technique": "mixed_precision",
            "average_bits": float(bits),
            "group_size": 64,
            "schemes": ["W2A16", "W3A16", "W4A16", "W5A16", "W6A16", "W8A16"],
        }
        for bits in (4, 3)
    },
    **{
        name.replace("gptq", "asymmetric"): {**stage, "asymmetric_calibration": True}
        for name, stage in _widths("gptq").items()
    },
    "smoothquant": {"technique": "smoothquant"},
    "smoothquant-even": {"technique": "smoothquant", "symmetric_activations": True},
    "dynamic_int8": {"technique": "dynamic_int8"},
    "fp8": {"technique": "round_to_nearest", "scheme": "FP8"},
    "nf4": {"technique": "round_to_nearest", "scheme": "NF4"},
}
# What llm-compressor cannot do without an accelerator, or not at all.
WITHOUT_PEER = {
    *("awq-4", "awq-3", "magnitude-50", "magnitude-60", "magnitude-2:4", "nf4", "mixed-4", "mixed-3"),
    *("asymmetric-4", "asymmetric-3", "smoothquant-even"),
}
CLAIMS = [
    *((f"{other}-{bits}", f"gptq-{bits}") for bits in (4, 3) for other in ("mixed", "asymmetric")),
    *((f"gptq-{bits}", f"{other}-{bits}") for bits in (4, 3) for other in ("awq", "round_to_nearest")),
    *(
        (f"{a}-{s}", f"{b}-{s}")
        for s in ("50", "60", "2:4")
        for a, b in (("sparsegpt", "wanda"), ("wanda", "magnitude"))
    ),
]
WITHIN_ONE_PERCENT = ("smoothquant", "fp8")


def main() -> None:
    """Measure what is not known yet, then print the table and the claims."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="*", choices=list(SETTINGS), default=list(SETTINGS), metavar="SETTING")
    arguments.add_argument("--num-samples", type=int, default=64)
    arguments.add_argument("--skip-peer", action="store_true")
    arguments.add_argument("--again", action="store_true", help="forget what was measured before")
    options = arguments.parse_args()
    if options.again:
        shutil.rmtree(WORK, ignore_errors=True)
    losses = Losses(options.num_samples)
    losses.of("original", lambda _: smollm2())
    for name in options.only:
        losses.of(name, partial(losses.compress, SETTINGS[name]))
        if not options.skip_peer and name not in WITHOUT_PEER:
            losses.of(f"{name} peer", partial(losses.compress_by_peer, SETTINGS[name]))
    print_table(losses.known)


class Losses:
    """Losses by setting, kept in files."""

    def __init__(self, num_samples: int) -> None:
        self.known: dict[str, Tensor] = {}
        self._model = smollm2()
        self._num_samples = num_samples
        tokenizer: Any = AutoTokenizer.from_pretrained(self._model)
        # Six characters a token are more than enough, and short enough for a job to take in whole.
        self._text = wikitext("valid")[: 6 * num_samples * MAX_SEQ_LENGTH]
        ids = torch.tensor(tokenizer(self._text)["input_ids"])
        self._samples = calibration_samples(ids, num_samples, MAX_SEQ_LENGTH, seed=0)
        self._test = torch.tensor(tokenizer(wikitext("test"))["input_ids"])[:EVALUATION_TOKENS]
        self._folder = WORK / f"{num_samples}x{MAX_SEQ_LENGTH}-{EVALUATION_TOKENS}"
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.glob("*.safetensors"):
            self.known[path.stem] = load_file(path)["losses"]

    def of(self, name: str, compress: Callable[[Path], Path]) -> None:
        """Know the losses of ``name``, whose model ``compress`` writes to a folder and names."""
        if name in self.known:
            return
        work = WORK / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        print(f"measuring {name}", flush=True)
        self.known[name] = token_losses(compress(work), self._test)
        save_file({"losses": self.known[name]}, self._folder / f"{name}.safetensors")

    def compress(self, stage: dict[str, Any], work: Path) -> Path:
        """Our artifact."""
        (work / "calibration.txt").write_text(self._text, encoding="utf-8")
        _run([sys.executable, "-m", "bench.our_side", str(self._model), str(work / "calibration.txt"),
              str(work / "attar"), "--num-samples", str(self._num_samples), "--max-seq-length", str(MAX_SEQ_LENGTH),
              "--stage", json.dumps(stage), "--num-threads", str(os.cpu_count() or 1)])  # fmt: skip
        return work / "attar" / "artifact"

    def compress_by_peer(self, stage: dict[str, Any], work: Path) -> Path:
        """llm-compressor's result."""
        save_file({"input_ids": self._samples}, work / "samples.safetensors")
        _run([str(peer_python()), str(ROOT / "bench" / "peer_side.py"), str(self._model),
              str(work / "samples.safetensors"), str(work / "peer"), "--stage", json.dumps(stage),
              "--num-threads", str(os.cpu_count() or 1)])  # fmt: skip
        return work / "peer"


def print_table(losses: dict[str, Tensor]) -> None:
    """Perplexities, then which claims hold."""
    print(f"\n| setting | Attar | llm-compressor | log-perplexity, ours less theirs |\n{'| --- ' * 4}|")
    print(f"| original | {shown(losses['original'])} | | |")
    for name in SETTINGS:
        if name not in losses:
            continue
        peer = losses.get(f"{name} peer")
        theirs, less = ("", "") if peer is None else (shown(peer), difference(losses[name], peer))
        print(f"| {name} | {shown(losses[name])} | {theirs} | {less} |")
    print()
    print_claims(CLAIMS, losses)
    for name in WITHIN_ONE_PERCENT:
        if name in losses:
            found = paired_difference(losses[name], losses["original"])
            verdict = "holds" if found.value - 2 * found.standard_error < 0.01 else "DOES NOT HOLD"
            print(f"{name} within 1 % of the original: {difference(losses[name], losses['original'])}: {verdict}")
    for name in SETTINGS:
        if name in losses and f"{name} peer" in losses:
            found = paired_difference(losses[name], losses[f"{name} peer"])
            verdict = "holds" if found.value < 2 * found.standard_error else "DOES NOT HOLD"
            print(f"{name} not above llm-compressor's: {verdict}")


def print_claims(claims: Sequence[tuple[str, str]], losses: Mapping[str, Tensor]) -> None:
    """Whether the first of each two is below the second, of those that were measured."""
    for better, worse in claims:
        if better in losses and worse in losses:
            found = paired_difference(losses[better], losses[worse])
            verdict = "holds" if found.value < -2 * found.standard_error else "DOES NOT HOLD"
            print(f"{better} below {worse}: {difference(losses[better], losses[worse])}: {verdict}")


def shown(losses: Tensor) -> str:
    """A perplexity with its standard error."""
    found = perplexity(losses)
    return f"{found.value:.3f} ± {found.standard_error:.3f}"


def difference(ours: Tensor, theirs: Tensor) -> str:
    """Of two log-perplexities, paired by token, with its standard error."""
    found = paired_difference(ours, theirs)
    return f"{found.value:+.4f} ± {found.standard_error:.4f}"


def _run(command: list[str]) -> None:
    log = WORK / "log.txt"
    with log.open("a") as output:
        ended = subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, check=False)
    if ended.returncode != 0:
        sys.exit(f"{' '.join(command)} failed; see {log}")


if __name__ == "__main__":
    main()
