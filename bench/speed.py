"""One technique on SmolLM2-135M: our time and perplexity against llm-compressor's, in one call, in turns.

    .venv/bin/python -m bench.speed [--technique gptq | sparsegpt | wanda | smoothquant | awq | mixed_precision]
        [--runs 1] [--num-samples 64] [--our-samples 64 4]

Both take the same samples and threads, each in a process of its own: the peer in float32, we as jobs compute, which is
float32 but for products of calibration passes where the processor multiplies bfloat16. They are timed from the
start of the process to the files on disk. With --our-samples we take that many of them, in one run for each number: how
soon is the perplexity reached that the peer has with all? The limit is the floating-point operations of one forward
pass and of the Hessians at the rate that this machine reaches in a large product, measured between the runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from bench.materials import FOLDER, ROOT, peer_python, smollm2, wikitext
from bench.quality import SETTINGS
from bench.scoring import paired_difference, token_losses
from workers.engine.text import calibration_samples, read_documents, tokenize

EVALUATION_TOKENS = 16_384


def main() -> None:
    """Run, compare, print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--runs", type=int, default=1, help="of each, in turns")
    arguments.add_argument("--num-samples", type=int, default=64)
    arguments.add_argument("--our-samples", type=int, nargs="+", help="of our side, if not as many as the peer's")
    arguments.add_argument("--max-seq-length", type=int, default=512)
    techniques = ["gptq", "sparsegpt", "wanda", "smoothquant", "awq", "mixed_precision"]
    arguments.add_argument("--technique", choices=techniques, default="gptq")
    arguments.add_argument("--group-size", type=int, default=64, help="of gptq and awq")
    arguments.add_argument("--sparsity", type=float, default=0.5, help="of sparsegpt and wanda")
    arguments.add_argument("--mask-structure", help="of these two, such as 2:4; their sparsity follows from it")
    arguments.add_argument("--peer-observer", default="minmax", help="llm-compressor's default, or memoryless_mse")
    arguments.add_argument("--skip-peer", action="store_true")
    options = arguments.parse_args()
    # llm-compressor's AWQ stops without an accelerator, and it chooses no widths.
    has_peer = not options.skip_peer and options.technique not in {"awq", "mixed_precision"}
    model, python = smollm2(), peer_python() if has_peer else None
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    # Six characters a token are more than enough, and short enough for a job to take in whole.
    text = wikitext("valid")[: 6 * options.num_samples * options.max_seq_length]
    ids = torch.tensor(tokenizer(text)["input_ids"])
    samples = calibration_samples(ids, options.num_samples, options.max_seq_length, seed=0)
    work = FOLDER / "speed"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    save_file({"input_ids": samples}, work / "samples.safetensors")
    (work / "calibration.txt").write_text(text, encoding="utf-8")

    counts = options.our_samples or [options.num_samples]
    ours: dict[int, list[float]] = {count: [] for count in counts}
    theirs: list[float] = []
    rates = [gemm_rate()]
    for _ in range(options.runs):
        for count in counts:
            ours[count].append(_timed(_our_command(work, model, count, options)))
            rates.append(gemm_rate())
        if python is not None:
            theirs.append(_timed(_peer_command(python, work, model, options)))
            rates.append(gemm_rate())
    for count in counts:
        _check_samples(_our_folder(work, count), tokenizer, samples, count)
    test_ids = torch.tensor(tokenizer(wikitext("test"))["input_ids"])[:EVALUATION_TOKENS]
    folders = {"original": model, "llm-compressor": work / "llm-compressor"}
    folders |= {_our_name(count): _our_folder(work, count) / "artifact" for count in counts}
    losses = {name: token_losses(folder, test_ids) for name, folder in folders.items() if folder.exists()}
    for name, loss in losses.items():
        print(f"perplexity  {name:16} {math.exp(float(loss.mean())):.3f}")
    if theirs:
        print(f"seconds     llm-compressor   {_spread(theirs)}")
    rate = statistics.median(rates)
    config = json.loads((model / "config.json").read_text())
    for count in counts:
        print(f"\nattar with {count} samples")
        print(f"seconds     {_spread(ours[count])}")
        if theirs:
            ratios = [mine / other for mine, other in zip(ours[count], theirs, strict=True)]
            print(f"ratio       {_spread(ratios)}")
            found = paired_difference(losses[_our_name(count)], losses["llm-compressor"])
            print(f"log-perplexity, ours less theirs: {found.value:+.5f} ± {found.standard_error:.5f}")
        operations = limit_operations(
            config,
            count * samples.shape[1],
            samples.shape[1],
            hessians=options.technique in {"gptq", "awq", "sparsegpt", "mixed_precision"},
        )
        limit = operations / rate
        print(f"limit       {operations / 1e12:.2f} TFLOP at {rate / 1e9:.0f} GFLOP/s = {limit:.1f} s; ", end="")
        print(f"we take {statistics.median(ours[count]) / limit:.2f} times that")
        seconds = json.loads((_our_folder(work, count) / "compressed.json").read_text())["seconds"]
        print("where our last run's seconds went:", ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))


