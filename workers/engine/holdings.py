"""What passes hold while they wait inside a block: in memory up to a budget, beyond it in files.

A pass holds whatever the model's own code has not let go of: residuals, queries, gates. It is found as it is made, and
put away and brought back under the code that holds it: a storage is emptied, and later filled again, so that every
tensor on it, views too, is what it was.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, UntypedStorage, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What is smaller is not worth a place in a file, and may be a module's own, made at its first use.
_SMALLEST_BYTES = 1 << 16


class MemoryBudget:
    """Bytes that waiting passes may hold together, and a folder for what is beyond."""

    def __init__(self, folder: Path, num_bytes: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._folder = folder
        self._left_bytes = num_bytes
        self._num_files = 0

    def take(self, num_bytes: int) -> bool:
        """Whether so many bytes may stay in memory; if so, they are counted."""
        if num_bytes > self._left_bytes:
            return False
        self._left_bytes -= num_bytes
        return True

    def give_back(self, num_bytes: int) -> None:
        """Say that so many bytes, which were taken, count no more."""
        self._left_bytes += num_bytes

    def new_file(self) -> Path:
        """A path of its own for what one pass holds."""
        self._num_files += 1
        return self._folder / f"{self._num_files:05d}"

    def close(self) -> None:
        """Take the folder away, when no pass waits any more."""
        shutil.rmtree(self._folder)


class Holdings(TorchDispatchMode):
    """The storages that one pass has made and still holds; while it runs, it has to be the mode."""

    def __init__(self, budget: MemoryBudget, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._budget = budget
        self._model = model
        self._path = budget.new_file()
        self._made: dict[int, StorageWeakRef] = {}
        self._taken_bytes = 0
        self._away: list[tuple[UntypedStorage, int]] = []

    def __torch_dispatch__(
        self, function: Any, _types: Any, arguments: Sequence[Any] = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and note the storages that it made; those of views are their sources'."""
        result = function(*arguments, **(named or {}))
        made = [each.untyped_storage() for each in tree_leaves(result) if isinstance(each, Tensor)]
        made = [storage for storage in made if storage.nbytes() >= _SMALLEST_BYTES]
        if made:
            given = tree_leaves((arguments, named))
            known = {each.untyped_storage()._cdata for each in given if isinstance(each, Tensor)}
            for storage in made:
                if storage._cdata not in known:
                    reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                    self._made[reference.cdata] = reference
        return result

    def put_away(self) -> None:
        """Let what is held count against the budget, or put it into a file.

        Raises:
            OSError: the disk is full.
        """
        assert not self._away, "a pass rests once, until it goes on"
        held = self._held()
        num_bytes = sum(storage.nbytes() for storage in held)
        if self._budget.take(num_bytes):
            self._taken_bytes = num_bytes
            return
        with self._path.open("wb") as file:
            for storage in held:
                file.write(_bytes_of(storage if storage.device.type == "cpu" else storage.cpu()))  # type: ignore[no-untyped-call]
        for storage in held:
            self._away.append((storage, storage.nbytes()))
            storage.resize_(0)

    def bring_back(self) -> None:
        """Have everything in memory again."""
        self._budget.give_back(self._taken_bytes)
        self._taken_bytes = 0
        if not self._away:
            return
        with self._path.open("rb") as file:
            for storage, num_bytes in self._away:
                storage.resize_(num_bytes)
                target = storage if storage.device.type == "cpu" else UntypedStorage(num_bytes)  # type: ignore[no-untyped-call]
                if file.readinto(_bytes_of(target)) != num_bytes:
                    raise OSError(f"{self._path} is shorter than what was written")
                if target is not storage:
                    storage.copy_(target)
        self._away.clear()
        self._path.unlink()  # before the system has written it out

    def forget(self) -> None:
        """Give back what is held: the pass goes on no more."""
        self._budget.give_back(self._taken_bytes)
        self._taken_bytes = 0
        self._away.clear()
        self._made.clear()
        self._path.unlink(missing_ok=True)

    def _held(self) -> list[UntypedStorage]:
        """What was made and still lives, but for what the model itself keeps, or lies in a mapped file."""
        kept = {buffer.untyped_storage()._cdata for buffer in self._model.buffers()}
        held = []
        for key, reference in list(self._made.items()):
            storage: UntypedStorage | None = UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._made[key]
            elif storage._cdata not in kept and storage.resizable():
                held.append(storage)
        return held


def _bytes_of(storage: UntypedStorage) -> ctypes.Array[ctypes.c_char]:
    """The memory of a storage on the CPU. As an array of NumPy's it could not be emptied any more."""
    return (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
