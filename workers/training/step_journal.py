"""How far a training is, kept so that a killed one goes on from there as if it had never stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from workers.disk import flush, write_json


@dataclass
class Curve:
    """What was measured on the way, and what decides when to stop."""

    step: int = 0  # that many are done
    num_tokens: int = 0
    seconds: float = 0.0
    points: list[dict[str, float | int | None]] = field(default_factory=list)
    lowest_held_out: float | None = None
    lowest_step: int = 0
    num_without_progress: int = 0

    def to_json(self) -> dict[str, Any]:
        """As the journal keeps it."""
        return asdict(self)


class StepJournal:
    """The last complete state of one training: an entry that names its file of tensors and their digest.

    The file is written and flushed first, the entry renamed into place after it, and only then is the one before
    removed: whenever the process dies, one whole state is there.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder = folder
        self._fingerprint = dict(fingerprint)
        self.fingerprints: list[dict[str, Any]] = []  # that earlier steps were made under
        folder.mkdir(parents=True, exist_ok=True)

    def read(self) -> tuple[Curve, dict[str, Tensor]] | None:
        """The newest state that is whole; None where there is none."""
        for entry in sorted(self.folder.glob("step-*.json"), reverse=True):
            try:
                written = json.loads(entry.read_bytes())
                tensors = entry.with_suffix(".safetensors")
                if _digest(tensors) != written["xxh3"]:
                    continue
                self.fingerprints = [dict(each) for each in written["fingerprints"]]
                return Curve(**written["curve"]), load_file(tensors)
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return None

    def write(self, curve: Curve, tensors: Mapping[str, Tensor]) -> None:
        """Keep a state in place of the one before."""
        if self._fingerprint not in self.fingerprints:
            self.fingerprints.append(self._fingerprint)
        path = self.folder / f"step-{curve.step:09d}.safetensors"
        temporary = path.with_name(f".{path.name}.tmp")
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary)
        flush(temporary)
        temporary.rename(path)
        entry = path.with_suffix(".json")
        waiting = entry.with_name(f".{entry.name}.tmp")
        content = {"curve": curve.to_json(), "xxh3": _digest(path), "fingerprints": self.fingerprints}
        write_json(waiting, content)
        waiting.rename(entry)
        flush(self.folder)
        for earlier in self.folder.glob("*step-*"):
            if earlier.name not in (path.name, entry.name):
                earlier.unlink()


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return str(digest.hexdigest())
