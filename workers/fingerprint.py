"""What, beside the recipe and the texts, decides the bytes of an artifact: where and with what they were computed."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from workers.engine.device import compute_device, device_name

LIBRARIES = ("attar", "torch", "transformers", "compressed-tensors", "safetensors", "tokenizers", "numba", "numpy")

# Recorded for who looks into a difference; they decide no byte.
_INFORMING = frozenset({"python", "cpu.num_cores"})
# Libraries choose their loops by these; the model's name says less, and inside a virtual machine often nothing.
_VECTOR_FEATURES = ("sse4", "avx", "fma", "f16c", "amx", "asimd", "sve", "sme", "bf16", "i8mm")
_FEATURE_FIELDS = ("flags", "features")  # of x86 and of ARM


def fingerprint() -> dict[str, Any]:
    """Device, CPU, threads and library versions of this process, as a JSON object."""
    cpu = _cpu_description()
    features = " ".join(cpu.get(name, "") for name in _FEATURE_FIELDS).split()
    return {
        "device": compute_device().type,
        "device_name": device_name(),
        "cpu": {
            "machine": platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "model": cpu.get("model name", platform.processor()),
            "features": sorted({name for name in features if name.startswith(_VECTOR_FEATURES)}),
            "num_cores": os.cpu_count(),
        },
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """In what two fingerprints differ, with the values of both, by names such as ``libraries.torch``.

    Facts that decide no byte are left out.
    """
    first, second = _flat(one), _flat(other)
    pairs = {name: (first.get(name), second.get(name)) for name in first | second}
    return {name: (before, after) for name, (before, after) in pairs.items() if before != after}


def change_of(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The same in words, for a user; empty where there is no difference."""
    return ", ".join(
        f"{name} ({was} before, {now_is} now)" if not isinstance(was, list) else name
        for name, (was, now_is) in differences(before, now).items()
    )


def made_under(
    of_blocks: Sequence[Mapping[str, Any]], of_decisions: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Runs of blocks that were made under one fingerprint each, with what was other there than for the last block.

    ``of_blocks`` has the fingerprint of each block, ``of_decisions`` those of what was done before the first: a run of
    no blocks for each that differs. One run means that the artifact can be made again.
    """
    runs: list[dict[str, Any]] = []
    first_block = 0
    for other, run in groupby(differences(each, of_blocks[-1]) for each in of_blocks):
        num_blocks = len(list(run))
        values = {name: there for name, (there, _) in other.items()}
        runs.append({"first_block": first_block, "num_blocks": num_blocks, "differs_in": values})
        first_block += num_blocks
    for other in (differences(each, of_blocks[-1]) for each in of_decisions):
        values = {name: there for name, (there, _) in other.items()}
        if values not in [run["differs_in"] for run in runs]:
            runs.insert(0, {"first_block": 0, "num_blocks": 0, "differs_in": values})
    return runs


def environment_of(facts: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], data: Path) -> dict[str, Any]:
    """The report's ``environment``: a fingerprint, the texts described in ``data``, and whether both decide the bytes.

    ``runs`` is what :func:`made_under` gave.
    """
    texts = json.loads(data.read_text(encoding="utf-8"))
    reproducible = len(runs) == 1
    decisive = json.dumps({"facts": _flat(facts), "data": texts}, sort_keys=True)
    return {
        **facts,
        "data": texts,
        "reproducible": reproducible,
        "made_under": list(runs),
        "sha256": hashlib.sha256(decisive.encode()).hexdigest() if reproducible else None,
    }


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every fact that decides bytes, by its path."""
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{path}.")
        elif path not in _INFORMING:
            flat[path] = value
    return flat


def _cpu_description() -> dict[str, str]:
    """What the kernel says of the first processor, names in lower case; nothing where it does not say."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip().lower(): value.strip() for name, _, value in pairs}
