"""The artifact's folder: weights, config, tokenizer and the recipe that makes it again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from workers.disk import write_json
from workers.engine.checkpoint import GENERATION_SETTINGS, Checkpoint
from workers.engine.results import Streamed
from workers.engine.skeleton import Skeleton
from workers.formats import bitsandbytes, compressed_tensors, load_compact, load_sparse, sparse_bitmask
from workers.formats.parts import Parts
from workers.formats.shipped_loader import write_loader
from workers.recipe import Recipe
from workers.techniques import RoundToNearest

# What an artifact takes over from the source beside its weights and config.json.
COMPANION_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
    "chat_template*", "*.tiktoken", "spiece.model", "sentencepiece*",
)  # fmt: skip


def export(
    folder: Path,
    skeleton: Skeleton,
    recipe: Recipe,
    request: dict[str, Any],
    streamed: Streamed,
    parts: Parts,
) -> None:
    """Write the artifact's weights, config, tokenizer and resolved recipe."""
    checkpoint = skeleton.checkpoint
    folder.mkdir()
    if recipe.stores_bitmasks:
        parts.assemble(folder, sparse_bitmask.STEM)
        write_loader(folder, load_sparse)
    elif skeleton.compact:
        parts.assemble(folder, Path(load_compact.WEIGHTS).stem)
        write_loader(folder, load_compact)
    else:
        parts.assemble(folder)
    config = plain_config(checkpoint)
    if skeleton.compact:  # the loader goes by it, and a config.json may be silent
        config["architectures"] = config.get("architectures") or [type(skeleton.model).__name__]
    if recipe.cast is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = recipe.cast
    if streamed.grids:
        config["quantization_config"] = _quantization_config(skeleton, recipe, streamed)
    write_json(folder / "config.json", config)
    copy_companions(checkpoint, folder)
    source = json.loads((folder.parent / "source" / "model.json").read_text(encoding="utf-8"))
    # A body that can be posted again; which texts it was made with, the report says.
    model = {"id": request["model"]["id"], "revision": source["revision"]}
    write_json(folder / "recipe.json", {"model": model, "recipe": recipe.model_dump(mode="json")})


def _quantization_config(skeleton: Skeleton, recipe: Recipe, streamed: Streamed) -> dict[str, Any]:
    if recipe.output.format == "bitsandbytes":
        stage, layer = recipe.quantization, next(iter(streamed.grids))
        assert isinstance(stage, RoundToNearest)
        return bitsandbytes.quantization_config(
            streamed.grids,
            skeleton.linear_layers,
            skeleton.checkpoint.stored_dtype(f"{layer}.weight"),
            double_quant=stage.double_quant,
        )
    assert recipe.output.packing is not None
    return compressed_tensors.quantization_config(
        streamed.grids,
        skeleton.linear_layers,
        recipe.output.packing,
        activations=recipe.activations,
        unpacks_on_load=recipe.quantizes_embeddings,
    )


def plain_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config of a checkpoint whose weights are stored as values."""
    return {key: value for key, value in checkpoint.config.items() if key not in {"quantization_config", "auto_map"}}


def copy_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy what lies beside the weights of ``checkpoint``, its tokenizer above all."""
    of_tokenizer = checkpoint.tokenizer_folder
    for pattern in COMPANION_FILES:
        for path in sorted(of_tokenizer.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    settings = checkpoint.folder / GENERATION_SETTINGS
    if settings.exists() and not (folder / GENERATION_SETTINGS).exists():
        shutil.copyfile(settings, folder / GENERATION_SETTINGS)
