"""Where a job computes, and in which type: decided here and nowhere else."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Tensors above this go back to the system as soon as they are freed, but for those of forward passes.
_LARGE_BYTES = 1 << 20
# Of those too: activations of thousands of tokens are smaller.
_LARGEST_KEPT_BYTES = 1 << 25
_MOST_KEPT_BYTES = 1 << 30


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


@contextmanager
def inexact_products() -> Iterator[None]:
    """Let products of float32 matrices be computed in the way that is fastest here.

    That may be with factors of fewer bits, summed in float32: TF32 on CUDA, bfloat16 on CPUs with tiles for it. On
    other CPUs it is float32 still, by oneDNN in place of MKL, which took 1.4 times as long on an AMD EPYC.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def return_freed_memory() -> None:
    """Have this process give large tensors back to the system as soon as they are freed, from its first one on.

    Solvers take matrices of many sizes. Left to itself the allocator would soon cut all of them out of one heap, and
    the gaps between those in use, which nothing gives back, would grow by a fifth of what the process holds.
    """
    _set_thresholds(_LARGE_BYTES, _LARGE_BYTES)


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Have this process, of which :func:`return_freed_memory` was asked, keep what it frees for its next use.

    A forward pass takes and frees tensors of the same sizes again and again. Where each goes back to the system at
    once, which clears the pages that it gives out, that is an eighth of the pass's time.
    """
    _set_thresholds(_LARGEST_KEPT_BYTES, _MOST_KEPT_BYTES)
    try:
        yield
    finally:
        return_freed_memory()
        release_memory()


def release_memory() -> None:
    """Give freed memory back to the system, so that what a process holds does not creep up block by block."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _set_thresholds(large_bytes: int, kept_bytes: int) -> None:
    set_option = _of_glibc("mallopt")
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, large_bytes)
        set_option(_M_TRIM_THRESHOLD, kept_bytes)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc's allocator; other systems' give back, or keep, as they think right."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
