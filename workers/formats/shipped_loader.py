"""Loaders that lie in artifacts: single files that need nothing of Attar, put there and run as users will have them."""

from __future__ import annotations

import shutil
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

from workers.formats import load_compact, load_sparse

_LOADERS = [Path(str(loader.__file__)) for loader in (load_sparse, load_compact)]


def write_loader(folder: Path, loader: ModuleType) -> None:
    """Put a loader beside the weights."""
    source = Path(str(loader.__file__))
    shutil.copyfile(source, folder / source.name)


def name_of_loader(folder: Path) -> str | None:
    """The module that opens an artifact of ours; None for one that plain transformers opens."""
    return next((path.stem for path in _LOADERS if (folder / path.name).exists()), None)


def loader_of(folder: Path) -> ModuleType:
    """The loader that lies in an artifact of ours, as its users will have it."""
    loader = _WithoutBytecode("attar_artifact_loader", str(folder / f"{name_of_loader(folder)}.py"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


class _WithoutBytecode(SourceFileLoader):
    """Leaves no bytecode beside the source: the artifact's folder holds what users get."""

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:
        """Write nothing."""
