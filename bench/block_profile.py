"""Where a forward pass through SmolLM2-135M's blocks spends its time on this machine, by operation.

    .venv/bin/python -m bench.block_profile [--blocks 4] [--samples 8] [--max-seq-length 512] [--exact]

Times are of a second pass through the first blocks, as calibration takes it: so many samples at a time, with products
that need not be exact unless --exact says so.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import torch
from torch.profiler import ProfilerActivity, profile

from bench.materials import smollm2
from workers.architectures import architecture_of
from workers.engine.checkpoint import Checkpoint
from workers.engine.device import inexact_products, keeping_freed_memory, return_freed_memory
from workers.engine.skeleton import Skeleton


@torch.inference_mode()
def main() -> None:
    """Profile and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--blocks", type=int, default=4)
    arguments.add_argument("--samples", type=int, default=8)
    arguments.add_argument("--max-seq-length", type=int, default=512)
    arguments.add_argument("--exact", action="store_true", help="everything in float32")
    options = arguments.parse_args()
    return_freed_memory()
    checkpoint = Checkpoint(smollm2())
    architecture = architecture_of(checkpoint.config)
    skeleton = Skeleton(checkpoint, architecture, torch.device("cpu"))
    blocks = [skeleton.block_name(index) for index in range(skeleton.num_blocks)]
    for name in skeleton.present([*architecture.before_blocks, *blocks[: options.blocks], *architecture.after_blocks]):
        skeleton.load(name)
    body = skeleton.module(architecture.blocks.rpartition(".")[0])
    ids = torch.arange(options.samples * options.max_seq_length).view(options.samples, -1)
    products = nullcontext if options.exact else inexact_products
    with skeleton.skipped(blocks[options.blocks :]), keeping_freed_memory(), products():
        body(input_ids=ids, **architecture.call_options)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
            body(input_ids=ids, **architecture.call_options)
    averages = profiled.key_averages(group_by_input_shape=True)
    total = sum(each.self_cpu_time_total for each in averages)
    print(f"{total / 1000 / options.blocks:.0f} ms a block of {ids.numel():,} tokens")
    for each in sorted(averages, key=lambda each: -each.self_cpu_time_total)[:16]:
        share = each.self_cpu_time_total / total
        print(f"{100 * share:5.1f} %  {each.count // options.blocks:3}  {each.key:45}  {str(each.input_shapes)[:70]}")


if __name__ == "__main__":
    main()
