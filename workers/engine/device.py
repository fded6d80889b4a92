"""Where a job computes, and in which type: decided here and nowhere else."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import torch

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST_KEPT_BYTES = (1 << 31) - 1
# Activations of thousands of tokens are smaller; what is larger, as Hessians and embeddings are, goes back at once.
_LARGE_BYTES = 1 << 25


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


def keep_freed_memory() -> None:
    """Have this process keep what it frees, for its next use, until :func:`release_memory`.

    A forward pass takes and frees tensors of the same sizes again and again. Where each goes back to the system at
    once, which clears the pages that it gives out, that is an eighth of the pass's time.
    """
    set_option = _of_glibc("mallopt")
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        set_option(_M_TRIM_THRESHOLD, _MOST_KEPT_BYTES)


def release_memory() -> None:
    """Give freed memory back to the system, so that what a process holds does not creep up block by block."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc's allocator; other systems' give back, or keep, as they think right."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
