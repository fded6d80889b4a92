"""A limit of bytes that the recipe cannot keep ends the job before anything is computed."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from app.jobs.schemas import JobSubmission
from app.jobs.size_limits import check_size
from tests.models import write_tiny_llama
from tests.workers.attempts import compressed, fetched
from workers.architectures import architecture_of
from workers.engine.checkpoint import Checkpoint
from workers.engine.skeleton import Skeleton
from workers.engine.stored_size import StoredSize
from workers.errors import UserError
from workers.evaluation.size import weights_bytes
from workers.pipeline import compress
from workers.recipe import Recipe
from workers.sources.inspection import inspect_model

NEAREST = {"technique": "round_to_nearest", "group_size": 32}
RECIPES: list[dict[str, Any]] = [
    {"stages": [{**NEAREST, "scheme": "W4A16"}]},
    {"stages": [{**NEAREST, "scheme": "W4A16", "embeddings": True}]},
    {"stages": [{**NEAREST, "scheme": "W4A16", "symmetric": False, "ignore": ["*.down_proj", "*.0.*"]}]},
    {"stages": [{**NEAREST, "scheme": "W8A16"}], "output": {"packing": "int-quantized"}},
    {"stages": [{**NEAREST, "scheme": "W3A16"}]},
    {"stages": [{"technique": "dynamic_int8"}]},
    {"stages": [{"technique": "round_to_nearest", "scheme": "FP8"}]},
    {"stages": [{"technique": "round_to_nearest", "scheme": "FP16"}]},
    {"stages": [{"technique": "magnitude"}]},
    {"stages": [{"technique": "round_to_nearest", "scheme": "NF4"}]},
]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def llama(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "roots" / "llama"
    write_tiny_llama(folder, tie=request.param)
    return folder


def refusal(model: Path, recipe: dict[str, Any], limit: int) -> UserError | None:
    parsed = Recipe.model_validate(recipe)
    checkpoint = Checkpoint(model, cast=getattr(torch, parsed.cast) if parsed.cast else None)
    skeleton = Skeleton(checkpoint, architecture_of(checkpoint.config), torch.device("cpu"))
    try:
        StoredSize(skeleton, parsed).check(limit)
    except UserError as error:
        return error
    return None


def test_layers_that_stay_in_full_beside_nf4_count_in_full(tmp_path: Path) -> None:
    folder = tmp_path / "roots" / "llama"
    write_tiny_llama(folder, intermediate_size=100)
    recipe = {"stages": [{"technique": "round_to_nearest", "scheme": "NF4"}]}
    attempt = compressed(tmp_path / "work", folder, recipe)
    assert {each["code"] for each in attempt_fallbacks(attempt.work)} == {"shape"}
    found = weights_bytes(attempt.artifact)
    error = refusal(folder, recipe, 1)
    assert error is not None
    assert error.hint is not None
    allowed = int(error.hint.split()[1].replace(",", ""))
    assert found <= allowed <= 1.2 * found


def attempt_fallbacks(work: Path) -> list[dict[str, Any]]:
    stages = json.loads((work / "compressed.json").read_text())["stages"]
    return [fallback for stage in stages for fallback in stage["fallbacks"]]


def tensor_bytes(folder: Path) -> int:
    (path,) = folder.glob("*.safetensors")
    content = path.read_bytes()
    return len(content) - 8 - int(struct.unpack("<Q", content[:8])[0])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: str(recipe["stages"][0].get("scheme", "")))
def test_the_bytes_that_a_recipe_needs_are_known_before(llama: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    artifact = compressed(tmp_path / "work", llama, recipe).artifact
    found = tensor_bytes(artifact)
    assert refusal(llama, recipe, found) is None
    is_normal = recipe["stages"][0].get("scheme") == "NF4"  # its JSON is left out
    least = found - 300 * 14 if is_normal else found
    error = refusal(llama, recipe, least - 1)
    assert error is not None
    assert (error.code, error.param) == ("constraint_impossible", "constraints.max_size_bytes")
    assert error.hint is not None
    allowed = int(error.hint.split()[1].replace(",", ""))
    assert allowed >= weights_bytes(artifact)
    if not is_normal:
        assert f"{found:,} bytes" in error.message
    # What can be said of headers alone is never more.
    facts = inspect_model("file:llama", model_roots=[llama.parent])
    submission = JobSubmission.model_validate(
        {"model": {"id": "file:llama"}, "recipe": recipe, "constraints": {"max_size_bytes": found}}
    )
    check_size(submission, facts)


TOKENS = {"technique": "vocabulary_pruning", "num_tokens": 300}
TIED = {"technique": "tie_embeddings"}
CUT = {"technique": "depth_pruning", "num_blocks": 1, "keep_first": 0}


@pytest.mark.parametrize(
    "stages",
    [
        [TOKENS], [TIED], [TIED, TOKENS], [TOKENS, TIED, CUT], [TOKENS, NEAREST],
        [TOKENS, {**NEAREST, "embeddings": True}], [TIED, NEAREST],
    ],
)  # fmt: skip
def test_headers_never_refuse_what_fewer_tokens_or_matrices_need(stages: list[dict[str, Any]], tmp_path: Path) -> None:
    model = tmp_path / "roots" / "llama"
    write_tiny_llama(model, tie=False)
    found = tensor_bytes(compressed(tmp_path / "work", model, {"stages": stages}).artifact)
    facts = inspect_model("file:llama", model_roots=[model.parent])

    def check(limit: int) -> None:
        body = {"model": {"id": "file:llama"}, "recipe": {"stages": stages}, "constraints": {"max_size_bytes": limit}}
        check_size(JobSubmission.model_validate(body), facts)

    check(found)
    # How many tokens are left is not known: all may be gone. What is left of the rest is.
    with pytest.raises(UserError, match="at least"):
        check(max(1, (found - 4 * 300 * 64) // 2))


def test_such_a_job_ends_before_it_computes(llama: Path, tmp_path: Path) -> None:
    attempt = fetched(tmp_path / "work", llama, RECIPES[0], constraints={"max_size_bytes": 50_000})
    with pytest.raises(UserError, match="at least") as caught:
        compress(attempt.work, attempt.request, attempt.events.append)
    assert caught.value.code == "constraint_impossible"
    assert not (attempt.work / "journal").exists()


def test_mixed_precision_is_held_against_its_fewest_bits(llama: Path) -> None:
    stage = {"technique": "mixed_precision", "group_size": 32}
    four = refusal(llama, {"stages": [{**NEAREST, "scheme": "W4A16"}]}, 1)
    mixed = refusal(llama, {"stages": [{**stage, "average_bits": 6.0}]}, 1)
    assert four is not None
    assert mixed is not None
    assert four.message == mixed.message


def test_a_bitmask_is_as_large_as_its_values_make_it(llama: Path, tmp_path: Path) -> None:
    recipe = {"stages": [{"technique": "magnitude", "sparsity": 0.9}], "output": {"format": "sparse-bitmask"}}
    attempt = compressed(tmp_path / "work", llama, recipe, constraints={"max_size_bytes": 1})
    assert attempt.artifact.is_dir()
