"""Where a job computes, and in which type: decided here and nowhere else."""

from __future__ import annotations

import ctypes
import sys

import torch


def compute_device() -> torch.device:
    """The accelerator if there is one, else the CPU.

    Everything is computed in float32: statistics and solvers need it, and on CPUs without bfloat16 arithmetic it is
    also the fastest. Checkpoints keep their own type on disk.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str | None:
    """What the accelerator is called; None on the CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def peak_device_memory_bytes() -> int | None:
    """The most memory that tensors took on the accelerator so far; None on the CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def release_memory() -> None:
    """Give freed memory back to the system, so that what a process holds does not creep up block by block."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others give back by themselves
        if trim is not None:
            trim(0)
