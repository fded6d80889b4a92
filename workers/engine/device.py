"""Where a job computes, and in which type: decided here and nowhere else."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Tensors above this go back to the system as soon as they are freed, but for those of forward passes.
_LARGE_BYTES = 1 << 20
# Of those too: activations of thousands of tokens are smaller.
_LARGEST_KEPT_BYTES = 1 << 25
_MOST_KEPT_BYTES = 1 << 30


def compute_device() -> torch.device:
    """The accelerator if there is one, else the CPU.

    Everything is held and solved in float32, whatever type a checkpoint has on disk. For products whose last bits
    decide nothing there is :func:`inexact_products`.
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
    """Let products of float32 matrices be computed in the way that is fastest here; sums are float32's everywhere.

    Linear layers take factors of bfloat16 where the processor multiplies those. Other products round their factors
    to what GPUs (TF32) and CPUs with tiles (bfloat16) are made for; on other CPUs those are float32 still, by oneDNN in
    place of MKL, which took 1.4 times as long on an AMD EPYC.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with _LinearInBfloat16() if _multiplies_bfloat16() else nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class _LinearInBfloat16(TorchFunctionMode):
    """Has linear layers take factors of bfloat16 and add their biases in float32.

    Products are summed in float32 and rounded to bfloat16 once, as torch has no other way to return them on a CPU.
    torch chooses these products by itself only on CPUs with tiles for them. By AVX-512 they are twice as fast as
    float32's.
    """

    def __torch_function__(
        self, func: Any, _types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if kwargs:
            return func(*args, **kwargs)
        if func is nn.functional.linear:
            inputs, weight, bias = (*args, None)[:3]
            outputs = func(inputs.bfloat16(), weight.bfloat16()).float()
        elif func is torch.addmm:  # the linear layers of GPT-2
            bias, inputs, weight = args
            outputs = torch.mm(inputs.bfloat16(), weight.bfloat16()).float()
        else:
            return func(*args)
        return outputs if bias is None else outputs.add_(bias)


def _multiplies_bfloat16() -> bool:
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


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


@contextmanager
def training_products(precision: str) -> Iterator[None]:
    """Let forward passes of a training multiply in ``precision``: float32, bfloat16, or `auto` for what is fastest.

    Weights, gradients, norms and sums stay float32.
    """
    is_narrow = precision == "bfloat16" or (precision == "auto" and _multiplies_bfloat16())
    with torch.autocast(compute_device().type, torch.bfloat16, enabled=is_narrow):
        yield
