"""Looks at a model before anything is queued: config, tokenizer and headers, never a weight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from workers.errors import UserError
from workers.sources import facts as facts_of
from workers.sources.checkpoint import ArtifactFacts, Checkpoint, FileSource, read_checkpoint
from workers.sources.checkpoint_folder import CheckpointFolder, open_model
from workers.sources.classifier_head import with_head
from workers.sources.facts import ModelFacts
from workers.sources.identifiers import FileId, HubId, parse_model_id, parse_revision


def inspect_model(
    model_id: str,
    revision: str | None = None,
    *,
    model_roots: Sequence[Path] = (),
    token: str | None = None,
    artifact: ArtifactFacts | None = None,
    classes: tuple[str, ...] | None = None,
    timeout_seconds: float = 10.0,
) -> ModelFacts:
    """The facts of a model, read from ``config.json`` and safetensors headers (or a GGUF header) alone.

    ``artifact`` is needed for a ``job:`` id. With ``classes`` they are those of the classifier that an encoder becomes
    once it has a head for them. The revision is a commit for a hub model; other models get theirs,
    a digest of their content, when they are fetched.

    Raises UserError, naming ``model.id`` or ``model.revision``, or InfrastructureError ``hub_unreachable``.
    """
    model = parse_model_id(model_id)
    revision = parse_revision(revision, model)
    if isinstance(model, FileId):
        with open_model(model.parts, model_roots) as (folder, gguf_name):
            gguf_name = gguf_name or gguf_in(folder)
            if gguf_name is not None:
                return inspect_gguf(model_id, folder, gguf_name)
            return facts_of_checkpoint(model_id, None, _with_head(read_checkpoint(folder), classes))
    if isinstance(model, HubId):
        from workers.sources.hub import open_snapshot

        snapshot = open_snapshot(model.name, revision, token=token, timeout_seconds=timeout_seconds)
        checkpoint = _with_head(read_checkpoint(snapshot, num_threads=8), classes)
        return facts_of_checkpoint(model_id, snapshot.commit, checkpoint)
    if artifact is None:
        raise UserError(
            "model_not_found",
            f"Job {model.job_id} has no artifact to start from.",
            param="model.id",
            hint="Name a job of yours that has succeeded.",
        )
    return facts_of_checkpoint(model_id, None, _with_head(read_checkpoint(artifact), classes))


def _with_head(checkpoint: Checkpoint, classes: tuple[str, ...] | None) -> Checkpoint:
    return checkpoint if classes is None else with_head(checkpoint, classes)


def facts_of_checkpoint(model_id: str, revision: str | None, checkpoint: Checkpoint) -> ModelFacts:
    """The facts of a checked safetensors checkpoint; raises UserError where config and weights disagree."""
    config = checkpoint.config
    tensors = facts_of.canonical(config, checkpoint.tensors)
    facts_of.check_config(config, tensors)
    tensors = facts_of.without_tied_head(config, tensors)
    sizes = dict(checkpoint.files)
    return ModelFacts(
        model_id=model_id,
        revision=revision,
        config=config,
        source_format="sparse-bitmask" if checkpoint.is_sparse else "safetensors",
        files=checkpoint.files,
        parameter_bytes=sum(tensor.num_bytes for tensor in tensors.values()),
        num_parameters=facts_of.count_parameters(config, tensors),
        source_file_bytes=sum(sizes[shard] for shard in checkpoint.shards),
        linear_in_features=facts_of.linear_in_features(config, tensors),
    )


def gguf_in(source: FileSource) -> str | None:
    """The name of the one GGUF file of a folder without safetensors; None where there is none.

    Raises UserError ``several_gguf_files``.
    """
    names = sorted(name for name in source.files if name.endswith(".gguf"))
    if not names or any(name.endswith(".safetensors") for name in source.files):
        return None
    if len(names) > 1:
        raise UserError(
            "several_gguf_files",
            f"The folder holds {len(names)} GGUF files: {', '.join(names[:5])}.",
            param="model.id",
            hint="Name one of them: file:FOLDER/NAME.gguf. Files split into parts have to be merged first.",
        )
    return names[0]


def inspect_gguf(model_id: str, folder: CheckpointFolder, name: str) -> ModelFacts:
    """The facts of the checkpoint that a GGUF file will become."""
    from workers.sources.gguf import GgufFile

    with GgufFile(folder.open(name)) as gguf:
        config, tensors = gguf.config(), gguf.converted_tensors()
    facts_of.check_config(config, tensors)
    return ModelFacts(
        model_id=model_id,
        revision=None,
        config=config,
        source_format="gguf",
        files=((name, folder.files[name]),),
        parameter_bytes=sum(tensor.num_bytes for tensor in tensors.values()),
        num_parameters=facts_of.count_parameters(config, tensors),
        source_file_bytes=folder.files[name],
        linear_in_features=facts_of.linear_in_features(config, tensors),
    )
