"""Hidden states between two blocks, in files that are mapped into memory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor


class Activations:
    """A folder with what each of several passes brings to a block.

    Two files of a pass take turns: that of the block before stays whole until all of the next block's are there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, index: int, number: int) -> Path:
        """Where what pass ``number`` brings to block ``index`` lies."""
        return self._folder / f"{index % 2}-{number:05d}.float32"

    def keep(self, index: int, number: int, hidden: Tensor) -> None:
        """Put ``hidden`` (float32), which pass ``number`` brings to block ``index``, into a file.

        On the CPU the file, mapped into memory, becomes the tensor's storage: whoever holds the tensor needs to know
        nothing, and the memory is given back.

        Raises:
            OSError: the disk is full.
        """
        path = self.path(index, number)
        with path.open("ab") as file:
            # Written through a mapping, a full disk would kill the process.
            os.posix_fallocate(file.fileno(), 0, max(1, hidden.numel() * 4))
        mapped = _mapped(path, hidden.shape)
        mapped.copy_(hidden)
        if hidden.device == mapped.device:
            put(mapped, hidden)

    def restore(self, index: int, number: int, hidden: Tensor) -> None:
        """Give ``hidden`` the values that pass ``number`` brought to block ``index``."""
        mapped = _mapped(self.path(index, number), hidden.shape)
        if hidden.device == mapped.device:
            put(mapped, hidden)
        else:
            hidden.copy_(mapped)

    def remove(self) -> None:
        """Take the files away; tensors that lie in them stay as they are."""
        shutil.rmtree(self._folder)


def put(storage_of: Tensor, tensor: Tensor) -> None:
    """Give ``tensor`` the storage of another one of its shape."""
    tensor.set_(storage_of.untyped_storage(), 0, storage_of.shape, storage_of.stride())


def _mapped(path: Path, shape: torch.Size) -> Tensor:
    return torch.from_file(str(path), shared=True, size=shape.numel(), dtype=torch.float32).view(shape)
