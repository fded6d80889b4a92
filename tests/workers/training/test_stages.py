"""Stages that train, in jobs: what they change and leave alone, and that a killed one ends with the same bytes."""

from __future__ import annotations

import gc
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.models import write_tiny_model
from tests.workers.attempts import TEXTS, Attempt, certified, compressed, fetched
from workers.errors import UserError
from workers.pipeline import compress
from workers.training import loop
from workers.training.step_journal import StepJournal

TRAINING = {"dataset": {"texts": TEXTS[:150]}}
SHORT = {"num_steps": 6, "batch_size": 4, "max_seq_length": 32, "num_evaluations": 3, "precision": "float32"}
TUNE = {"technique": "fine_tuning", **SHORT}
DISTIL = {"technique": "logit_distillation", **SHORT}
CUT = {"technique": "depth_pruning", "method": "list", "blocks": [1]}


class Stopped(BaseException):
    """The run ends here."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roots") / "deep"
    write_tiny_model(
        folder, "llama", num_hidden_layers=3, num_key_value_heads=2, intermediate_size=128, scale=4.0,
        tie_word_embeddings=True,
    )  # fmt: skip
    return folder


def digests(attempt: Attempt) -> dict[str, str]:
    names = ("model.safetensors", "config.json", "recipe.json", "tokenizer.json")
    return {name: hashlib.sha256((attempt.artifact / name).read_bytes()).hexdigest() for name in names}


def curve_of(attempt: Attempt, index: int) -> list[float]:
    """The held-out losses of a stage."""
    compressed_json = json.loads((attempt.work / "compressed.json").read_text())
    return [point["held_out_loss"] for point in compressed_json["stages"][index]["metrics"]["curve"]]


def recipe_of(*stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"stages": list(stages), "training": TRAINING, **changes}


def test_fine_tuning_changes_every_weight_and_keeps_shape_and_type(model: Path, tmp_path: Path) -> None:
    attempt = certified(tmp_path / "work", model, recipe_of({**TUNE, "learning_rate": 3e-3, "num_steps": 30}))
    before, after = load_file(model / "model.safetensors"), load_file(attempt.artifact / "model.safetensors")
    assert before.keys() == after.keys()
    assert {name: (each.dtype, each.shape) for name, each in after.items()} == {
        name: (each.dtype, each.shape) for name, each in before.items()
    }
    assert all(not torch.equal(before[name], after[name]) for name in before)
    quality, [stage] = attempt.report["quality"], attempt.report["stages"]
    assert quality["perplexity"] < 0.9 * quality["original_perplexity"]
    assert stage["metrics"]["held_out_loss"] < stage["metrics"]["original_held_out_loss"]
    told = [event["metrics"] for event in attempt.events if event["event"] == "stage" and "step" in event["metrics"]]
    assert [point["step"] for point in told] == [0, 10, 20, 30]
    assert told[-1]["tokens_per_second"] > 0


def test_a_student_shares_nothing_with_its_teacher(model: Path, tmp_path: Path) -> None:
    before = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    attempt = certified(tmp_path / "work", model, recipe_of(CUT, {**DISTIL, "learning_rate": 3e-3}))
    assert hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest() == before
    losses = curve_of(attempt, 1)
    assert losses[-1] < losses[0]
    # What the teacher gives did not move with the student: it is the original as it was.
    assert attempt.report["quality"]["original_perplexity"] == pytest.approx(
        certified(tmp_path / "other", model, recipe_of(CUT)).report["quality"]["original_perplexity"]
    )


@pytest.mark.parametrize(
    "stage",
    [
        TUNE,
        DISTIL,
        {**DISTIL, "hidden_weight": 1.0},
        {**DISTIL, "teacher_top_k": 8},
        {**DISTIL, "synthetic": {"num_samples": 40, "top_k": 20}, "alpha": 0.0},
        {**TUNE, "augmentation": {"mask_probability": 0.0, "delete_probability": 0.1}},
        {**TUNE, "curriculum": "easiest_first", "patience": 5},
        {**TUNE, "micro_batch_size": 2, "schedule": "linear"},
    ],
    ids=["hard", "soft", "states", "cached", "synthetic", "augmented", "curriculum", "accumulated"],
)
def test_killed_after_any_step_it_ends_with_the_same_bytes(
    stage: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(CUT, stage, {"technique": "round_to_nearest", "group_size": 32})
    expected = digests(compressed(tmp_path / "undisturbed", model, recipe))
    monkeypatch.setattr(loop, "SECONDS_A_STATE", 0.0)
    attempt = fetched(tmp_path / "work", model, recipe)
    steps: list[int] = []
    own_step, own_write = loop.Loop._step, StepJournal.write

    def counted(self: Any, curve: Any) -> float:
        steps.append(curve.step)
        return own_step(self, curve)

    monkeypatch.setattr(loop.Loop, "_step", counted)
    for last in (1, 4):

        def stopped(self: Any, curve: Any, tensors: Any, last: int = last) -> None:
            own_write(self, curve, tensors)
            if curve.step == last:
                raise Stopped

        monkeypatch.setattr(StepJournal, "write", stopped)
        with pytest.raises(Stopped):
            compress(attempt.work, attempt.request, attempt.events.append)
    monkeypatch.setattr(StepJournal, "write", own_write)
    compress(attempt.work, attempt.request, attempt.events.append)
    assert digests(attempt) == expected
    assert steps == list(range(6))  # none twice


def test_a_state_that_was_not_wholly_written_is_left_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(TUNE)
    expected = digests(compressed(tmp_path / "undisturbed", model, recipe))
    monkeypatch.setattr(loop, "SECONDS_A_STATE", 0.0)
    attempt = fetched(tmp_path / "work", model, recipe)
    own_write = StepJournal.write

    def damaged(self: StepJournal, curve: Any, tensors: Any) -> None:
        own_write(self, curve, tensors)
        if curve.step == 3:
            [path] = self.folder.glob("*.safetensors")
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
            raise Stopped

    monkeypatch.setattr(StepJournal, "write", damaged)
    with pytest.raises(Stopped):
        compress(attempt.work, attempt.request, attempt.events.append)
    monkeypatch.setattr(StepJournal, "write", own_write)
    compress(attempt.work, attempt.request, attempt.events.append)
    assert digests(attempt) == expected


def test_accumulated_gradients_are_those_of_the_whole_batch(model: Path, tmp_path: Path) -> None:
    curves = [
        curve_of(compressed(tmp_path / str(size), model, recipe_of({**DISTIL, "micro_batch_size": size})), 0)
        for size in (1, 4)
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_all_logits_from_disk_teach_what_the_running_teacher_does(model: Path, tmp_path: Path) -> None:
    curves = [
        curve_of(compressed(tmp_path / str(top_k), model, recipe_of(CUT, {**DISTIL, "teacher_top_k": top_k})), 1)
        for top_k in (None, 384)
    ]
    assert curves[0] == pytest.approx(curves[1], rel=2e-2)
    assert curves[0][0] > curves[0][-1]


def test_it_stops_early_with_the_weights_of_the_lowest_loss(model: Path, tmp_path: Path) -> None:
    # A rate at which the model soon forgets again what it learns.
    forgetting = {"learning_rate": 0.1, "schedule": "constant", "patience": 3}
    stage = {**TUNE, "num_steps": 80, "num_evaluations": 40, **forgetting}
    attempt = compressed(tmp_path / "work", model, recipe_of(stage))
    [told] = json.loads((attempt.work / "compressed.json").read_text())["stages"]
    metrics = told["metrics"]
    assert metrics["num_steps"] == metrics["lowest_step"] + 3 * 2 < metrics["planned_num_steps"]
    assert metrics["lowest_held_out_loss"] == metrics["held_out_loss"] < metrics["curve"][-1]["held_out_loss"]


@pytest.mark.parametrize("made", [False, True], ids=["a model that was there", "a head that was drawn by chance"])
def test_what_learned_nothing_is_no_result(made: bool, model: Path, tmp_path: Path) -> None:
    hopeless = {"learning_rate": 1.0, "schedule": "constant", "patience": 1}
    recipe = recipe_of({**TUNE, **hopeless})
    if made:
        write_body(tmp_path / "body", "bert")
        recipe = {"stages": [{**MAKE, **hopeless}], **CLASSIFYING}
    with pytest.raises(UserError) as raised:
        compressed(tmp_path / "work", tmp_path / "body" if made else model, recipe)
    assert (raised.value.code, raised.value.param) == ("nothing_learned", "recipe.stages[0].learning_rate")


def test_a_loss_that_is_no_number_stops_by_name_and_keeps_the_last_good_state(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SECONDS_A_STATE", 0.0)
    attempt = fetched(tmp_path / "work", model, recipe_of(CUT, TUNE))
    own_step = loop.Loop._step

    def broken(self: Any, curve: Any) -> float:
        if curve.step == 3:
            next(iter(self._parameters.values())).data.fill_(float("nan"))
        return own_step(self, curve)

    monkeypatch.setattr(loop.Loop, "_step", broken)
    with pytest.raises(UserError) as raised:
        compress(attempt.work, attempt.request, attempt.events.append)
    assert (raised.value.code, raised.value.param) == ("non_finite_loss", "recipe.stages[1].learning_rate")
    [state] = (attempt.work / "journal").rglob("step-*.safetensors")
    assert state.stem == "step-000000003"
    assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(state).values())


URLS = [
    (f"http://{word}{number}.example/{kind}/page-{number * 7}", label)
    for number in range(60)
    for word, kind, label in (("bank-login", "verify", "phishing"), ("library", "books", "legitimate"))
]
LABELLED = {"texts": [text for text, _ in URLS[:80]], "labels": [label for _, label in URLS[:80]]}
HELD_OUT = {"texts": [text for text, _ in URLS[80:]], "labels": [label for _, label in URLS[80:]]}
MAKE = {
    "technique": "fine_tuning", "task": "classification", "num_steps": 40, "batch_size": 16, "max_seq_length": 64,
    "learning_rate": 2e-3, "precision": "float32", "num_evaluations": 2,
}  # fmt: skip
CLASSIFYING: dict[str, Any] = {
    "training": {"dataset": LABELLED},
    "evaluation": {"dataset": HELD_OUT, "num_tokens": 4096, "max_seq_length": 128, "allow_overlap": True},
}


def write_body(folder: Path, model_type: str) -> None:
    """Write an encoder without any head, as sentence encoders are published."""
    sizes = {"distilbert": {"dim": 64, "hidden_dim": 128, "n_heads": 4, "n_layers": 2}}
    write_tiny_model(folder, model_type, task="classification", **sizes.get(model_type, {"intermediate_size": 128}))
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    model.base_model.save_pretrained(folder)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta"])
def test_an_encoder_without_a_head_becomes_a_classifier(model_type: str, tmp_path: Path) -> None:
    write_body(tmp_path / "body", model_type)
    attempt = certified(tmp_path / "work", tmp_path / "body", {"stages": [MAKE], **CLASSIFYING})
    quality = attempt.report["quality"]
    assert quality["accuracy"] > 0.9 > quality["original_accuracy"]
    config = json.loads((attempt.artifact / "config.json").read_text())
    assert config["id2label"] == {"0": "legitimate", "1": "phishing"}
    opened: Any = AutoModelForSequenceClassification.from_pretrained(attempt.artifact)
    tokenizer = AutoTokenizer.from_pretrained(attempt.artifact)
    with torch.no_grad():
        logits = opened(**tokenizer(URLS[80][0], return_tensors="pt")).logits
    assert opened.config.id2label[int(logits.argmax())] == URLS[80][1]


def test_teacher_student_and_codes_in_one_job(tmp_path: Path) -> None:
    write_body(tmp_path / "body", "bert")
    stages = [
        MAKE,
        {"technique": "depth_pruning", "num_blocks": 1, "keep_last": 0},
        {**{key: value for key, value in MAKE.items() if key != "task"}, "technique": "logit_distillation"},
        {"technique": "round_to_nearest", "group_size": 32, "embeddings": True},
    ]
    attempt = certified(tmp_path / "work", tmp_path / "body", {"stages": stages, **CLASSIFYING})
    report = attempt.report
    assert report["quality"]["accuracy"] > 0.9
    assert [stage["technique"] for stage in report["stages"]] == [stage["technique"] for stage in stages]
    # The student's loss is that of what the first stage made, and not of the body with a head drawn by chance.
    losses = report["stages"][2]["metrics"]
    assert losses["curve"][-1]["held_out_accuracy"] > 0.9


def test_a_classifier_may_learn_from_text_without_labels(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", "bert", task="classification", intermediate_size=128, scale=8.0)
    recipe = {
        **CLASSIFYING,
        "stages": [{"technique": "depth_pruning", "num_blocks": 1, "keep_last": 0}, {**DISTIL, "alpha": 0.0}],
        "training": {"dataset": {"texts": LABELLED["texts"]}},
        "evaluation": {"dataset": {"texts": HELD_OUT["texts"]}, "num_tokens": 1024, "max_seq_length": 128},
    }
    attempt = compressed(tmp_path / "work", tmp_path / "model", recipe)
    losses = curve_of(attempt, 1)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("training", "evaluation", "code", "param"),
    [
        ({"texts": LABELLED["texts"]}, HELD_OUT, "label_field_missing", "recipe.training.label_field"),
        (
            {"texts": LABELLED["texts"], "labels": ["spam"] * 80},
            HELD_OUT,
            "one_class",
            "recipe.training.dataset",
        ),
        (
            LABELLED,
            {**HELD_OUT, "labels": ["spam"] * 40},
            "unknown_label",
            "recipe.evaluation.dataset.labels",
        ),
        (
            {"texts": LABELLED["texts"], "labels": [f"class-{number}" for number in range(80)]},
            {**HELD_OUT, "labels": ["class-1"] * 40},
            None,
            None,
        ),
    ],
    ids=["no labels", "one class", "a label that training does not have", "as many classes as texts"],
)
def test_labels_that_teach_nothing_are_refused(
    training: dict[str, Any], evaluation: dict[str, Any], code: str | None, param: str | None, tmp_path: Path
) -> None:
    write_body(tmp_path / "body", "bert")
    recipe = {
        "stages": [MAKE],
        "training": {"dataset": training},
        "evaluation": {**CLASSIFYING["evaluation"], "dataset": evaluation},
    }
    if code is None:
        fetched(tmp_path / "work", tmp_path / "body", recipe)
        return
    with pytest.raises(UserError) as raised:
        fetched(tmp_path / "work", tmp_path / "body", recipe)
    assert (raised.value.code, raised.value.param) == (code, param)
    assert raised.value.hint


def test_text_that_is_evaluated_is_not_trained_on(model: Path, tmp_path: Path) -> None:
    texts = {"texts": TEXTS}
    attempt = fetched(
        tmp_path / "work",
        model,
        recipe_of(TUNE, training={"dataset": texts}, evaluation={"dataset": texts, "num_tokens": 4096}),
    )
    seen, held_out = (
        {json.loads(line)["text"] for line in (attempt.work / "source" / f"{name}.jsonl").read_text().splitlines()}
        for name in ("training", "evaluation")
    )
    assert seen
    assert held_out
    assert not seen & held_out
    other = fetched(
        tmp_path / "other",
        model,
        recipe_of(TUNE, training={"dataset": {"texts": TEXTS[:60]}}, evaluation={"dataset": texts, "num_tokens": 4096}),
    )
    left = (other.work / "source" / "evaluation.jsonl").read_text()
    assert not any(text in left for text in TEXTS[:60])


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gemma3_text", "phi3", "gpt_neox"])
def test_the_artifact_has_the_weights_that_were_in_memory(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compared with those in memory by plain transformers: a name or a tie that goes astray on the way is seen.
    sizes: dict[str, dict[str, Any]] = {
        "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
        "gpt2": {},
        "gemma3_text": {"num_key_value_heads": 2, "intermediate_size": 128, "head_dim": 16},
    }
    write_tiny_model(tmp_path / "model", model_type, scale=4.0, **sizes.get(model_type, {"intermediate_size": 128}))
    given: dict[str, torch.Tensor] = {}
    own_run, ids = loop.Loop.run, torch.arange(3, 300).view(3, 99)

    def run(self: Any) -> Any:
        found = own_run(self)
        self._student.model.eval()
        with torch.no_grad():
            given["logits"] = self._student.model(input_ids=ids).logits
        return found

    monkeypatch.setattr(loop.Loop, "run", run)
    attempt = compressed(tmp_path / "work", tmp_path / "model", recipe_of({**DISTIL, "learning_rate": 3e-3}))
    opened: Any = AutoModelForCausalLM.from_pretrained(attempt.artifact, dtype=torch.float32)
    opened.eval()
    before: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    before.eval()
    with torch.no_grad():
        error, moved = ((each(input_ids=ids).logits - given["logits"]).norm() for each in (opened, before))
    # Weights are stored in bfloat16: what that rounds is far from what training has moved.
    assert float(error) < 0.2 * float(moved)


def test_no_model_outlives_its_training(model: Path, tmp_path: Path) -> None:
    known = {id(each) for each in gc.get_objects() if isinstance(each, torch.nn.Parameter)}
    stages = ({**DISTIL, "hidden_weight": 1.0}, {"technique": "gptq", "group_size": 32})
    attempt = fetched(tmp_path / "work", model, recipe_of(*stages))
    held: list[tuple[int, ...]] = []

    def heard(event: dict[str, Any]) -> None:
        if event["event"] == "progress" and str(event["step"]).startswith("model.layers.1"):
            every = [each for each in gc.get_objects() if isinstance(each, torch.nn.Parameter)]
            held.extend(tuple(each.shape) for each in every if id(each) not in known and not each.is_meta)

    gc.disable()  # which would come by chance, or too late
    try:
        compress(attempt.work, attempt.request, heard)
    finally:
        gc.enable()
    assert held  # of the block that is compressed
    assert (384, 64) not in held  # the embedding, of a student, a teacher or what they were made from


def test_codes_that_become_values_are_no_result_unless_something_quantizes_them_again(
    model: Path, tmp_path: Path
) -> None:
    rounding = {"technique": "round_to_nearest", "group_size": 32}
    codes = compressed(tmp_path / "codes", model, {"stages": [rounding]}).artifact
    with pytest.raises(UserError) as raised:
        certified(tmp_path / "values", codes, recipe_of(TUNE))
    assert (raised.value.code, raised.value.param) == ("not_smaller", "recipe.stages")
    with pytest.raises(UserError) as raised:
        certified(tmp_path / "again", codes, recipe_of(TUNE, rounding))
    assert raised.value.code == "not_smaller"  # as many bytes as before
    certified(tmp_path / "fewer", codes, recipe_of(CUT, TUNE, rounding))


def test_a_student_of_fewer_tokens_learns_from_the_teacher_without_the_others(tmp_path: Path) -> None:
    write_body(tmp_path / "body", "bert")
    stages = [
        MAKE,
        {"technique": "depth_pruning", "num_blocks": 1, "keep_last": 0},
        {"technique": "vocabulary_pruning"},
        {**{key: value for key, value in MAKE.items() if key != "task"}, "technique": "logit_distillation"},
    ]
    attempt = certified(tmp_path / "work", tmp_path / "body", {"stages": stages, **CLASSIFYING})
    _, _, tokens, training = attempt.report["stages"]
    assert tokens["metrics"]["vocab_size"] < tokens["metrics"]["original_vocab_size"]
    assert training["metrics"]["curve"][-1]["held_out_accuracy"] > 0.9
    assert attempt.report["quality"]["accuracy"] > 0.9


def test_a_language_model_of_fewer_tokens_is_distilled(model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(CUT, {"technique": "vocabulary_pruning"}, {**DISTIL, "learning_rate": 3e-3, "num_steps": 12})
    losses = curve_of(certified(tmp_path / "work", model, recipe), 2)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("damaged", "how"),
    [
        ("checkpoint/model.safetensors", "changed"),
        ("checkpoint/config.json", "gone"),
        ("samples/tokens.bin", "changed"),
        ("samples/index.npz", "cut"),
        ("teacher/values.bin", "changed"),
        ("teacher/values.bin", "gone"),
        ("teacher/filled.json", "cut"),
    ],
)
def test_damaged_work_is_done_again(
    damaged: str, how: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is finished is read when the stage after it is under way, what is under way when its own stage is.
    first, second = {**DISTIL, "teacher_top_k": 8}, {**TUNE, "max_seq_length": 24}
    recipe = recipe_of(CUT, first, second)
    expected = digests(compressed(tmp_path / "undisturbed", model, recipe))
    attempt = fetched(tmp_path / "work", model, recipe)
    own_step, index = loop.Loop._step, 2 if damaged.startswith("checkpoint") else 1

    def stopped(self: Any, curve: Any) -> float:
        if self._lesson.param == f"recipe.stages[{index}]" and curve.step == 3:
            raise Stopped
        return own_step(self, curve)

    monkeypatch.setattr(loop.Loop, "_step", stopped)
    with pytest.raises(Stopped):
        compress(attempt.work, attempt.request, attempt.events.append)
    monkeypatch.setattr(loop.Loop, "_step", own_step)
    path = attempt.work / "journal" / "stage-01" / damaged
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if how == "cut" else content[:-2] + bytes([content[-2] ^ 1, 0]))
    compress(attempt.work, attempt.request, attempt.events.append)
    assert digests(attempt) == expected


@pytest.mark.parametrize("seed", [42, 20_000, 2**31 - 1])
def test_any_seed_will_do(seed: int, model: Path, tmp_path: Path) -> None:
    augmented = {**TUNE, "augmentation": {"mask_probability": 0.0, "delete_probability": 0.1}, "num_steps": 2}
    written = {**DISTIL, "synthetic": {"num_samples": 16}, "alpha": 0.0, "num_steps": 2}
    attempt = compressed(tmp_path / "work", model, recipe_of(augmented, written, seed=seed))
    assert [len(curve_of(attempt, index)) for index in (0, 1)] == [3, 3]  # before, and after each of two steps


def test_labels_may_be_any_numbers_and_one_file_has_one_field_of_them(tmp_path: Path) -> None:
    write_body(tmp_path / "body", "bert")
    rows = [{"text": text, "stars": 1 + 4 * (label == "phishing"), "other": "a"} for text, label in URLS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {"dataset": "file:rows.jsonl", "text_field": "text"}
    recipe: dict[str, Any] = {
        "stages": [MAKE],
        "training": {**named, "label_field": "stars"},
        "evaluation": {**named, "label_field": "stars", "num_tokens": 4096, "max_seq_length": 128},
    }
    attempt = certified(tmp_path / "work", tmp_path / "body", recipe)
    assert json.loads((attempt.artifact / "config.json").read_text())["id2label"] == {"0": "1", "1": "5"}
    assert attempt.report["quality"]["accuracy"] > 0.9
    without = {key: value for key, value in recipe["evaluation"].items() if key != "label_field"}
    attempt = fetched(tmp_path / "without", tmp_path / "body", {**recipe, "evaluation": without})
    lines = [json.loads(line) for line in (attempt.work / "source" / "training.jsonl").read_text().splitlines()]
    assert {line["label"] for line in lines} == {0, 1}
    with pytest.raises(UserError) as raised:
        fetched(
            tmp_path / "other",
            tmp_path / "body",
            {**recipe, "evaluation": {**recipe["evaluation"], "label_field": "other"}},
        )
    assert (raised.value.code, raised.value.param) == ("label_fields_differ", "recipe.evaluation.label_field")


def test_an_opt_that_leaves_out_blocks_by_chance_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SECONDS_A_STATE", 0.0)
    write_tiny_model(tmp_path / "model", "opt", ffn_dim=128, word_embed_proj_dim=64, layerdrop=0.9)
    attempt = compressed(tmp_path / "work", tmp_path / "model", recipe_of({**DISTIL, "hidden_weight": 1.0}))
    before, after = (load_file(each / "model.safetensors") for each in (tmp_path / "model", attempt.artifact))
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("fc1.weight"))
