"""Peak memory of the compress process for models of 4, 8 and 16 equal blocks: it must not grow with their number.

    .venv/bin/python -m bench.memory [--technique round_to_nearest|gptq] [--num-samples 8] [--max-seq-length 64]

Models are random, hidden size 2048 and vocabulary 32,000, in bfloat16. The peak is of RssAnon + RssShmem, sampled
every 2 ms by this process: memory that cannot be given back, unlike mapped files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from bench.materials import FOLDER, ROOT, smollm2

HIDDEN, INNER, VOCABULARY = 2048, 5632, 32_000
_SAMPLED_SECONDS = 0.002  # a peak inside a solver is short


def main() -> None:
    """Measure each depth and print the growth."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--technique", choices=["round_to_nearest", "gptq"], default="round_to_nearest")
    arguments.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16])
    arguments.add_argument("--num-samples", type=int, default=8, help="of gptq's calibration")
    arguments.add_argument("--max-seq-length", type=int, default=64)
    options = arguments.parse_args()
    peaks = []
    for num_blocks in options.blocks:
        model = FOLDER / "models" / f"random-{num_blocks}"
        _write_model(model, num_blocks)
        in_blocks, seconds = _measure(model, options)
        peaks.append(max(in_blocks))
        size_bytes = (model / "model.safetensors").stat().st_size
        print(
            f"{num_blocks:3} blocks  checkpoint {size_bytes / 1e6:7.0f} MB  peak {peaks[-1] / 1e6:6.0f} MB  "
            f"{seconds:6.1f} s",
            flush=True,
        )
        print("    block by block:", *(round(each / 1e6) for each in in_blocks), "MB", flush=True)
        shutil.rmtree(model)
    print(f"growth from {options.blocks[0]} to {options.blocks[-1]} blocks: {100 * (peaks[-1] / peaks[0] - 1):+.1f} %")


def _write_model(folder: Path, num_blocks: int) -> None:
    """A random Llama, written block by block, with SmolLM2's tokenizer cut to fit."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=num_blocks,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True, dtype="bfloat16",
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for path in smollm2().glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    shapes = {"self_attn.q_proj": (2048, HIDDEN), "self_attn.k_proj": (512, HIDDEN), "self_attn.v_proj": (512, HIDDEN),
              "self_attn.o_proj": (HIDDEN, 2048), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
              "mlp.down_proj": (HIDDEN, INNER)}  # fmt: skip
    tensors = {
        "model.embed_tokens.weight": _random(VOCABULARY, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
    }
    for block in range(num_blocks):
        for name, shape in shapes.items():
            tensors[f"model.layers.{block}.{name}.weight"] = _random(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{block}.{name}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _random(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.bfloat16) * 0.02


def _measure(model: Path, options: argparse.Namespace) -> tuple[list[int], float]:
    """Peak anonymous memory of one compress process in each block, in bytes, and its seconds."""
    work = FOLDER / "memory"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    # Few and common words: ids that the small vocabulary has.
    words = "the and of to in a is that it was for on are as with his they be at one have this "
    texts = [words * (options.num_samples * options.max_seq_length // 10)]
    request = {
        "job_id": "job_bench",
        "model": {"id": f"file:{model.name}", "revision": None},
        "model_roots": [str(model.parent)],
        "recipe": {
            "stages": [{"technique": options.technique, "scheme": "W4A16"}],
            "calibration": {
                "dataset": {"texts": texts},
                "num_samples": options.num_samples,
                "max_seq_length": options.max_seq_length,
            },
            "evaluation": {"dataset": {"texts": texts}, "num_tokens": 256, "allow_overlap": True},
        },
    }
    (work / "request.json").write_text(json.dumps(request))
    seconds = 0.0
    for phase in ("fetch", "compress"):
        peaks, begin, told = [0], time.perf_counter(), b""
        reading, writing = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-m", "workers.runner", "--events-fd", str(writing)],
            cwd=ROOT, stdin=subprocess.PIPE, pass_fds=(writing,), start_new_session=True,
        )  # fmt: skip
        os.close(writing)
        assert process.stdin is not None
        process.stdin.write(json.dumps({"phase": phase, "work": str(work), "num_threads": None}).encode() + b"\n")
        process.stdin.flush()
        os.set_blocking(reading, False)
        while process.poll() is None:
            peaks[-1] = max(peaks[-1], _anonymous_bytes(process.pid))
            *lines, told = (told + _available(reading)).split(b"\n")
            for block in (json.loads(line).get("block") for line in lines):
                if block == len(peaks):  # what comes before the first and after the last counts with them
                    peaks.append(0)
            time.sleep(_SAMPLED_SECONDS)
        if process.returncode != 0:
            sys.exit(f"{phase} failed: {(work / 'logs' / f'{phase}.log').read_text()}")
        process.stdin.close()
        os.close(reading)
        seconds = time.perf_counter() - begin
    return peaks, seconds


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = dict(line.split(":", 1) for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem")))
    return sum(int(value.split()[0]) * 1024 for value in found.values())


def _available(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 20)
    except BlockingIOError:
        return b""


if __name__ == "__main__":
    main()
