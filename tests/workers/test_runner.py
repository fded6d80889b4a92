"""What the processes of a job make of errors that are not theirs."""

from __future__ import annotations

import errno

import pytest
from safetensors import SafetensorError

from workers.errors import UserError, as_job_error


@pytest.mark.parametrize(
    ("error", "code", "blame"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full", "infrastructure"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "disk_full", "infrastructure"),
        (MemoryError(), "out_of_memory", "crash"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out_of_memory", "crash"),
        (RuntimeError("CUDA out of memory."), "out_of_memory", "crash"),
        (ValueError("odd"), "internal_error", "crash"),
        (UserError("not_smaller", "It is not smaller."), "not_smaller", "user"),
    ],
)
def test_errors_get_the_code_and_blame_that_they_deserve(error: BaseException, code: str, blame: str) -> None:
    told = as_job_error(error)
    assert (told.code, told.blame) == (code, blame)
