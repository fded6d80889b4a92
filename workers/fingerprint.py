"""What, beside the recipe, decides the bytes of an artifact."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from workers.engine.device import compute_device, peak_device_memory_bytes

LIBRARIES = ("attar", "torch", "transformers", "compressed-tensors", "safetensors", "tokenizers", "numba", "numpy")


def fingerprint(data: Path) -> dict[str, Any]:
    """Device, CPU features, threads, library versions and data; ``sha256`` over all of them."""
    facts: dict[str, Any] = {
        "device": compute_device().type,
        "cpu": {
            "machine": platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "model": _cpu_model(),
            "num_cores": os.cpu_count(),
        },
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "data": json.loads(data.read_text(encoding="utf-8")),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return {**facts, "sha256": digest, "peak_device_memory_bytes": peak_device_memory_bytes()}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
