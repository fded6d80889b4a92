"""Memory of processes and of the machine, as whoever limits it counts it. Torch-free."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import psutil

# Of what a machine has left, what a job leaves to others, and to pages of the files that it reads.
_MACHINE_SHARE = 0.9
# Of activations that wait in memory, whatever there is of it.
MOST_WAITING_BYTES = 1 << 30
_GROUPS = Path("/sys/fs/cgroup")


def held_bytes(pid: int) -> int:
    """Memory of a process that nothing but its end gives back.

    Pages of mapped files are left out: the kernel takes them when it needs them, and a model of any size is mapped.
    """
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        held = (line.split() for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
        return sum(int(kilobytes) * 1024 for _, kilobytes, _ in held)
    return 0


def free_bytes(limit_bytes: int | None) -> int:
    """What this process may still take: up to the limit of its job, or without one most of what the machine has."""
    machine = int(_MACHINE_SHARE * min(psutil.virtual_memory().available, _group_free_bytes()))
    if limit_bytes is None:
        return machine
    return min(machine, max(0, limit_bytes - held_bytes(os.getpid())))


def waiting_bytes(num_bytes: int) -> int:
    """What activations that wait for their next layer may hold, where so much memory is free."""
    return max(0, min(MOST_WAITING_BYTES, num_bytes // 4))


def _group_free_bytes() -> float:
    """What the control group that this process runs in, as containers are, has left; infinity without a limit.

    Pages of files count as used there, and are given up for anything else.
    """
    for folder, limit, used in (
        (_GROUPS, "memory.max", "memory.current"),
        (_GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # another version of control groups, or `max`
            limit_bytes, used_bytes = (int((folder / name).read_text(encoding="ascii")) for name in (limit, used))
            lines = (line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
            files = sum(int(size) for name, size in lines if name in ("active_file", "inactive_file"))
            return max(0, limit_bytes - used_bytes + files)
    return float("inf")
