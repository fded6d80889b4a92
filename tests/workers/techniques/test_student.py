"""Students: what the options and the model allow, which shape comes of it, and jobs that make and train them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models import write_tiny_model
from tests.workers.attempts import TEXTS, Attempt, certified, compressed, fetched
from workers.architectures import ARCHITECTURES, architecture_of
from workers.engine import student as making
from workers.engine.checkpoint import Checkpoint
from workers.engine.journal import Journal
from workers.engine.reshaping import reshape
from workers.engine.shaping import Shaping
from workers.engine.skeleton import Skeleton
from workers.errors import UserError
from workers.pipeline import compress
from workers.preparation import Preparation
from workers.recipe import Recipe
from workers.shapes import config_after
from workers.shapes.matrices import num_matrix_weights
from workers.shapes.student import spread_blocks
from workers.techniques import DepthPruning
from workers.techniques.student_options import ModelType
from workers.training.stage import TrainingStage

SHORT = {"num_steps": 4, "batch_size": 4, "max_seq_length": 32, "num_evaluations": 2, "precision": "float32"}
DISTIL = {"technique": "logit_distillation", "learning_rate": 3e-3, **SHORT}
MAMBA = {"model_type": "mamba", "num_layers": 1, "hidden_size": 64}
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 384, "max_position_embeddings": 512,
    "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 384, "n_positions": 512,
}  # fmt: skip
BERT: dict[str, Any] = {
    "model_type": "bert", "architectures": ["BertForSequenceClassification"], "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 384,
}  # fmt: skip


class Stopped(BaseException):
    """The run ends here."""


def recipe_of(student: dict[str, Any], *others: dict[str, Any], **changes: Any) -> dict[str, Any]:
    stages = [{**DISTIL, "student": student, **changes}, *others]
    return {"stages": stages, "training": {"dataset": {"texts": TEXTS[:150]}}}


def stages_of(student: dict[str, Any]) -> Any:
    return Recipe.model_validate(recipe_of(student)).stages


def digests(attempt: Attempt) -> dict[str, str]:
    names = ("model.safetensors", "config.json", "recipe.json", "tokenizer.json")
    return {name: hashlib.sha256((attempt.artifact / name).read_bytes()).hexdigest() for name in names}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roots") / "teacher"
    sizes: dict[str, Any] = {"num_hidden_layers": 3, "num_key_value_heads": 2, "intermediate_size": 128}
    write_tiny_model(folder, "llama", scale=4.0, tie_word_embeddings=True, **sizes)
    return folder


@pytest.fixture(scope="module")
def mamba(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    """A Mamba that a Llama has taught, hidden states too."""
    return certified(tmp_path_factory.mktemp("mamba") / "work", model, recipe_of(MAMBA, hidden_weight=1.0))


@pytest.mark.parametrize(
    ("count", "num_blocks", "kept"),
    [(6, 12, [0, 2, 4, 7, 9, 11]), (1, 12, [0]), (2, 12, [0, 11]), (3, 4, [0, 2, 3]), (5, 5, [0, 1, 2, 3, 4])],
)
def test_blocks_are_evenly_spaced_between_the_first_and_the_last(count: int, num_blocks: int, kept: list[int]) -> None:
    assert spread_blocks(count, num_blocks) == kept


def test_no_block_is_taken_twice() -> None:
    for num_blocks in range(1, 40):
        for count in range(1, num_blocks + 1):
            assert len(set(spread_blocks(count, num_blocks))) == count


@pytest.mark.parametrize(
    ("config", "student", "expected"),
    [
        (LLAMA, {"num_layers": 2, "num_heads": 2}, {"num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}),
        (LLAMA, {"intermediate_size": 48, "num_layers": 3}, {"intermediate_size": 48, "num_hidden_layers": 3}),
        # Where heads are as wide as the hidden size says, one size says the other.
        (GPT2, {"hidden_size": 32}, {"n_embd": 32, "n_head": 2, "n_inner": 256}),
        (BERT, {"num_heads": 3, "num_layers": 1}, {"hidden_size": 48, "num_attention_heads": 3}),
        (LLAMA, {"num_layers": 1, "initialization": "random"}, {"num_hidden_layers": 1}),
        (LLAMA, MAMBA, {"model_type": "mamba", "hidden_size": 64, "eos_token_id": 0, "tie_word_embeddings": True}),
    ],
    ids=["heads", "neurons", "one from the other", "the other from one", "random", "another type"],
)
def test_sizes_become_a_config(config: dict[str, Any], student: dict[str, Any], expected: dict[str, Any]) -> None:
    assert config_after(stages_of(student), config).items() >= expected.items()


@pytest.mark.parametrize(
    ("config", "student", "option"),
    [
        (LLAMA, {"num_layers": 4}, "num_layers"),
        (LLAMA, {"num_layers": 3, "hidden_size": 64}, "num_layers"),
        (LLAMA, {"num_heads": 8}, "num_heads"),
        (LLAMA, {"num_heads": 3}, "num_heads"),
        (LLAMA, {"num_layers": 2, "intermediate_size": 129}, "intermediate_size"),
        (LLAMA, {"hidden_size": 128}, "hidden_size"),
        (LLAMA, {"hidden_size": 30}, "hidden_size"),
        (GPT2, {"hidden_size": 40}, "hidden_size"),
        (GPT2, {"hidden_size": 32, "num_heads": 3}, "hidden_size"),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, {"num_layers": 1}, "num_layers"),
        (LLAMA, {"model_type": "llama", "num_layers": 1, "hidden_size": 32, "num_heads": 2}, "model_type"),
        (LLAMA, {"model_type": "mamba", "num_layers": 50, "hidden_size": 64}, "hidden_size"),
        (BERT, MAMBA, "model_type"),
        ({**LLAMA, "model_type": "mamba"}, {"hidden_size": 32}, "hidden_size"),
    ],
)
def test_what_the_model_cannot_become_is_refused_by_its_field(
    config: dict[str, Any], student: dict[str, Any], option: str
) -> None:
    with pytest.raises(UserError) as caught:
        config_after(stages_of(student), config)
    assert caught.value.param == f"recipe.stages[0].student.{option}"
    assert "num_key_value_heads" not in caught.value.message


@pytest.mark.parametrize(
    "student",
    [
        {},
        {"initialization": "random"},
        {"num_layers": 2, "importance": "magnitude"},
        {"model_type": "mamba", "num_layers": 2},
        {**MAMBA, "num_heads": 2},
        {"model_type": "gpt2", "num_layers": 1, "hidden_size": 32},
        {"model_type": "gpt2", "num_layers": 1, "hidden_size": 32, "num_heads": 3},
        {"model_type": "gemma3_text", "num_layers": 1, "hidden_size": 32, "num_heads": 2},
    ],
)
def test_options_that_describe_no_student_are_refused(student: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        stages_of(student)


@pytest.mark.parametrize(
    "stages",
    [
        [{**DISTIL, "student": MAMBA, "initialization": "random"}],
        [{"technique": "magnitude", "sparsity": 0.5}, {**DISTIL, "student": {"num_layers": 1}}],
        [{"technique": "sliding_window", "window": 64}, {**DISTIL, "student": MAMBA}],
        [{"technique": "iterate", "stages": [{"technique": "magnitude"}, {**DISTIL, "student": {"num_layers": 1}}]}],
    ],
    ids=["two initializations", "after pruned weights", "after a window", "in rounds"],
)
def test_stages_that_do_not_go_together_are_refused(stages: list[dict[str, Any]]) -> None:
    with pytest.raises(ValidationError):
        Recipe.model_validate({"stages": stages, "training": {"dataset": "builtin:python-docs"}})


def test_widths_ask_for_calibration_text_unless_weights_decide() -> None:
    assert Recipe.model_validate(recipe_of({"num_heads": 2})).needs_calibration
    for student in ({"num_heads": 2, "importance": "magnitude"}, {"num_layers": 2}, MAMBA):
        assert not Recipe.model_validate(recipe_of(student)).needs_calibration


def test_a_resolved_recipe_is_read_again() -> None:
    recipe = Recipe.model_validate(recipe_of({"num_layers": 2})).model_dump(mode="json")
    assert Recipe.model_validate(recipe).model_dump(mode="json") == recipe


class _OnlyTokenizer:
    """The texts of a job without any text."""

    def __init__(self, folder: Path) -> None:
        self._opened = AutoTokenizer.from_pretrained(folder)

    def tokenizer(self, _skeleton: Skeleton) -> Any:
        return self._opened

    def evaluation(self) -> list[str]:
        return TEXTS[:2]


def shaping_of(model: Path, work: Path) -> Shaping:
    checkpoint = Checkpoint(model)
    skeleton = Skeleton(checkpoint, architecture_of(checkpoint.config), torch.device("cpu"))
    texts: Any = _OnlyTokenizer(model)
    return Shaping(skeleton, "recipe.stages[0]", texts, Journal(work, {}, {}), 1 << 20, lambda *_: None)


TYPES = [each for each in get_args(ModelType) if each != "llama"]


@pytest.mark.parametrize("model_type", TYPES)
def test_a_student_of_every_type_opens_with_the_tokenizer_and_the_embedding_of_its_teacher(
    model_type: str, model: Path, tmp_path: Path
) -> None:
    shaping = shaping_of(model, tmp_path / "work")
    heads = {} if ARCHITECTURES[model_type, "causal"].is_recurrent else {"num_heads": 4, "intermediate_size": 64}
    [stage] = stages_of({"model_type": model_type, "num_layers": 1, "hidden_size": 64, **heads})
    student, told = making.make_student(shaping, stage, 7)
    folder = student.checkpoint.folder
    assert told["copied"] == ["embedding"]
    assert student.num_parameters == told["num_parameters"] < told["original_num_parameters"]
    own = load_file(folder / "model.safetensors")[f"{student.architecture.embedding}.weight"]
    assert torch.equal(own, load_file(model / "model.safetensors")["model.embed_tokens.weight"])
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    opened, found = loaded
    assert not any(found.values())
    assert opened.dtype == torch.bfloat16
    assert opened.config.eos_token_id == 0
    assert AutoTokenizer.from_pretrained(folder)(TEXTS[0]) == AutoTokenizer.from_pretrained(model)(TEXTS[0])
    config = config_after([stage], shaping.skeleton.checkpoint.config)
    assert num_matrix_weights(config) == sum(rows * columns for rows, columns in student.matrix_shapes.values())


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("bert", {"task": "classification", "intermediate_size": 128}),
        ("gpt2", {}),
        ("llama", {"num_key_value_heads": 2, "intermediate_size": 128}),
    ],
)
def test_fewer_layers_begin_as_depth_pruning_leaves_them(
    model_type: str, config: dict[str, Any], tmp_path: Path
) -> None:
    write_tiny_model(tmp_path / "model", model_type, num_hidden_layers=4, **config)
    [stage] = stages_of({"num_layers": 2})
    student, told = making.make_student(shaping_of(tmp_path / "model", tmp_path / "work"), stage, 0)
    cut = DepthPruning(method="list", blocks=told["removed_blocks"])
    pruned, _ = reshape(shaping_of(tmp_path / "model", tmp_path / "other"), cut)
    assert told["removed_blocks"] == [1, 2]
    assert student.checkpoint.config == pruned.checkpoint.config
    names = student.checkpoint.parameters()
    assert names == pruned.checkpoint.parameters()
    assert all(torch.equal(student.checkpoint.parameter(name), pruned.checkpoint.parameter(name)) for name in names)


def test_a_student_that_starts_from_chance_shares_no_weight(model: Path, tmp_path: Path) -> None:
    [stage] = stages_of({"num_layers": 2, "initialization": "random"})
    drawn = []
    for number, seed in enumerate((1, 1, 2)):
        student, told = making.make_student(shaping_of(model, tmp_path / str(number)), stage, seed)
        assert told["copied"] == []
        drawn.append(load_file(student.checkpoint.folder / "model.safetensors"))
    name = "model.embed_tokens.weight"
    assert torch.equal(drawn[0][name], drawn[1][name])
    assert not torch.equal(drawn[0][name], drawn[2][name])
    assert not torch.equal(drawn[0][name], load_file(model / "model.safetensors")[name])


def test_a_tokenizer_that_opens_as_another_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shaping = shaping_of(model, tmp_path / "work")
    others = json.loads((model / "tokenizer.json").read_text())
    others["model"]["merges"] = others["model"]["merges"][:1]
    own = shaping.texts.tokenizer(shaping.skeleton)
    own_save = own.save_pretrained

    def damaged(folder: Path) -> None:
        own_save(folder)
        (folder / "tokenizer.json").write_text(json.dumps(others))

    monkeypatch.setattr(own, "save_pretrained", damaged)
    with pytest.raises(UserError) as caught:
        making.make_student(shaping, stages_of(MAMBA)[0], 0)
    assert (caught.value.code, caught.value.param) == (
        "tokenizer_not_reproduced", "recipe.stages[0].student.model_type",
    )  # fmt: skip


def test_a_mamba_learns_from_a_llama(mamba: Attempt, model: Path) -> None:
    report = mamba.report
    [stage] = report["stages"]
    told, curve = stage["metrics"]["student"], stage["metrics"]["curve"]
    assert curve[-1]["held_out_loss"] < curve[0]["held_out_loss"]
    assert (told["model_type"], told["copied"]) == ("mamba", ["embedding"])
    assert told["num_parameters"] == report["size"]["artifact_parameters"] < told["teacher_num_parameters"]
    assert told["teacher_num_parameters"] == report["size"]["original_parameters"]
    assert report["speed"]["artifact"]["tokens_per_second"] > 0
    assert set(report["generation"]) == {"prompt", "original", "artifact"}
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (mamba.artifact, model)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    opened: Any = AutoModelForCausalLM.from_pretrained(mamba.artifact)
    assert opened.generate(tokenizers[0](TEXTS[0], return_tensors="pt").input_ids, max_new_tokens=2).shape[0] == 1


def test_a_mamba_is_compressed_again_as_a_source(mamba: Attempt, tmp_path: Path) -> None:
    stages = [{"technique": "wanda", "sparsity": 0.3}, {"technique": "round_to_nearest", "scheme": "FP8"}]
    attempt = certified(tmp_path / "work", mamba.artifact, {"stages": stages})
    layers = attempt.report["stages"][1]["layers"]
    assert sorted(layers) == [f"backbone.layers.0.mixer.{name}_proj" for name in ("in", "out", "x")]
    assert attempt.report["size"]["compression_ratio"] > 1.1


def test_killed_while_it_makes_and_trains_a_student_it_ends_with_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = {"num_layers": 2, "num_heads": 2, "intermediate_size": 64}
    recipe = recipe_of(student, {**DISTIL, "student": {**MAMBA, "hidden_size": 32}})
    expected = digests(compressed(tmp_path / "undisturbed", model, recipe))
    attempt = fetched(tmp_path / "work", model, recipe)
    own_write, own_train, own_run = making._write_tokenizer, Preparation._train, TrainingStage.run

    def stopped(*_arguments: Any, **_named: Any) -> Any:
        raise Stopped

    def stopped_after(param: str, self: TrainingStage) -> Any:
        metrics = own_run(self)
        if self.param == param:
            raise Stopped
        return metrics

    for owner, name, stop, own in (
        (Preparation, "_train", stopped, own_train),
        (TrainingStage, "run", lambda self: stopped_after("recipe.stages[0]", self), own_run),
        (making, "_write_tokenizer", stopped, own_write),
        (TrainingStage, "run", lambda self: stopped_after("recipe.stages[1]", self), own_run),
    ):
        monkeypatch.setattr(owner, name, stop)
        with pytest.raises(Stopped):
            compress(attempt.work, attempt.request, attempt.events.append)
        monkeypatch.setattr(owner, name, own)
    compress(attempt.work, attempt.request, attempt.events.append)
    assert digests(attempt) == expected
    metrics = [
        stage["metrics"]["student"] for stage in json.loads((attempt.work / "compressed.json").read_text())["stages"]
    ]
    # The second is made of the first, and both learn from the original.
    assert metrics[1]["original_num_parameters"] == metrics[0]["num_parameters"]
    assert metrics[0]["teacher_num_parameters"] == metrics[1]["teacher_num_parameters"]
