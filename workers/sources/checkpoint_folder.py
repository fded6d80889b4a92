"""Opens model folders below the configured roots without following a link that someone put there."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from types import MappingProxyType

from workers.errors import UserError
from workers.sources.checkpoint import COMPANIONS

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# A FIFO or a device would block open() or read() for ever without O_NONBLOCK.
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MAX_FILES = 10_000
_MAX_COMPARED = 1_000  # names; where a folder has more, one that is nearer may be missed
_LONGEST_COMPARED = 50  # characters of a name; what is longer resembles none


class CheckpointFolder:
    """An open folder: sizes of its regular files, and reads that cannot leave it. Subfolders are not looked at."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self.path = path
        self._descriptor = descriptor
        self._files: dict[str, int] = {}
        with os.scandir(descriptor) as entries:
            for entry in entries:
                if entry.is_symlink() and _is_wanted(entry.name):
                    raise symlink_refused(entry.name)
                if entry.is_file(follow_symlinks=False):
                    self._files[entry.name] = entry.stat(follow_symlinks=False).st_size
                if len(self._files) > _MAX_FILES:
                    raise _not_found(path.name, f"it holds more than {_MAX_FILES} files")

    @property
    def files(self) -> Mapping[str, int]:
        """Sizes in bytes of the regular files by name."""
        return MappingProxyType(self._files)

    def open(self, name: str) -> int:
        """A descriptor of the regular file ``name``; the caller closes it."""
        return _open_file(name, self._descriptor)

    def read(self, path: str, start: int, length: int) -> bytes:
        """A range of a file of this folder."""
        descriptor = self.open(path)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            file.seek(start)
            pieces = []
            while length > 0 and (piece := file.read(length)):
                pieces.append(piece)
                length -= len(piece)
            return b"".join(pieces)


@contextmanager
def open_model(parts: Sequence[str], model_roots: Sequence[Path]) -> Iterator[tuple[CheckpointFolder, str | None]]:
    """The model's folder; with the name of a GGUF file in it when ``parts`` end in that file instead.

    Roots are tried in order. Raises UserError ``model_not_found``, with a similar name that is there, or
    ``symlink_refused``.
    """
    for root in model_roots:
        is_file = parts[-1].endswith(".gguf")
        folders = parts[:-1] if is_file else parts
        try:
            descriptor = _walk(root, folders)
        except FileNotFoundError:
            continue
        try:
            folder = CheckpointFolder(descriptor, Path(root).resolve().joinpath(*folders))
            if is_file and parts[-1] not in folder.files:
                continue
            yield folder, parts[-1] if is_file else None
            return
        finally:
            os.close(descriptor)
    raise _not_found("/".join(parts), "no model root holds it", _nearest(parts, model_roots))


@contextmanager
def open_folder(path: Path) -> Iterator[CheckpointFolder]:
    """A folder of our own, under the same rules."""
    descriptor = os.open(path, _FOLDER_FLAGS)
    try:
        yield CheckpointFolder(descriptor, path)
    finally:
        os.close(descriptor)


def open_file(parts: Sequence[str], model_roots: Sequence[Path]) -> int | None:
    """A descriptor of one regular file below a root, or None where no root holds it; the caller closes it.

    Raises UserError ``symlink_refused``.
    """
    for root in model_roots:
        try:
            folder = _walk(root, parts[:-1])
        except FileNotFoundError:
            continue
        try:
            return _open_file(parts[-1], folder)
        except FileNotFoundError:
            continue
        finally:
            os.close(folder)
    return None


def _nearest(parts: Sequence[str], model_roots: Sequence[Path]) -> str | None:
    """The path that resembles ``parts`` up to where they leave what is there; None where nothing does."""
    for root in model_roots:
        for depth in reversed(range(len(parts))):
            with suppress(FileNotFoundError):
                names = _models_in(root, parts[:depth]) - {parts[depth]}
                nearest = get_close_matches(parts[depth][:_LONGEST_COMPARED], sorted(names), n=1)
                if nearest:
                    return "/".join([*parts[:depth], *nearest])
                break
    return None


def _models_in(root: Path, folders: Sequence[str]) -> set[str]:
    """Names of what may be a model, or hold one: folders and GGUF files, none of them hidden."""
    descriptor = _walk(root, folders)
    try:
        with os.scandir(descriptor) as entries:
            return {
                entry.name
                for entry in islice(entries, _MAX_COMPARED)
                if entry.name.isprintable()
                and not entry.name.startswith(".")
                and (
                    entry.is_dir(follow_symlinks=False)
                    or (entry.name.endswith(".gguf") and entry.is_file(follow_symlinks=False))
                )
            }
    finally:
        os.close(descriptor)


def _walk(root: Path, folders: Sequence[str]) -> int:
    """A descriptor of ``root/folders``, opened one component at a time. The root itself may be a link."""
    try:
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise FileNotFoundError(error.errno, "model root") from None
    for name in folders:
        try:
            below = os.open(name, _FOLDER_FLAGS, dir_fd=descriptor)
        except OSError as error:
            if _is_link(name, descriptor):
                raise symlink_refused(name) from None
            if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.EACCES}:
                raise FileNotFoundError(error.errno, name) from None
            raise
        finally:
            os.close(descriptor)
        descriptor = below
    return descriptor


def _open_file(name: str, folder: int) -> int:
    try:
        descriptor = os.open(name, _FILE_FLAGS, dir_fd=folder)
    except OSError as error:
        if _is_link(name, folder):
            raise symlink_refused(name) from None
        raise FileNotFoundError(error.errno, name) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, name)
    return descriptor


def _is_link(name: str, folder: int) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _is_wanted(name: str) -> bool:
    return name in COMPANIONS or name.endswith((".safetensors", ".safetensors.index.json", ".gguf"))


def symlink_refused(name: str) -> UserError:
    """The error for a link below a root."""
    return UserError(
        "symlink_refused",
        f"{name!r} is a symbolic link, and links below a model root are not followed.",
        param="model.id",
        hint="Copy the files themselves there, for example with cp -rL.",
    )


def _not_found(name: str, problem: str, nearest: str | None = None) -> UserError:
    meant = f"Is 'file:{nearest}' meant? " if nearest else ""
    return UserError(
        "model_not_found",
        f"There is no model file:{name}: {problem}.",
        param="model.id",
        hint=f"{meant}Put the model's folder under one of the folders of ATTAR_MODEL_ROOTS.",
    )
