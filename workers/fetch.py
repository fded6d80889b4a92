"""Turns the model and data ids of a request into validated files of the work folder. Never imports torch.

Leaves in ``{work}/source``: ``model/``, ``model.json``, ``data.json``, ``evaluation.jsonl`` and, where the
job needs them, ``calibration.jsonl``, ``training.jsonl`` and ``apart.jsonl``; what an earlier attempt at the job left
there complete is used as it is. This is the only process of a job that has the network and a token.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workers.architectures import architecture_of
from workers.disk import write_json
from workers.errors import InfrastructureError, UserError
from workers.formats import load_sparse
from workers.recipe import Recipe
from workers.sources.checkpoint import Checkpoint, read_checkpoint, read_json, without_code
from workers.sources.checkpoint_folder import CheckpointFolder, open_folder, open_model, symlink_refused
from workers.sources.classifier_head import class_names, makes_classifier, with_head, write_head
from workers.sources.facts import ModelFacts
from workers.sources.fetched import is_complete, mark_complete, unmark
from workers.sources.identifiers import FileId, HubId, ModelId, parse_model_id, parse_revision
from workers.sources.inspection import facts_of_checkpoint, gguf_in, inspect_gguf
from workers.sources.labels import labels_of
from workers.sources.texts import write_texts
from workers.sources.tokenizer_file import TOKENIZER_JSON, check_tokenizer_json
from workers.sources.unchanged import FileStates, check_same, file_state, file_states
from workers.training_rules import check_training

Emit = Callable[[dict[str, Any]], None]

HUB_TIMEOUT_SECONDS = 30.0
_SPARE_BYTES = 1 << 30
_MAX_TOKENIZER_BYTES = 256 * 1024 * 1024
# Files whose keys could make a loader run code: given cleaned, where there is something to clean.
_SETTINGS = ("config.json", "tokenizer_config.json")


def fetch(work: Path, request: dict[str, Any], emit: Emit) -> None:
    """Fetch what ``request`` names into ``work``; ``emit`` hears progress and the revision.

    Raises UserError or InfrastructureError; see :mod:`workers.sources`.
    """
    source = work / "source"
    if is_complete(source, request):
        emit(_resolved(json.loads((source / "model.json").read_text(encoding="utf-8"))))
        emit(_progress(1.0))
        return
    unmark(source)
    recipe = Recipe.model_validate(request["recipe"])
    model_roots = [Path(root) for root in request["model_roots"]]
    model = parse_model_id(request["model"]["id"])
    revision = parse_revision(request["model"].get("revision"), model)
    destination = source / "model"
    shutil.rmtree(destination, ignore_errors=True)
    destination.mkdir(parents=True)

    head = None
    if makes_classifier(recipe) and recipe.training is not None:
        head = _Head(class_names(recipe.training, model_roots), recipe.seed)
    facts, before = _fetch_model(request["model"]["id"], model, revision, model_roots, source, head, emit)
    if revision is not None and not isinstance(model, HubId) and facts.revision != revision:
        raise UserError(
            "revision_not_found",
            f"The content of {facts.model_id} has changed: its digest is now {facts.revision}.",
            param="model.revision",
            hint="Leave the revision out to take the content as it is.",
        )
    emit(_resolved(facts.to_dict()))
    check_training(recipe, facts.config)
    data = write_texts(
        recipe,
        source,
        model_roots,
        labels=labels_of(recipe.evaluation, facts.config),
        training_labels=None if recipe.training is None else labels_of(recipe.training, facts.config),
        measures_apart=architecture_of(facts.config).task == "causal",
    )
    write_json(source / "data.json", data)
    states = file_states(destination)
    check_same(before, states)
    write_json(source / "model.json", {**facts.to_dict(), "fingerprint": states})
    mark_complete(source, request)
    emit(_progress(1.0))


def _fetch_model(
    model_id: str,
    model: ModelId,
    revision: str | None,
    model_roots: Sequence[Path],
    source: Path,
    head: _Head | None,
    emit: Emit,
) -> tuple[ModelFacts, FileStates]:
    """The facts, and the states in which files that are not ours were found before anything was read of them."""
    destination = source / "model"
    if isinstance(model, HubId):
        return _fetch_from_hub(model.name, model_id, revision, destination, head), {}
    if isinstance(model, FileId):
        with open_model(model.parts, model_roots) as (folder, gguf_name):
            gguf_name = gguf_name or gguf_in(folder)
            if gguf_name is not None:
                return _convert(model_id, folder, gguf_name, destination, emit), {}
            return _link(model_id, folder, destination, head)
    with open_folder(source / "artifact") as folder:
        return _link(model_id, folder, destination, head)


@dataclass(frozen=True)
class _Head:
    """What a model gets that is to become a classifier."""

    classes: tuple[str, ...]
    seed: int

    def put_on(self, checkpoint: Checkpoint, folder: Path) -> Checkpoint:
        """Write the head beside the model's files, if it has none; the checkpoint with it."""
        after = with_head(checkpoint, self.classes)
        if after is not checkpoint:
            write_head(folder, checkpoint, after, self.seed)
        return after