def limit_operations(config: dict[str, Any], num_tokens: int, length: int, *, hessians: bool) -> float:
    """Floating-point operations of one forward pass of a Llama's blocks, and of half of each distinct Hessian."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    query, keys = heads * width, config["num_key_value_heads"] * width
    linear = 2 * num_tokens * (hidden * (query + 2 * keys) + query * hidden + 3 * hidden * inner)
    attention = 2 * 2 * num_tokens * length * query / 2
    squares = num_tokens * (2 * hidden**2 + query**2 + inner**2) if hessians else 0
    return float(config["num_hidden_layers"] * (linear + attention + squares))


def gemm_rate(seconds: float = 2.0) -> float:
    """Floating-point operations a second of a large float32 product."""
    left, right = torch.randn(4096, 1536), torch.randn(1536, 1536)
    torch.mm(left, right)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        torch.mm(left, right)
        count += 1
    return 2 * 4096 * 1536 * 1536 * count / (time.perf_counter() - begin)


def _check_samples(folder: Path, tokenizer: Any, samples: torch.Tensor, count: int) -> None:
    """Our job cut its samples from the text by itself: they have to be those that the peer was given, if as many."""
    documents = read_documents(folder / "source" / "calibration.jsonl")
    ids = tokenize(tokenizer, documents, param="bench")
    ours = calibration_samples(ids, count, samples.shape[1], seed=0)
    assert count != samples.shape[0] or torch.equal(samples, ours), "the samples are not the same"


def _our_name(count: int) -> str:
    return f"attar-{count}"


def _our_folder(work: Path, count: int) -> Path:
    return work / _our_name(count)


def _our_command(work: Path, model: Path, count: int, options: argparse.Namespace) -> list[str]:
    return [sys.executable, "-m", "bench.our_side", str(model), str(work / "calibration.txt"),
            str(_our_folder(work, count)), "--num-samples", str(count), "--max-seq-length", str(options.max_seq_length),
            "--stage", json.dumps(_stage(options)), "--num-threads", str(_num_threads())]  # fmt: skip


def _peer_command(python: Path, work: Path, model: Path, options: argparse.Namespace) -> list[str]:
    return [str(python), str(ROOT / "bench" / "peer_side.py"), str(model), str(work / "samples.safetensors"),
            str(work / "llm-compressor"), "--stage", json.dumps(_stage(options)), "--observer", options.peer_observer,
            "--num-threads", str(_num_threads())]  # fmt: skip


def _stage(options: argparse.Namespace) -> dict[str, Any]:
    """The recipe's one stage, which the peer reads as well."""
    if options.technique in {"gptq", "awq"}:
        return {"technique": options.technique, "scheme": "W4A16", "group_size": options.group_size}
    if options.technique == "mixed_precision":
        return SETTINGS["mixed-4"]
    if options.technique == "smoothquant":
        return {"technique": "smoothquant"}
    if options.mask_structure:
        return {"technique": options.technique, "mask_structure": options.mask_structure}
    return {"technique": options.technique, "sparsity": options.sparsity}


def _num_threads() -> int:
    return os.cpu_count() or 1


def _timed(command: list[str]) -> float:
    begin = time.perf_counter()
    log = FOLDER / "speed" / "log.txt"
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # as our job processes have it; for both sides
    with log.open("a") as output:
        if (
            subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, env=environment, check=False).returncode
            != 0
        ):
            sys.exit(f"{' '.join(command)} failed; see {log}")
    seconds = time.perf_counter() - begin
    print(f"{seconds:8.1f} s  {Path(command[0]).parent.parent.name}  {command[1:3]}", flush=True)
    return seconds


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} (from {min(values):.3f} to {max(values):.3f}, {len(values)} runs)"


if __name__ == "__main__":
    main()
