"""Heads, neurons and channels that are left out: which ones, and that what is left is the original without them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from app.jobs.schemas import JobSubmission
from app.jobs.size_limits import check_size
from tests.models import write_tiny_model
from tests.workers.attempts import Attempt, certified, compressed, fetched
from tests.workers.sources.test_gguf import as_gguf, llama_weights, load_bf16, write_gguf
from workers.architectures import ARCHITECTURES, AUTO_CLASSES, Architecture, Task
from workers.certify import certify
from workers.engine.text import calibration_samples, read_documents, tokenize
from workers.errors import CrashError, UserError
from workers.pipeline import compress
from workers.recipe import Recipe
from workers.shapes import config_after, facts_after
from workers.shapes.width import widths_of
from workers.sources.inspection import inspect_model
from workers.techniques import WidthPruning

NUM_BLOCKS = 3
RANDOM = torch.arange(5, 302).view(3, 99)
SIZES = {"num_hidden_layers": NUM_BLOCKS, "intermediate_size": 96, "scale": 4.0}
GROUPED = {**SIZES, "num_key_value_heads": 2}
ENCODER = {**SIZES, "num_labels": 3}
DISTILBERT = {"n_layers": NUM_BLOCKS, "dim": 64, "hidden_dim": 96, "n_heads": 4, "scale": 4.0, "num_labels": 3}
OPT = {"num_hidden_layers": NUM_BLOCKS, "ffn_dim": 96, "scale": 4.0}
SHAPES: dict[str, tuple[str, Task, dict[str, Any]]] = {
    "llama": ("llama", "causal", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", "causal", {**GROUPED, "sliding_window": 16}),
    "qwen2": ("qwen2", "causal", GROUPED),
    "qwen3": ("qwen3", "causal", {**GROUPED, "head_dim": 32}),
    "gemma3_text": ("gemma3_text", "causal", {**GROUPED, "head_dim": 16, "sliding_window": 16}),
    "phi3": ("phi3", "causal", GROUPED),
    "opt": ("opt", "causal", {**OPT, "word_embed_proj_dim": 64}),
    "opt_like_350m": ("opt", "causal", {**OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "gpt_neox": ("gpt_neox", "causal", SIZES),
    "gpt2": ("gpt2", "causal", {"num_hidden_layers": NUM_BLOCKS, "scale": 4.0}),
    "bert": ("bert", "masked", SIZES),
    "bert_classifier": ("bert", "classification", ENCODER),
    "roberta": ("roberta", "masked", SIZES),
    "roberta_classifier": ("roberta", "classification", ENCODER),
    "distilbert": ("distilbert", "masked", DISTILBERT),
    "distilbert_classifier": ("distilbert", "classification", DISTILBERT),
}
TEXTS = [f"one two {'three ' * (number % 4)}four {number * number}" for number in range(12)]
RECIPE = {"calibration": {"dataset": {"texts": TEXTS}, "num_samples": 16, "max_seq_length": 64}}


class Stopped(BaseException):
    """The run ends here."""


@dataclass
class Kept:
    """Units by brute force, each list in order; None where all stay."""

    neurons: list[list[int]] | None = None
    groups: list[list[int]] | None = None
    channels: list[int] | None = None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roots") / "wide"
    write_tiny_model(folder, "llama", num_hidden_layers=4, num_key_value_heads=2, intermediate_size=128, scale=4.0)
    return folder


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of random models differ by little: statistics in bfloat16 would choose some others."""
    monkeypatch.setattr("workers.engine.forward.inexact_products", nullcontext)


def write_model(folder: Path, name: str) -> tuple[Task, Architecture]:
    model_type, task, config = SHAPES[name]
    write_tiny_model(folder, model_type, task=task, **config)
    return task, ARCHITECTURES[model_type, task]


def opened_original(folder: Path, task: Task) -> Any:
    auto: Any = getattr(transformers, AUTO_CLASSES[task])
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def plain_logits(folder: Path, task: Task) -> Tensor:
    with torch.inference_mode():
        return torch.as_tensor(opened_original(folder, task)(input_ids=RANDOM).logits)


