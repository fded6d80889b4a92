"""What of a job's compression is finished, kept so that a killed job goes on from its last block.

One folder: the parts of the finished blocks, an entry for each that says what the report needs of it, and the hidden
states between the last finished block and the next one. An entry is written last and renamed into place, so what it
speaks of is complete. Hidden states are only a cache: where they are missing or damaged, the finished blocks are run
again on the calibration text.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from workers.disk import flush, write_json
from workers.engine.activations import Activations
from workers.formats.parts import Parts

logger = logging.getLogger(__name__)

PLANNING = "planning"  # the inner journal of what is decided before the first block
# Of what a journal's hidden states, parts and entries stand for: raised where that changes within a version of Attar.
REVISION = 3
_IDENTITY = "identity.json"
_READ_BYTES = 1 << 24


@dataclass(frozen=True)
class Discarded:
    """Why earlier work, or a part of it, was not used."""

    code: str
    message: str


class Journal:
    """The finished blocks of one job."""

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        fingerprint: Mapping[str, Any],
        decided_under: list[dict[str, Any]] | None = None,
    ) -> None:
        """Open ``folder`` and keep what is complete there, if it is of the same ``identity`` (a JSON object).

        And of this :data:`REVISION`. ``fingerprint`` is what blocks are made under from now on; that of an earlier
        attempt may be another. ``decided_under`` gathers those of all that is kept beside blocks.
        """
        identity = {**identity, "journal": REVISION}
        self.folder = folder
        self.fingerprint = dict(fingerprint)
        self.decided_under: list[dict[str, Any]] = [] if decided_under is None else decided_under
        self.fingerprints: list[dict[str, Any]] = []  # of the finished blocks
        self.discarded: Discarded | None = None
        self.entries: list[dict[str, Any]] = []
        self._activations_of: dict[str, Any] = {}
        if not (folder / _IDENTITY).exists() or not self._take_up(identity):
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        self.parts = Parts(folder / "parts")
        self.activations = Activations(folder / "activations")
        if not (folder / _IDENTITY).exists():
            self._write(folder / _IDENTITY, identity)

    @property
    def num_blocks(self) -> int:
        """How many blocks are finished."""
        return len(self.entries)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """What ``compute`` gave, in JSON, when the job first asked for ``name``: what comes after rests on it."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            self._write(path, _sealed({"value": compute(), "fingerprint": self.fingerprint}))
        kept = _unsealed(path)
        self.decided_under.append(kept["fingerprint"])
        return kept["value"]

    def has(self, name: str) -> bool:
        """Whether ``name`` was asked for :meth:`once`."""
        return (self.folder / f"{name}.json").exists()

    def folder_once(self, name: str, make: Callable[[Path], Any]) -> Any:
        """The same of something that leaves files: ``make`` is given the folder ``name`` of this journal's.

        What it leaves there is flushed, and held against its digests whenever it is asked for again: damaged, it is
        made again. ``make`` may find files of an attempt that was stopped.
        """
        folder, path = self.folder / name, self.folder / f"{name}.json"
        if path.exists():
            kept = _unsealed(path)
            if _digests_of(folder) == kept["value"]["files"]:
                self.decided_under += kept["value"]["made_under"]
                return kept["value"]["value"]
            logger.warning("the %s of an earlier attempt is damaged and is made again", name)
            path.unlink()
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        before = len(self.decided_under)
        value = make(folder)
        for file in _files_of(folder):
            flush(file)
        flush(folder)
        made_under = [*self.decided_under[before:], self.fingerprint]
        content = {"value": value, "files": _digests_of(folder), "made_under": made_under}
        self._write(path, _sealed({"value": content, "fingerprint": self.fingerprint}))
        self.decided_under.append(self.fingerprint)
        return value

    def is_whole(self, name: str) -> bool:
        """Whether such a folder is there and undamaged."""
        path = self.folder / f"{name}.json"
        return path.exists() and _digests_of(self.folder / name) == _unsealed(path)["value"]["files"]

    def inner(self, name: str) -> Journal:
        """A journal of a part of the work, in a folder of this one's."""
        return Journal(self.folder / name, {"of": name}, self.fingerprint, self.decided_under)

    def begin_again_unless_whole(self, shapes: Sequence[Sequence[int]]) -> None:
        """Forget the finished blocks where what comes after them could not go on as if it had never stopped.

        That needs their hidden states, of these ``shapes``, and that they were made under our fingerprint.
        """
        if not self.has_activations(shapes) or any(each != self.fingerprint for each in self.fingerprints):
            self._forget_from(0)
            self.entries.clear()
            self.fingerprints.clear()
            self._activations_of = {}

    def finish_block(self, index: int, entry: Mapping[str, Any], shapes: Sequence[torch.Size]) -> None:
        """Say that block ``index`` is done: its part is written, and ``activations`` have what the next block reads.

        Where blocks have no parts, the entry says all there is of them.
        ``entry`` is what the report needs of the block; ``shapes`` are those of the hidden states, a pass each.
        """
        described = [
            {"shape": list(shape), "xxh3": _digest(self.activations.path(index + 1, number))}
            for number, shape in enumerate(shapes)
        ]
        part = part_name(index)
        self._write(
            self.folder / f"{part}.json",
            _sealed(
                {
                    "index": index,
                    "entry": entry,
                    "fingerprint": self.fingerprint,
                    "part_xxh3": _digest(self.parts.path(part)) if self.parts.path(part).exists() else None,
                    "activations": described,
                }
            ),
        )

    def has_activations(self, shapes: Sequence[Sequence[int]]) -> bool:
        """Whether the hidden states before the first unfinished block are there, of these shapes and undamaged."""
        described = self._activations_of.get("activations", [])
        if [list(shape) for shape in shapes] != [each["shape"] for each in described]:
            return False
        try:
            return all(
                _digest(self.activations.path(self.num_blocks, number)) == each["xxh3"]
                for number, each in enumerate(described)
            )
        except OSError:
            return False

    def _take_up(self, identity: Mapping[str, Any]) -> bool:
        """Take over what is complete; whether the folder is of this work at all."""
        try:
            before = json.loads((self.folder / _IDENTITY).read_bytes())
        except (OSError, ValueError):
            before = None
        if before != json.loads(json.dumps(identity)):
            self.discarded = Discarded(
                "journal_refused",
                "Earlier work on this job was of another recipe, model, text or version: it begins again.",
            )
            return False
        if not self._plans_are_sound():
            return True
        parts = Parts(self.folder / "parts")
        while True:
            part = part_name(self.num_blocks)
            path = self.folder / f"{part}.json"
            if not path.exists():
                return True
            try:
                written = _unsealed(path)
                if written["index"] != self.num_blocks:
                    raise ValueError("the entry is another block's")
                if written["part_xxh3"] is not None and _digest(parts.path(part)) != written["part_xxh3"]:
                    raise ValueError("the part's bytes are not those that the entry names")
                entry, fingerprint = dict(written["entry"]), dict(written["fingerprint"])
            except (OSError, ValueError, KeyError, TypeError):
                self.discarded = Discarded(
                    "journal_damaged",
                    f"Earlier work on this job is damaged and is done again from block {self.num_blocks} on.",
                )
                self._forget_from(self.num_blocks)
                return True
            self.entries.append(entry)
            self.fingerprints.append(fingerprint)
            self._activations_of = written

    def _plans_are_sound(self) -> bool:
        """Whether everything that blocks rest on is as it was written; else it is forgotten, and the blocks with it."""
        for path in self.folder.glob("*.json"):
            if path.name == _IDENTITY or path.name.startswith("block-"):
                continue
            try:
                _unsealed(path)
            except (OSError, ValueError, KeyError, TypeError):
                self.discarded = Discarded(
                    "journal_damaged", f"The {path.stem} of earlier work on this job is damaged: it begins again."
                )
                self._forget_from(0)
                path.unlink(missing_ok=True)
                return False
        return True

    def _forget_from(self, index: int) -> None:
        for path in self.folder.glob("block-*.json"):
            if int(path.stem.removeprefix("block-")) >= index:
                path.unlink()

    def _write(self, path: Path, content: Mapping[str, Any]) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        write_json(temporary, content)
        temporary.rename(path)
        flush(path.parent)


def _files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digests_of(folder: Path) -> dict[str, str]:
    """Of every file of a folder, by its path in it."""
    return {str(path.relative_to(folder)): _digest(path) for path in _files_of(folder)}


def part_name(index: int) -> str:
    """Of the part that holds a block's tensors."""
    return f"block-{index:05d}"


def _sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` as JSON has it, with a digest of itself."""
    plain = json.loads(json.dumps(content))
    return {**plain, "xxh3": _digest_of(plain)}


def _unsealed(path: Path) -> dict[str, Any]:
    """What :func:`_sealed` made of the file's content. Raises OSError, ValueError or TypeError where it is damaged."""
    written = dict(json.loads(path.read_bytes()))
    if written.pop("xxh3", None) != _digest_of(written):
        raise ValueError(f"{path.name} is not what was written")
    return written


def _digest_of(content: Mapping[str, Any]) -> str:
    return str(xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode()))


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return str(digest.hexdigest())
