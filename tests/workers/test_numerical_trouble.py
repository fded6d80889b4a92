"""Every technique over weights and texts that arithmetic stumbles over: handled, with what became of each layer in the
report, or refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models import write_tiny_llama
from tests.workers.attempts import TEXTS, Attempt, fetched
from workers.certify import certify
from workers.errors import JobError
from workers.pipeline import compress

GPTQ: dict[str, Any] = {"technique": "gptq", "scheme": "W4A16", "group_size": 32}
SPARSEGPT: dict[str, Any] = {"technique": "sparsegpt", "sparsity": 0.5}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "nearest": [{"technique": "round_to_nearest", "scheme": "W4A16", "group_size": 32}],
    "nearest-zero-points": [
        {"technique": "round_to_nearest", "group_size": 32, "symmetric": False, "clip_search": True}
    ],
    "fp8": [{"technique": "round_to_nearest", "scheme": "FP8"}],
    "dynamic-int8": [{"technique": "dynamic_int8"}],
    "gptq": [GPTQ],
    "gptq-zero-points": [{**GPTQ, "symmetric": False, "act_order": False}],
    "asymmetric": [{**GPTQ, "asymmetric_calibration": True}],
    "mixed": [{"technique": "mixed_precision", "average_bits": 5.0, "group_size": 32}],
    "awq": [{"technique": "awq", "group_size": 32}],
    "smoothquant": [{"technique": "smoothquant"}],
    "magnitude": [{"technique": "magnitude", "sparsity": 0.5}],
    "wanda": [{"technique": "wanda", "sparsity": 0.5}],
    "wanda-2:4": [{"technique": "wanda", "mask_structure": "2:4"}],
    "sparsegpt": [SPARSEGPT],
    "sparsegpt-2:4": [{"technique": "sparsegpt", "mask_structure": "2:4"}],
    "sparsegpt-gptq": [SPARSEGPT, GPTQ],
}  # fmt: skip
# The others go the same ways with other options.
USUAL = {"nearest-zero-points", "mixed", "awq", "smoothquant", "wanda", "sparsegpt-gptq"}
EACH_RECIPE = [
    pytest.param(stages, id=name, marks=[] if name in USUAL else [pytest.mark.long]) for name, stages in RECIPES.items()
]

Tensors = dict[str, Tensor]
Trouble = Callable[[Tensors], None]
BLOCK = "model.layers.0"
Q, UP, DOWN = f"{BLOCK}.self_attn.q_proj.weight", f"{BLOCK}.mlp.up_proj.weight", f"{BLOCK}.mlp.down_proj.weight"
NORM = f"{BLOCK}.input_layernorm.weight"


def filled(names: Iterable[str], value: float) -> Trouble:
    def make(tensors: Tensors) -> None:
        for name in names:
            tensors[name].fill_(value)

    return make


def scaled(name: str, factor: float, *, rows: slice = slice(None), columns: slice = slice(None)) -> Trouble:
    def make(tensors: Tensors) -> None:
        tensors[name][rows, columns] *= factor

    return make


def against_each_other(tensors: Tensors) -> None:
    """Two layers whose product is as ever, one 1e25 times too large and the other too small."""
    tensors[UP] *= 1e25
    tensors[DOWN] *= 1e-25


def norm_against_weights(tensors: Tensors) -> None:
    """Inputs whose squares are beyond float32, and weights that bring them back."""
    tensors[NORM] *= 1e25
    for name in ("q", "k", "v"):
        tensors[f"{BLOCK}.self_attn.{name}_proj.weight"] *= 1e-25


def twins(tensors: Tensors) -> None:
    """Every second column of the input is its neighbour's: the Hessian has half its rank."""
    embedding = tensors["model.embed_tokens.weight"]
    embedding[:, 1::2] = embedding[:, ::2]
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name][1::2] = tensors[name][::2]


def dead_columns(tensors: Tensors) -> None:
    tensors[NORM][:16] = 0


def no_input(tensors: Tensors) -> None:
    tensors[NORM].zero_()


def no_weights(tensors: Tensors) -> None:
    filled([name for name in tensors if name.endswith("_proj.weight")], 0.0)(tensors)


def nothing(_: Tensors) -> None:
    """The weights are as they should be: the text is the trouble."""


SHORT = {"calibration": {"dataset": {"texts": TEXTS[:3]}, "num_samples": 1, "max_seq_length": 8}}
ONE_TOKEN = {"calibration": {"dataset": {"texts": ["a" * 500]}, "num_samples": 4, "max_seq_length": 32}}