def _link(
    model_id: str, folder: CheckpointFolder, destination: Path, head: _Head | None
) -> tuple[ModelFacts, FileStates]:
    """Check a folder of safetensors and give links to its files: a copy would cost minutes and as much disk."""
    before = {name: file_state(folder.path / name) for name in folder.files}
    checkpoint = read_checkpoint(folder)
    facts = facts_of_checkpoint(model_id, None, checkpoint)
    names = [name for name, _ in facts.files]
    for name in names:
        target = folder.path / name
        descriptor = folder.open(name)
        try:
            checked, found = os.fstat(descriptor), target.lstat()
        finally:
            os.close(descriptor)
        # The path is opened again by others: it must be the file that was checked.
        if (checked.st_dev, checked.st_ino) != (found.st_dev, found.st_ino):
            raise symlink_refused(name)
        # A successor finds a copy of ours in another work folder.
        (destination / name).symlink_to(
            os.path.relpath(target, destination) if target.is_relative_to(destination.parent) else target
        )
    _clean_settings(folder, destination)
    _check_tokenizer(folder)
    if checkpoint.is_sparse:
        _expand(destination)
        check_same({name: before[name] for name in names}, {name: file_state(folder.path / name) for name in names})
    if head is not None:
        facts = facts_of_checkpoint(model_id, None, head.put_on(checkpoint, destination))
    linked = {path.name: before[path.readlink().name] for path in destination.iterdir() if path.is_symlink()}
    return replace(facts, revision=_content_digest(folder, names)), linked


def _convert(model_id: str, folder: CheckpointFolder, name: str, destination: Path, emit: Emit) -> ModelFacts:
    from workers.sources.gguf import convert_gguf

    before = {name: file_state(folder.path / name)}
    facts = inspect_gguf(model_id, folder, name)
    _check_space(destination, facts.parameter_bytes)
    descriptor = folder.open(name)
    try:
        # The descriptor's own path: no other file can take the checked one's place.
        convert_gguf(Path(f"/proc/self/fd/{descriptor}"), destination, lambda fraction: emit(_progress(0.9 * fraction)))
    finally:
        os.close(descriptor)
    with open_folder(destination) as converted:
        facts_of_checkpoint(model_id, None, read_checkpoint(converted))
    revision = _content_digest(folder, [name])
    check_same(before, {name: file_state(folder.path / name)})
    return replace(facts, revision=revision)


def _fetch_from_hub(
    name: str, model_id: str, revision: str | None, destination: Path, head: _Head | None
) -> ModelFacts:
    from workers.sources.hub import open_snapshot

    snapshot = open_snapshot(name, revision, token=None, timeout_seconds=HUB_TIMEOUT_SECONDS)
    # Headers first, by range requests: gigabytes of an unusable model are not worth the wait.
    announced = facts_of_checkpoint(model_id, snapshot.commit, read_checkpoint(snapshot, num_threads=8))
    _check_space(destination, sum(size for _, size in announced.files))
    snapshot.download([name for name, _ in announced.files], destination)
    with open_folder(destination) as folder:
        checkpoint = read_checkpoint(folder)
        facts = facts_of_checkpoint(model_id, snapshot.commit, checkpoint)
        _clean_settings(folder, destination)
        _check_tokenizer(folder)
    if checkpoint.is_sparse:
        _expand(destination)
    if head is not None:
        facts = facts_of_checkpoint(model_id, snapshot.commit, head.put_on(checkpoint, destination))
    return facts


def _expand(folder: Path) -> None:
    """Put the dense weights in the place of a sparse-bitmask archive, a tensor at a time."""
    try:
        tensors = load_sparse.read_tensors(folder)
        _check_space(folder, sum(tensor.num_bytes for tensor in tensors))
        load_sparse.write_dense_weights(tensors, folder)
    except ValueError as error:
        raise UserError(
            "invalid_safetensors",
            f"The sparse archive is not sound: {error}.",
            param="model.id",
            hint="The file is damaged or was not fully copied; fetch the artifact again, or run its job again.",
        ) from error
    for path in {part.path for tensor in tensors for part in tensor.stored}:
        path.unlink()
    (folder / load_sparse.WEIGHTS_INDEX).unlink(missing_ok=True)


def _clean_settings(folder: CheckpointFolder, destination: Path) -> None:
    for name in _SETTINGS:
        if name in folder.files:
            settings = read_json(folder, name)
            cleaned = without_code(settings)
            if cleaned != settings:
                (destination / name).unlink()
                write_json(destination / name, cleaned)


def _check_tokenizer(folder: CheckpointFolder) -> None:
    size_bytes = folder.files.get(TOKENIZER_JSON, 0)
    if size_bytes > _MAX_TOKENIZER_BYTES:
        raise UserError(
            "invalid_tokenizer",
            f"tokenizer.json has {size_bytes} bytes.",
            param="model.id",
            hint=f"At most {_MAX_TOKENIZER_BYTES} bytes are read.",
        )
    if TOKENIZER_JSON in folder.files:
        check_tokenizer_json(folder.read(TOKENIZER_JSON, 0, size_bytes))


def _content_digest(folder: CheckpointFolder, names: Sequence[str]) -> str:
    """40 hex digits that change when a name or a byte does."""

    def digest(name: str) -> str:
        with os.fdopen(folder.open(name), "rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(digest, sorted(names)))
    listing = json.dumps(list(zip(sorted(names), digests, strict=True)))
    return hashlib.sha256(listing.encode()).hexdigest()[:40]


def _check_space(folder: Path, wanted_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < wanted_bytes + _SPARE_BYTES:
        raise InfrastructureError(
            "disk_full",
            f"The model needs {wanted_bytes} bytes and the worker has {free_bytes} bytes of free disk.",
            hint="Free space under ATTAR_WORK_DIR, or use a worker with a larger disk.",
        )


def _resolved(facts: dict[str, Any]) -> dict[str, Any]:
    names = ("source_format", "num_parameters", "parameter_bytes", "source_file_bytes")
    return {"event": "resolved", "revision": facts["revision"], "model": {name: facts[name] for name in names}}


def _progress(fraction: float) -> dict[str, Any]:
    return {"event": "progress", "fraction": fraction, "step": "fetch"}
