"""Where a job computes, and in which type: decided here and nowhere else."""

from __future__ import annotations

import torch


def compute_device() -> torch.device:
    """The accelerator if there is one, else the CPU.

    Everything is computed in float32: statistics and solvers need it, and on CPUs without bfloat16 arithmetic it is
    also the fastest. Checkpoints keep their own type on disk.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_device_memory_bytes() -> int | None:
    """The most memory that tensors took on the accelerator so far; None on the CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
