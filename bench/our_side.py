"""Attar's fetch and compress processes on a folder and a text: run by speed.py, without the service around it."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

from workers.fetch import fetch
from workers.pipeline import compress


def main() -> None:
    """Fetch and compress; the artifact is left in `OUTPUT/artifact`."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("model", type=Path)
    arguments.add_argument("text", type=Path, help="calibration text")
    arguments.add_argument("output", type=Path)
    arguments.add_argument("--num-samples", type=int, required=True)
    arguments.add_argument("--max-seq-length", type=int, required=True)
    arguments.add_argument("--stage", type=json.loads, required=True, help="JSON, as in a recipe")
    arguments.add_argument("--num-threads", type=int, required=True)
    options = arguments.parse_args()
    torch.set_num_threads(options.num_threads)
    request = {
        "job_id": "job_bench",
        "model": {"id": f"file:{options.model.name}", "revision": None},
        "model_roots": [str(options.model.parent)],
        "recipe": {
            "stages": [options.stage],
            "calibration": {
                "dataset": {"texts": [options.text.read_text(encoding="utf-8")]},
                "num_samples": options.num_samples,
                "max_seq_length": options.max_seq_length,
            },
        },
    }
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)
    fetch(options.output, request, lambda _: None)
    compress(options.output, request, lambda event: print(json.dumps(event), flush=True))


if __name__ == "__main__":
    main()