def calibration(attempt: Attempt, folder: Path, task: Task) -> list[Tensor]:
    """The samples that the worker reads, each sequences × tokens."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    if task != "causal":
        return [torch.tensor([tokenizer(text).input_ids]) for text in TEXTS]
    ids = tokenize(tokenizer, read_documents(attempt.work / "source" / "calibration.jsonl"), param="")
    return [calibration_samples(ids, 16, 64, seed=0)]


@torch.inference_mode()
def most_important(folder: Path, task: Task, row: Architecture, samples: list[Tensor], after: dict[str, int]) -> Kept:
    """What arXiv:2407.14679 keeps: everything that the layers read is gathered, and nothing is summed on the way."""
    model, widths = opened_original(folder, task), widths_of(json.loads((folder / "config.json").read_text()))
    heard: dict[str, list[Tensor]] = {}

    def hear(name: str) -> Callable[..., None]:
        return lambda _, inputs: heard.setdefault(name, []).append(inputs[0])

    blocks = model.get_submodule(row.blocks)
    for index, block in enumerate(blocks):
        for group in row.linear_groups:
            block.get_submodule(group[0]).register_forward_pre_hook(hear(f"{index}.{group[0]}"))
    for ids in samples:
        for sample in ids:
            model(input_ids=sample.unsqueeze(0))

    def norms(layer: str, num_units: int) -> Tensor:
        of_samples = [each.reshape(-1, num_units, each.shape[-1] // num_units) for each in heard[layer]]
        return torch.stack([each.square().sum(dim=(0, 2)).sqrt() for each in of_samples]).double().mean(dim=0)

    def most(scores: Tensor, number: int) -> list[int]:
        return sorted(sorted(range(len(scores)), key=lambda unit: -float(scores[unit]))[:number])

    kept, numbers = Kept(), range(len(blocks))
    attention, output, gates, down = (group[0] for group in row.linear_groups)
    if "intermediate_size" in after:
        scores = [norms(f"{index}.{down}", widths.intermediate_size) for index in numbers]
        kept.neurons = [most(each, after["intermediate_size"]) for each in scores]
    if "num_key_value_heads" in after:
        scores = [norms(f"{index}.{output}", widths.num_key_value_heads) for index in numbers]
        kept.groups = [most(each, after["num_key_value_heads"]) for each in scores]
    if "hidden_size" in after:
        layers = [f"{index}.{layer}" for index in numbers for layer in (attention, gates)]
        channels = torch.stack([norms(layer, widths.hidden_size) for layer in layers]).sum(dim=0)
        kept.channels = most(channels, after["hidden_size"])
    return kept


@torch.inference_mode()
def logits_of_the_rest(folder: Path, task: Task, row: Architecture, kept: Kept) -> Tensor:
    """What plain transformers gives of the whole model in which all that is not kept is held at zero."""
    model = opened_original(folder, task)
    widths = widths_of(json.loads((folder / "config.json").read_text()))
    _, output, _, down = row.linear_groups
    for index, block in enumerate(model.get_submodule(row.blocks)):
        if kept.neurons is not None:
            silence_inputs(block.get_submodule(down[0]), kept.neurons[index], 1)
        if kept.groups is not None:
            length = widths.queries_a_group * widths.head_dim
            silence_inputs(block.get_submodule(output[0]), kept.groups[index], length)
    if kept.channels is not None:
        hold_channels_at_zero(model, row, widths.hidden_size, kept.channels)
    return torch.as_tensor(model(input_ids=RANDOM).logits)


def silence_inputs(layer: nn.Module, kept: list[int], length: int) -> None:
    """Let the layer read zeros in place of all units but those that are kept, each ``length`` columns."""

    def silence(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        mask = torch.zeros(inputs[0].shape[-1] // length, length)
        mask[kept] = 1
        return (inputs[0] * mask.flatten(),)

    layer.register_forward_pre_hook(silence)


def hold_channels_at_zero(model: Any, row: Architecture, hidden_size: int, kept: list[int]) -> None:
    """Let nothing write the other channels, and norms be taken of the kept ones."""
    mask = torch.zeros(hidden_size)
    mask[kept] = 1
    writers = {layer for group in (row.linear_groups[1], row.linear_groups[3]) for layer in group}

    def narrow(norm: nn.Module) -> Callable[..., Tensor]:
        inner: Any = copy.deepcopy(norm)
        for name, parameter in inner.named_parameters():
            setattr(inner, name, nn.Parameter(parameter[kept]))
        if isinstance(inner, nn.LayerNorm):
            inner.normalized_shape = (len(kept),)
        return lambda _, inputs, outputs: torch.zeros_like(outputs).index_copy(
            -1, torch.tensor(kept), inner(inputs[0][..., kept])
        )

    for name, module in model.named_modules():
        in_block = name.removeprefix(f"{row.blocks}.").partition(".")[2] if name.startswith(f"{row.blocks}.") else None
        if type(module).__name__.endswith("Norm") and not name.endswith(("q_norm", "k_norm")):
            module.register_forward_hook(narrow(module))
        elif isinstance(module, nn.Embedding) and module.weight.shape[1] == hidden_size:
            # Gemma multiplies by the root of the hidden size.
            factor = (len(kept) / hidden_size) ** 0.5 if hasattr(module, "embed_scale") else 1.0
            module.register_forward_hook(lambda _, __, outputs, factor=factor: outputs * mask * factor)
        elif in_block in writers or (
            in_block is None and isinstance(module, nn.Linear) and name not in (row.head, "model.decoder.project_out")
        ):
            module.register_forward_hook(lambda _, __, outputs: outputs * mask)


def sizes_for(row: Architecture) -> dict[str, int]:
    """Sizes that the architecture can have together."""
    return {"intermediate_size": 40, "num_key_value_heads": 1 if row.has_head_dim else 3, "hidden_size": 48}


def cases() -> list[tuple[str, tuple[str, ...]]]:
    """Every model with all its sizes cut, and some with one."""
    all_sizes = ("intermediate_size", "num_key_value_heads", "hidden_size")
    alone = [*(("llama", size) for size in all_sizes), *(("phi3", size) for size in all_sizes)]
    alone += [("gpt2", "intermediate_size"), ("opt_like_350m", "intermediate_size"), ("qwen2", "hidden_size")]
    return [*((name, all_sizes) for name in SHAPES), *((name, (size,)) for name, size in alone)]


def test_every_architecture_is_tried() -> None:
    assert {(model_type, task) for model_type, task, _ in SHAPES.values()} == {
        known for known, row in ARCHITECTURES.items() if not row.is_recurrent
    }


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize(("name", "options"), cases())
def test_the_result_is_the_original_with_its_most_important_units(
    name: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    task, row = write_model(tmp_path / "model", name)
    after = {option: size for option, size in sizes_for(row).items() if option in options}
    recipe = {"stages": [{"technique": "width_pruning", **after}], **(RECIPE if task != "causal" else {})}
    attempt = certified(tmp_path / "work", tmp_path / "model", recipe)
    samples = calibration(attempt, tmp_path / "model", task)
    kept = most_important(tmp_path / "model", task, row, samples, after)
    expected = logits_of_the_rest(tmp_path / "model", task, row, kept)
    found = plain_logits(attempt.artifact, task)
    whole = plain_logits(tmp_path / "model", task)
    assert torch.linalg.vector_norm(whole - expected) > 0.05 * torch.linalg.vector_norm(expected)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    metrics = attempt.report["stages"][0]["metrics"]
    assert metrics["kept_key_value_heads"] == kept.groups
    check_sizes(attempt, tmp_path / "model", recipe, metrics, after)


def check_sizes(
    attempt: Attempt, model: Path, recipe: dict[str, Any], metrics: dict[str, Any], after: dict[str, int]
) -> None:
    """The report and the config say the sizes, and what was said of them beforehand was right."""
    configs = [json.loads((folder / "config.json").read_text()) for folder in (model, attempt.artifact)]
    old, new = map(widths_of, configs)
    assert new.head_dim == old.head_dim
    for size in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        assert (metrics[f"original_{size}"], metrics[size]) == (getattr(old, size), getattr(new, size))
    assert {size: metrics[size] for size in after} == after
    weights = [each for path in attempt.artifact.glob("*.safetensors") for each in load_file(path).values()]
    assert metrics["num_parameters"] == sum(weight.numel() for weight in weights)
    facts = inspect_model("file:model", model_roots=[model.parent])
    shaped = facts_after(Recipe.model_validate(recipe).stages, facts)
    assert shaped.linear_in_features == inspect_model("file:artifact", model_roots=[attempt.work]).linear_in_features
    num_bytes = sum(weight.nbytes for weight in weights)
    body = {"model": {"id": "file:model"}, "recipe": recipe}
    check_size(JobSubmission.model_validate({**body, "constraints": {"max_size_bytes": num_bytes}}), facts)
    with pytest.raises(UserError, match="at least"):
        check_size(JobSubmission.model_validate({**body, "constraints": {"max_size_bytes": num_bytes // 3}}), facts)


def weights_of_units(name: str, state: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """By architecture, for each block the norm of the weights of each neuron and head, and of each channel of all."""
    neurons, heads, channels = [], [], torch.zeros(64)
    for index in range(NUM_BLOCKS):

        def weight(layer: str, index: int = index) -> Tensor:
            prefix = {"llama": "model.layers", "phi3": "model.layers", "gpt2": "transformer.h"}.get(
                name, "gpt_neox.layers"
            )
            tensor = state[f"{prefix}.{index}.{layer}.weight"].float().square()
            return tensor.T if name == "gpt2" else tensor

        if name == "llama":
            q, k, v = (weight(f"self_attn.{each}_proj").view(2, -1, 64) for each in "qkv")
            made, o = torch.cat([q, k, v], dim=1), weight("self_attn.o_proj")
            gates, down = torch.stack([weight("mlp.gate_proj"), weight("mlp.up_proj")], 1), weight("mlp.down_proj")
        elif name == "phi3":
            q, k, v = torch.split_with_sizes(weight("self_attn.qkv_proj"), [64, 32, 32])
            made, o = (
                torch.cat([q.view(2, 32, 64), k.view(2, 16, 64), v.view(2, 16, 64)], 1),
                weight("self_attn.o_proj"),
            )
            gates, down = weight("mlp.gate_up_proj").view(2, 96, 64).transpose(0, 1), weight("mlp.down_proj")
        elif name == "gpt2":
            made = torch.stack([each.view(4, 16, 64) for each in weight("attn.c_attn").tensor_split(3)], 1).flatten(
                1, 2
            )
            o, gates, down = weight("attn.c_proj"), weight("mlp.c_fc").unsqueeze(1), weight("mlp.c_proj")
        else:
            made, o = weight("attention.query_key_value").view(4, 48, 64), weight("attention.dense")
            gates, down = weight("mlp.dense_h_to_4h").unsqueeze(1), weight("mlp.dense_4h_to_h")
        heads.append(made.sum(dim=(1, 2)) + o.view(64, len(made), -1).sum(dim=(0, 2)))
        neurons.append(gates.sum(dim=(1, 2)) + down.sum(dim=0))
        channels += made.sum(dim=(0, 1)) + gates.sum(dim=(0, 1)) + o.sum(dim=1) + down.sum(dim=1)
    return neurons, heads, channels


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt_neox"])
def test_by_magnitude_the_largest_weights_stay_and_no_text_is_read(name: str, tmp_path: Path) -> None:
    task, row = write_model(tmp_path / "model", name)
    after = sizes_for(row)
    recipe = {"stages": [{"technique": "width_pruning", "importance": "magnitude", **after}]}
    assert not Recipe.model_validate(recipe).needs_calibration
    attempt = compressed(tmp_path / "work", tmp_path / "model", recipe)
    neurons, heads, channels = weights_of_units(name, load_file(tmp_path / "model" / "model.safetensors"))

    def most(scores: Tensor, option: str) -> list[int]:
        return sorted(scores.topk(after[option]).indices.tolist())

    kept = Kept(
        [most(each, "intermediate_size") for each in neurons],
        [most(each, "num_key_value_heads") for each in heads],
        most(channels, "hidden_size"),
    )
    expected = logits_of_the_rest(tmp_path / "model", task, row, kept)
    found = plain_logits(attempt.artifact, task)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("stop_at", [1, 2, 4, 6])
def test_a_stopped_measurement_goes_on_and_gives_the_same_bytes(stop_at: int, model: Path, tmp_path: Path) -> None:
    stage = {"technique": "width_pruning", "keep_intermediate": 0.5, "num_key_value_heads": 1, "keep_hidden": 0.5}
    undisturbed = compressed(tmp_path / "undisturbed", model, {"stages": [stage]})
    attempt = fetched(tmp_path / "work", model, {"stages": [stage]})
    num_steps = 0

    def emit(event: dict[str, Any]) -> None:
        nonlocal num_steps
        attempt.events.append(event)
        num_steps += event["event"] == "progress" and "block" in event
        if num_steps == stop_at:
            raise Stopped

    def measured() -> list[str]:
        return [each["step"] for each in attempt.events if str(each.get("step")).startswith("plan.")]

    with pytest.raises(Stopped):
        compress(attempt.work, attempt.request, emit)
    blocks = [f"plan.model.layers.{index}" for index in range(4)]
    assert measured() == blocks[:stop_at]
    attempt.events.clear()
    compress(attempt.work, attempt.request, attempt.events.append)
    assert measured() == blocks[stop_at - 1 :] if stop_at <= 4 else not measured()
    for path in undisturbed.artifact.iterdir():
        assert path.read_bytes() == (attempt.artifact / path.name).read_bytes(), path.name
    config = json.loads((attempt.artifact / "config.json").read_text())
    assert (config["intermediate_size"], config["hidden_size"], config["head_dim"]) == (64, 32, 16)


def test_other_stages_come_before_and_after(model: Path, tmp_path: Path) -> None:
    stages: list[dict[str, Any]] = [
        {"technique": "depth_pruning", "method": "list", "blocks": [1]},
        {"technique": "width_pruning", "keep_intermediate": 0.75},
        {"technique": "width_pruning", "intermediate_size": 64, "num_key_value_heads": 1, "hidden_size": 32},
        {"technique": "depth_pruning", "num_blocks": 1},
        {"technique": "gptq", "group_size": 32},
    ]
    attempt = certified(tmp_path / "work", model, {"stages": stages})
    reports = attempt.report["stages"]
    assert [each["metrics"].get("num_blocks") for each in reports] == [3, None, None, 2, None]
    assert [each["metrics"].get("intermediate_size") for each in reports] == [None, 96, 64, None, None]
    assert reports[2]["metrics"]["original_intermediate_size"] == 96
    assert len(reports[4]["layers"]) == 2 * 7
    assert not reports[4]["fallbacks"]
    assert attempt.report["size"]["artifact_parameters"] == reports[3]["metrics"]["num_parameters"]


def test_two_cuts_are_one(model: Path, tmp_path: Path) -> None:
    """The second chooses among what the first has left: with magnitudes of neurons alone, the same ones."""
    stage = {"technique": "width_pruning", "importance": "magnitude"}
    once = compressed(tmp_path / "once", model, {"stages": [{**stage, "intermediate_size": 32}]})
    stages = [{**stage, "intermediate_size": size} for size in (100, 32)]
    twice = compressed(tmp_path / "twice", model, {"stages": stages})
    weights = [load_file(each.artifact / "model.safetensors") for each in (once, twice)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


@pytest.mark.usefixtures("exact_products")
def test_codes_are_read_as_what_they_stand_for(model: Path, tmp_path: Path) -> None:
    spared = {"technique": "round_to_nearest", "group_size": 32, "ignore": ["model.layers.3.*"]}
    source = certified(tmp_path / "coded", model, {"stages": [spared]}).artifact
    after = {"intermediate_size": 48, "num_key_value_heads": 1, "hidden_size": 48}
    attempt = certified(tmp_path / "work", source, {"stages": [{"technique": "width_pruning", **after}]})
    row = ARCHITECTURES["llama", "causal"]
    kept = most_important(source, "causal", row, calibration(attempt, source, "causal"), after)
    expected = logits_of_the_rest(source, "causal", row, kept)
    found, whole = plain_logits(attempt.artifact, "causal"), plain_logits(source, "causal")
    # What codes stand for is stored in bfloat16.
    assert torch.linalg.vector_norm(found - expected) < 0.05 * torch.linalg.vector_norm(whole - expected)


def test_a_gguf_source_is_read_as_any_other(tmp_path: Path) -> None:
    weights = llama_weights()
    (tmp_path / "model").mkdir()
    write_gguf(tmp_path / "model" / "m.gguf", as_gguf(weights))
    stage = {"technique": "width_pruning", "importance": "magnitude", "intermediate_size": 24}
    attempt = compressed(tmp_path / "work", tmp_path / "model", {"stages": [stage]})
    found = load_bf16(attempt.artifact / "model.safetensors")
    for block in range(json.loads((attempt.artifact / "config.json").read_text())["num_hidden_layers"]):
        gate, up, down = (f"model.layers.{block}.mlp.{layer}_proj.weight" for layer in ("gate", "up", "down"))
        norms = np.square(weights[gate]).sum(1) + np.square(weights[up]).sum(1) + np.square(weights[down]).sum(0)
        kept = np.sort(np.argsort(-norms)[:24])
        assert kept.tolist() != list(range(24))
        weights |= {gate: weights[gate][kept], up: weights[up][kept], down: weights[down][:, kept]}
    assert found.keys() == weights.keys()
    assert all(np.array_equal(found[name], weights[name]) for name in weights)


def config_of(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    write_model(folder, name)
    return {**json.loads((folder / "config.json").read_text()), **changes}


@pytest.mark.parametrize(
    ("name", "stage", "option", "told"),
    [
        ("llama", {"intermediate_size": 96}, "intermediate_size", "below 96"),
        ("llama", {"intermediate_size": 97}, "intermediate_size", "below 96"),
        ("llama", {"keep_intermediate": 0.9}, "keep_intermediate", "leaves 96 of the 96"),
        ("llama", {"keep_intermediate": 0.5, "multiple_of": 128}, "keep_intermediate", "leaves 128 of the 96"),
        ("llama", {"num_key_value_heads": 2}, "num_key_value_heads", "below 2"),
        ("llama", {"keep_heads": 0.9}, "keep_heads", "leaves 2 of the 2"),
        ("llama", {"hidden_size": 64}, "hidden_size", "below 64"),
        ("llama", {"hidden_size": 50}, "hidden_size", "multiple of the number of heads"),
        ("gemma3_text", {"hidden_size": 50}, "hidden_size", "multiple of the number of heads"),
        ("llama", {"keep_hidden": 0.9}, "keep_hidden", "leaves 64 of the 64"),
        ("gpt2", {"num_key_value_heads": 2}, "num_key_value_heads", "hidden_size: 32"),
        ("gpt2", {"hidden_size": 48}, "hidden_size", "num_key_value_heads: 2 and hidden_size: 32"),
        ("gpt_neox", {"keep_hidden": 0.5}, "keep_hidden", "num_key_value_heads: 2 and hidden_size: 32"),
        ("opt", {"keep_heads": 0.5}, "keep_heads", "hidden_size: 32"),
        ("bert", {"num_key_value_heads": 2, "hidden_size": 48}, "hidden_size", "32 channels"),
        ("roberta", {"num_key_value_heads": 3, "keep_hidden": 0.5}, "keep_hidden", "48 channels"),
        ("distilbert", {"hidden_size": 32}, "hidden_size", "n_heads"),
        ("opt_like_350m", {"num_key_value_heads": 2, "hidden_size": 32}, "hidden_size", "embedding"),
    ],
)
def test_sizes_that_a_model_cannot_have_are_refused(
    name: str, stage: dict[str, Any], option: str, told: str, tmp_path: Path
) -> None:
    stages = Recipe.model_validate({"stages": [{"technique": "width_pruning", **stage}]}).stages
    with pytest.raises(UserError, match=told) as caught:
        config_after(stages, config_of(tmp_path / "model", name))
    assert (caught.value.code, caught.value.param) == ("invalid_value", f"recipe.stages[0].{option}")


def test_heads_of_phi3_are_bound_where_its_rotary_factors_are(tmp_path: Path) -> None:
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
    config = config_of(tmp_path / "model", "phi3", rope_parameters=factors)
    together = WidthPruning(num_key_value_heads=1, hidden_size=32)
    assert config_after([together], config)["hidden_size"] == 32
    with pytest.raises(UserError, match="hidden_size: 32"):
        config_after([WidthPruning(num_key_value_heads=1)], config)


def test_heads_that_do_not_divide_the_hidden_size_are_refused_by_the_option_that_leaves_them(tmp_path: Path) -> None:
    config = config_of(tmp_path / "model", "llama", num_key_value_heads=4)
    with pytest.raises(UserError, match="multiple of the number of heads") as caught:
        config_after([WidthPruning(num_key_value_heads=3)], config)
    assert caught.value.param == "recipe.stages[0].num_key_value_heads"
    assert config_after([WidthPruning(num_key_value_heads=3, hidden_size=48)], config)["head_dim"] == 16


@pytest.mark.parametrize(("name", "changes"), [("llama", {"num_key_value_heads": 3}), ("gpt2", {"n_head": 5})])
def test_a_config_whose_heads_do_not_divide_is_refused(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        config_after([WidthPruning(intermediate_size=32)], config_of(tmp_path / "model", name, **changes))
    assert (caught.value.code, caught.value.param) == ("invalid_config", "model.id")


def test_the_worker_refuses_the_same(model: Path, tmp_path: Path) -> None:
    attempt = fetched(tmp_path / "work", model, {"stages": [{"technique": "width_pruning", "hidden_size": 50}]})
    with pytest.raises(UserError) as caught:
        compress(attempt.work, attempt.request, attempt.events.append)
    assert (caught.value.code, caught.value.param) == ("invalid_value", "recipe.stages[0].hidden_size")


@pytest.mark.parametrize(
    ("fraction", "multiple_of", "left"),
    [(0.5, 32, 64), (0.5, 1, 64), (0.7, 1, 90), (0.7, 32, 96), (0.01, 32, 32), (0.01, 8, 8), (0.99, 1, 127)],
)
def test_fractions_are_rounded_and_never_to_nothing(fraction: float, multiple_of: int, left: int, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    stage = WidthPruning(keep_intermediate=fraction, multiple_of=multiple_of)
    assert config_after([stage], config)["intermediate_size"] == left


def test_a_fraction_of_channels_is_one_that_heads_divide(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    assert config_after([WidthPruning(keep_hidden=0.6, multiple_of=3)], config)["hidden_size"] == 36
    bound = {**config, "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}
    del bound["num_key_value_heads"], bound["head_dim"]
    after = config_after([WidthPruning(keep_hidden=0.75, keep_heads=0.75, multiple_of=8)], bound)
    assert (after["hidden_size"], after["num_attention_heads"]) == (48, 3)
    assert "head_dim" not in after


def test_nothing_is_written_into_a_config_that_it_does_not_need(tmp_path: Path) -> None:
    config = config_of(tmp_path / "model", "gpt2")
    assert config["n_inner"] is None
    after = config_after([WidthPruning(num_key_value_heads=2, hidden_size=32)], config)
    assert {key: value for key, value in after.items() if config.get(key) != value} == {
        "n_embd": 32,
        "n_head": 2,
        "n_inner": 256,
    }
    config = config_of(tmp_path / "other", "qwen2")
    config.pop("head_dim", None)
    after = config_after([WidthPruning(num_key_value_heads=1, hidden_size=32)], config)
    assert "head_dim" not in after
    assert config_after([WidthPruning(hidden_size=32)], config)["head_dim"] == 16


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "gemma3_text", "llama", "phi3"])
def test_sizes_that_a_config_leaves_out_are_those_of_transformers(model_type: str) -> None:
    for config in ({}, {"num_attention_heads": 64}):
        told: dict[str, Any] = {"hidden_size": 8192, **config}
        opened: Any = transformers.CONFIG_MAPPING[model_type](**told)
        told["num_attention_heads"] = opened.num_attention_heads
        widths = widths_of({"model_type": model_type, "intermediate_size": 1024, **told})
        assert widths.num_key_value_heads == opened.num_key_value_heads
        head_dim = getattr(opened, "head_dim", None) or opened.hidden_size // opened.num_attention_heads
        assert widths.head_dim == head_dim


def test_an_artifact_of_other_sizes_is_no_success(model: Path, tmp_path: Path) -> None:
    stage = {"technique": "width_pruning", "intermediate_size": 64}
    attempt = compressed(tmp_path / "work", model, {"stages": [stage]})
    path = attempt.work / "compressed.json"
    told = json.loads(path.read_text())
    told["matrix_shapes"]["model.layers.2.mlp.down_proj"] = [64, 65]
    path.write_text(json.dumps(told))
    with pytest.raises(CrashError) as caught:
        certify(attempt.work, attempt.request, attempt.events.append)
    assert caught.value.code == "shape_not_reached"


@pytest.mark.parametrize(
    "stage",
    [
        {"intermediate_size": 64},
        {"keep_intermediate": 0.5, "multiple_of": 8, "importance": "magnitude"},
        {"num_key_value_heads": 1, "keep_hidden": 0.5},
    ],
)
def test_a_recipe_is_the_same_after_a_way_through_json(stage: dict[str, Any]) -> None:
    recipe = Recipe.model_validate({"stages": [{"technique": "width_pruning", **stage}]})
    assert Recipe.model_validate(json.loads(recipe.model_dump_json())) == recipe