# What has to be handled whatever the technique.
HANDLED: dict[str, tuple[Trouble, dict[str, Any]]] = {
    "dead-columns": (dead_columns, {}),
    "no-input": (no_input, {}),
    "twin-columns": (twins, {}),
    "one-layer-zero": (filled([Q], 0.0), {}),
    "equal-weights": (filled([Q, UP], 0.5), {}),
    "tiny-weights": (scaled(UP, 1e-30), {}),
    "huge-rows": (scaled(Q, 1e4, rows=slice(0, 2)), {}),
    "huge-column": (scaled(DOWN, 1e4, columns=slice(3, 4)), {}),
    "one-sample": (nothing, SHORT),
    "one-token": (nothing, ONE_TOKEN),
}
# What a technique may also refuse, naming the trouble.
EXTREME: dict[str, Trouble] = {
    "layers-1e25-apart": against_each_other,
    "norm-1e25-against-weights": norm_against_weights,
    "rows-1e25-apart": scaled(UP, 1e25, rows=slice(0, 2)),
    "column-1e25-apart": scaled(DOWN, 1e25, columns=slice(3, 4)),
    "all-layers-zero": no_weights,
    "largest-numbers": filled([DOWN], 3e38),
}
NAMED = {"non_finite_activations", "non_finite_evaluation", "non_finite_weights", "nothing_changed", "out_of_range"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roots") / "model"
    write_tiny_llama(folder, num_layers=1)
    return folder


def prepared(work: Path, model: Path, stages: list[dict[str, Any]], trouble: Trouble, **recipe: Any) -> Attempt:
    """An attempt whose model got its trouble behind the checks, as a damaged disk would give it."""
    evaluation = {"dataset": {"texts": TEXTS[150:]}, "num_tokens": 64, "max_seq_length": 64}
    attempt = fetched(work, model, {"stages": stages, "evaluation": evaluation, **recipe})
    link = work / "source" / "model" / "model.safetensors"
    tensors = load_file(link)
    trouble(tensors)
    link.unlink()
    save_file(tensors, link, {"format": "pt"})
    told = work / "source" / "model.json"
    facts = json.loads(told.read_text())
    facts["fingerprint"]["model.safetensors"] = [link.stat().st_size, link.stat().st_mtime_ns]
    told.write_text(json.dumps(facts))
    return attempt


def run(attempt: Attempt) -> None:
    compress(attempt.work, attempt.request, attempt.events.append)
    certify(attempt.work, attempt.request, attempt.events.append)


def numbers(value: Any) -> Iterable[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, float):
        yield value


@pytest.mark.parametrize("stages", EACH_RECIPE)
@pytest.mark.parametrize(("trouble", "recipe"), HANDLED.values(), ids=HANDLED)
def test_it_is_handled(
    trouble: Trouble, recipe: dict[str, Any], stages: list[dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    """The artifact is proven by certification itself, and its report has no number that is none."""
    attempt = prepared(tmp_path / "work", model, stages, trouble, **recipe)
    run(attempt)
    assert all(math.isfinite(number) for number in numbers(attempt.report))


@pytest.mark.parametrize("stages", EACH_RECIPE)
@pytest.mark.parametrize("trouble", EXTREME.values(), ids=EXTREME)
def test_it_is_handled_or_named(trouble: Trouble, stages: list[dict[str, Any]], model: Path, tmp_path: Path) -> None:
    attempt = prepared(tmp_path / "work", model, stages, trouble)
    failure: JobError | None = None
    try:
        run(attempt)
    except JobError as error:
        failure = error
    if failure is None:
        assert all(math.isfinite(number) for number in numbers(attempt.report))
    else:
        assert failure.blame == "user", failure
        assert failure.code in NAMED, failure


@pytest.mark.parametrize("stages", EACH_RECIPE)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(
    value: float, stages: list[dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    attempt = prepared(tmp_path / "work", model, stages, filled([UP], value))
    with pytest.raises(JobError) as caught:
        run(attempt)
    assert caught.value.code == "non_finite_weights"
    assert UP.removesuffix(".weight") in caught.value.message
    assert not attempt.artifact.exists()


def test_what_a_layer_got_instead_is_in_the_report(model: Path, tmp_path: Path) -> None:
    attempt = prepared(tmp_path / "work", model, [GPTQ], dead_columns)
    run(attempt)
    layers = attempt.report["stages"][0]["layers"]
    assert layers[Q.removesuffix(".weight")]["num_dead_columns"] == 16
    assert layers[DOWN.removesuffix(".weight")]["num_dead_columns"] == 0
    assert torch.isfinite(load_file(attempt.artifact / "model.safetensors")["model.norm.weight"]).all()


def test_groups_whose_squares_are_no_numbers_are_rounded_like_others(model: Path, tmp_path: Path) -> None:
    """No search can compare infinite errors: the grid covers each group's extremes."""
    codes = []
    for name, trouble in (("as-it-is", nothing), ("scaled", scaled(UP, 2.0**80))):
        stage = {**RECIPES["nearest-zero-points"][0], "symmetric": True}
        attempt = prepared(tmp_path / name, model, [stage], trouble)
        compress(attempt.work, attempt.request, attempt.events.append)
        codes.append(load_file(attempt.artifact / "model.safetensors")[UP + "_packed"])
    extremes = prepared(tmp_path / "extremes", model, [RECIPES["nearest"][0] | {"clip_search": False}], nothing)
    compress(extremes.work, extremes.request, extremes.events.append)
    assert torch.equal(codes[1], load_file(extremes.artifact / "model.safetensors")[UP + "_packed"])
    assert not torch.equal(codes[0], codes[1])


@pytest.mark.parametrize("stages", [[SPARSEGPT], [SPARSEGPT, RECIPES["nearest"][0]]], ids=["alone", "rounded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_errors_that_cannot_be_carried_on_are_not_and_it_is_said(
    dtype: torch.dtype, stages: list[dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    """What is left of the layer is still there: half of it, and not zeros alone."""
    largest = 0.9 * torch.finfo(dtype).max

    def trouble(tensors: Tensors) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})
        tensors[DOWN].fill_(largest)

    attempt = prepared(tmp_path / "work", model, stages, trouble)
    run(attempt)
    fallbacks = attempt.report["stages"][0]["fallbacks"]
    assert [(each["layer"], each["code"]) for each in fallbacks] == [(DOWN.removesuffix(".weight"), "overflow")]
    stored = load_file(attempt.artifact / "model.safetensors")
    if DOWN in stored:
        assert float((stored[DOWN] > 0.9 * largest).float().mean()) == pytest.approx(0.5, abs=0.01)
    else:
        nothing = torch.tensor(-0x77777778, dtype=torch.int32)  # eight codes that stand for zero
        assert float((stored[DOWN + "_packed"] != nothing).float().mean()) > 0.4


def test_an_aim_beyond_float32_is_given_up_and_it_is_said(model: Path, tmp_path: Path) -> None:
    stage = {**GPTQ, "scheme": "W2A16", "asymmetric_calibration": True}
    recipe = {"output": {"format": "safetensors"}}
    attempt = prepared(tmp_path / "work", model, [stage], filled([DOWN], 3e38), **recipe)
    compress(attempt.work, attempt.request, attempt.events.append)
    (fallback,) = json.loads((attempt.work / "compressed.json").read_text())["stages"][0]["fallbacks"]
    assert (fallback["layer"], fallback["code"]) == (DOWN.removesuffix(".weight"), "overflow")
    assert "aimed at the output on its own input" in fallback["message"]


def test_a_scale_that_no_weight_could_take_is_left_out_and_said(model: Path, tmp_path: Path) -> None:
    attempt = prepared(tmp_path / "work", model, RECIPES["smoothquant"], filled([DOWN], 3e38))
    compress(attempt.work, attempt.request, attempt.events.append)
    fallbacks = json.loads((attempt.work / "compressed.json").read_text())["stages"][0]["fallbacks"]
    assert [(each["layer"], each["code"]) for each in fallbacks] == [(DOWN.removesuffix(".weight"), "input_scale")]


@pytest.mark.parametrize("name", ["gptq", "sparsegpt", "awq"])
def test_the_relative_error_of_huge_weights_is_that_of_small_ones(name: str, model: Path, tmp_path: Path) -> None:
    """A factor for all weights of a layer changes no choice but that of the clip search."""
    errors = []
    for folder, trouble in (("as-it-is", nothing), ("scaled", scaled(DOWN, 2.0**80))):
        stage = RECIPES[name][0] | ({} if name == "sparsegpt" else {"clip_search": False})
        attempt = prepared(tmp_path / folder, model, [stage], trouble)
        compress(attempt.work, attempt.request, attempt.events.append)
        layers = json.loads((attempt.work / "compressed.json").read_text())["stages"][0]["layers"]
        errors.append(layers[DOWN.removesuffix(".weight")]["relative_error"])
    assert errors[1] == pytest.approx(errors[0], rel=0.1)
    assert errors[1] > 0
