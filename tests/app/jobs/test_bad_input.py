"""What is refused, with which code and which field; nothing of it is queued and nothing is left on disk."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import text
from starlette.testclient import TestClient

from app.database import Database
from app.settings import Settings

GPTQ = {"technique": "gptq", "group_size": 64}
PRUNING = {"technique": "magnitude"}


@pytest.fixture(autouse=True)
def _nothing_happens(settings: Settings, database: Database, model_id: str) -> Iterator[None]:
    def state() -> tuple[Any, ...]:
        with database.transaction() as session:
            counts = [
                session.execute(text(f"SELECT count(*) FROM {table}")).scalar_one()
                for table in ("jobs", "events", "idempotency_keys")
            ]
        with redis.Redis.from_url(settings.required_redis_url) as broker:
            keys = broker.keys()
        files = [path for path in settings.home.rglob("*") if (settings.home / "models") not in path.parents]
        return counts, keys, files

    before = state()
    yield
    assert state() == before


@pytest.fixture
def refused(client: TestClient, auth: dict[str, str], model_id: str) -> Callable[..., dict[str, Any]]:
    """Send a body that is right but for ``changes``; the problem that comes back."""

    def send(status: int, **changes: Any) -> dict[str, Any]:
        body = {"model": {"id": model_id}, "recipe": {"stages": [GPTQ]}, **changes}
        # json.dumps escapes what UTF-8 cannot say.
        headers = {**auth, "Content-Type": "application/json", "Idempotency-Key": "one"}
        answer = client.post("/v1/jobs", content=json.dumps(body), headers=headers)
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        problem = dict(answer.json())
        assert problem["title"]
        assert problem["detail"]
        assert problem["status"] == status
        return problem

    return send


Refused = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("stages", "code", "param"),
    [
        ([{"technique": "gtpq"}], "unknown_technique", "recipe.stages[0].technique"),
        ([PRUNING, {"technique": 1}], "unknown_technique", "recipe.stages[1].technique"),
        ([{"group_size": 64}], "missing_field", "recipe.stages[0].technique"),
        ([{"technique": ["gptq"]}], "unknown_technique", "recipe.stages[0].technique"),
        ([{**GPTQ, "ignore": ["x" * 201]}], "invalid_value", "recipe.stages[0].ignore[0]"),
        (["gptq"], "invalid_type", "recipe.stages[0]"),
        ([], "invalid_value", "recipe.stages"),
        ([PRUNING] * 33, "invalid_value", "recipe.stages"),
        ("gptq", "invalid_type", "recipe.stages"),
        ([{**GPTQ, "groupsize": 64}], "unknown_field", "recipe.stages[0].groupsize"),
        ([{**GPTQ, "gptq": 64}], "unknown_field", "recipe.stages[0].gptq"),
        ([{**GPTQ, "group_size": "64"}], "invalid_type", "recipe.stages[0].group_size"),
        ([{**GPTQ, "group_size": 64.0}], "invalid_type", "recipe.stages[0].group_size"),
        ([{**GPTQ, "group_size": 0}], "invalid_value", "recipe.stages[0].group_size"),
        ([{**GPTQ, "group_size": 10**30}], "invalid_value", "recipe.stages[0].group_size"),
        ([{**GPTQ, "symmetric": 1}], "invalid_type", "recipe.stages[0].symmetric"),
        ([{**GPTQ, "scheme": "W3A16"}], "invalid_value", "recipe.stages[0].scheme"),
        ([{**GPTQ, "damping": 0}], "invalid_value", "recipe.stages[0].damping"),
        ([{**GPTQ, "ignore": ["a", 1]}], "invalid_type", "recipe.stages[0].ignore[1]"),
        ([{**PRUNING, "sparsity": 1.5}], "invalid_value", "recipe.stages[0].sparsity"),
        ([{**PRUNING, "sparsity": -0.1}], "invalid_value", "recipe.stages[0].sparsity"),
        ([{**PRUNING, "mask_structure": "4:2"}], "invalid_value", "recipe.stages[0].mask_structure"),
        ([{**PRUNING, "mask_structure": "2:4", "sparsity": 0.9}], "invalid_value", "recipe.stages[0]"),
        ([GPTQ, PRUNING], "stages_conflict", "recipe.stages[1].technique"),
        ([GPTQ, GPTQ], "stages_conflict", "recipe.stages[1].technique"),
        ([{**GPTQ, "group_size": 100}], "group_size_fits_no_layer", "recipe.stages[0].group_size"),
        ([PRUNING, {**GPTQ, "group_size": 256}], "group_size_fits_no_layer", "recipe.stages[1].group_size"),
        ([{**PRUNING, "mask_structure": "3:7"}], "mask_structure_fits_no_layer", "recipe.stages[0].mask_structure"),
    ],
)
def test_a_wrong_stage_is_named(refused: Refused, stages: Any, code: str, param: str) -> None:
    problem = refused(422, recipe={"stages": stages})
    assert (problem["code"], problem["param"]) == (code, param)


@pytest.mark.parametrize(
    ("part", "value", "code", "param"),
    [
        ("output", {"format": "gguf"}, "invalid_value", "recipe.output.format"),
        ("output", {"format": "safetensors"}, "output_format_impossible", "recipe.output.format"),
        ("output", {"packing": "int-quantized"}, "output_format_impossible", "recipe.output.packing"),
        ("calibration", {"dataset": {"texts": []}}, "invalid_value", "recipe.calibration.dataset.texts"),
        ("calibration", {"dataset": {"texts": [" \n"]}}, "empty_dataset", "recipe.calibration.dataset"),
        ("calibration", {"dataset": {"texts": ["a", 1]}}, "invalid_type", "recipe.calibration.dataset.texts[1]"),
        ("calibration", {"dataset": {"texts": ["a"], "x": 1}}, "unknown_field", "recipe.calibration.dataset.x"),
        ("calibration", {"dataset": "builtin:other"}, "invalid_value", "recipe.calibration.dataset"),
        ("calibration", {"dataset": "http://x"}, "invalid_value", "recipe.calibration.dataset"),
        ("calibration", {"dataset": 1}, "invalid_type", "recipe.calibration.dataset"),
        ("calibration", {"dataset": "file:../x.txt"}, "invalid_dataset", "recipe.calibration.dataset"),
        ("calibration", {"dataset": "file:nothing.txt"}, "dataset_not_found", "recipe.calibration.dataset"),
        ("calibration", {"dataset": "file:empty.txt"}, "empty_dataset", "recipe.calibration.dataset"),
        (
            "calibration",
            {"dataset": "file:table.csv", "text_field": "body"},
            "text_field_missing",
            "recipe.calibration.text_field",
        ),
        ("calibration", {"num_samples": 0}, "invalid_value", "recipe.calibration.num_samples"),
        ("evaluation", {"dataset": "file:empty.txt"}, "empty_dataset", "recipe.evaluation.dataset"),
        ("training", {}, "missing_field", "recipe.training.dataset"),
        ("seed", -1, "invalid_value", "recipe.seed"),
        ("seed", True, "invalid_type", "recipe.seed"),
        ("version", 2, "invalid_value", "recipe.version"),
        ("trust_remote_code", True, "unknown_field", "recipe.trust_remote_code"),
    ],
)
def test_a_wrong_recipe_is_named(
    refused: Refused, settings: Settings, part: str, value: Any, code: str, param: str
) -> None:
    (settings.model_roots[0] / "empty.txt").write_text("\n \n")
    (settings.model_roots[0] / "table.csv").write_text("text\nwords\n")
    problem = refused(422, recipe={"stages": [GPTQ], part: value})
    assert (problem["code"], problem["param"]) == (code, param)


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"recipe": "int3"}, "unknown_preset", "recipe"),
        ({"recipe": None}, "invalid_type", "recipe"),
        ({"recipe": []}, "invalid_type", "recipe"),
        ({"model": "tiny"}, "invalid_type", "model"),
        ({"model": {}}, "missing_field", "model.id"),
        ({"model": {"id": ""}}, "invalid_value", "model.id"),
        ({"model": {"id": "x" * 601}}, "invalid_value", "model.id"),
        ({"model": {"id": "a", "trust_remote_code": True}}, "unknown_field", "model.trust_remote_code"),
        ({"constraints": {"max_size": 1}}, "unknown_field", "constraints.max_size"),
        ({"constraints": {"max_perplexity_ratio": 0}}, "invalid_value", "constraints.max_perplexity_ratio"),
        ({"constraints": {"min_accuracy": 2}}, "invalid_value", "constraints.min_accuracy"),
        ({"constraints": {"max_size_bytes": 2**63}}, "invalid_value", "constraints.max_size_bytes"),
        ({"queue": "../cpu"}, "invalid_value", "queue"),
        ({"priority": 101}, "invalid_value", "priority"),
        ({"timeout_seconds": 0}, "invalid_value", "timeout_seconds"),
        ({"metadata": {"a": 1}}, "invalid_type", "metadata.a"),
        ({"metadata": {"a": "x" * 513}}, "invalid_value", "metadata.a"),
        ({"metadata": {str(number): "" for number in range(33)}}, "invalid_value", "metadata"),
        ({"metadata": {"a": "nul \0"}}, "invalid_text", "metadata.a"),
        ({"metadata": {"nul \0": "a"}}, "invalid_text", "metadata"),
        ({"metadata": {"a": "\ud800"}}, "invalid_text", "metadata.a"),
        ({"extra": 1}, "unknown_field", "extra"),
    ],
)
def test_a_wrong_field_is_named(refused: Refused, changes: dict[str, Any], code: str, param: str) -> None:
    problem = refused(422, **changes)
    assert (problem["code"], problem["param"]) == (code, param)


def test_every_fault_of_a_request_is_told(refused: Refused) -> None:
    problem = refused(422, priority="high", queue=7, recipe={"stages": [{"technique": "gtpq"}]})
    assert {error["param"] for error in problem["errors"]} == {"priority", "queue", "recipe.stages[0].technique"}


def test_an_unknown_technique_comes_with_the_known_ones(refused: Refused) -> None:
    assert "gptq, magnitude, round_to_nearest" in refused(422, recipe={"stages": [{"technique": "gtpq"}]})["hint"]


def test_a_group_size_that_fits_no_layer_comes_with_sizes_that_do(refused: Refused) -> None:
    assert "32, 64, 128" in refused(422, recipe={"stages": [{**GPTQ, "group_size": 100}]})["hint"]


@pytest.mark.parametrize(
    ("body", "content_type", "status", "code"),
    [
        (b"{", "application/json", 400, "invalid_json"),
        (b"\xff\xfe", "application/json", 400, "invalid_json"),
        (b"[" * 100_000, "application/json", 400, "invalid_json"),
        (b'{"priority": ' + b"9" * 5000 + b"}", "application/json", 400, "invalid_json"),
        (b"", "application/json", 422, "missing_field"),
        (b"[]", "application/json", 422, "invalid_type"),
        (b'"text"', "application/json", 422, "invalid_type"),
        (b"model=a", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(
    client: TestClient, auth: dict[str, str], body: bytes, content_type: str, status: int, code: str
) -> None:
    headers = {**auth, "Content-Type": content_type, "Idempotency-Key": "two"}
    answer = client.post("/v1/jobs", content=body, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["sparsity", "max_perplexity_ratio"])
def test_what_is_no_number_is_refused(
    client: TestClient, auth: dict[str, str], model_id: str, field: str, number: str
) -> None:
    stage = '{"technique": "magnitude", "sparsity": 0.5}'
    body = f'{{"model": {{"id": "{model_id}"}}, "recipe": {{"stages": [{stage}]}}, "constraints": {{}}}}'
    value = f'"{field}": {number}'
    body = body.replace('"sparsity": 0.5', value) if field == "sparsity" else body.replace("{}", "{" + value + "}")
    answer = client.post("/v1/jobs", content=body, headers={**auth, "Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_value")
    assert answer.json()["param"].endswith(field)


def without(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def truncated(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(10_000)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def encoder(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    (folder / "config.json").write_text(json.dumps(config))


def unsupported(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


def linked_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to("../elsewhere.safetensors")


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (without("config.json"), "config_missing"),
        (without("model.safetensors"), "weights_missing"),
        (without("tokenizer.json"), "tokenizer_missing"),
        (pickled, "pickle_only_model"),
        (truncated, "invalid_safetensors"),
        (encoder, "not_a_causal_model"),
        (unsupported, "unsupported_architecture"),
        (linked_weights, "symlink_refused"),
    ],
)
def test_a_damaged_model_is_refused_before_it_is_queued(
    refused: Refused, settings: Settings, tiny_llama: Path, damage: Callable[[Path], None], code: str
) -> None:
    folder = settings.model_roots[0] / "damaged"
    shutil.copytree(tiny_llama, folder)
    damage(folder)
    problem = refused(422, model={"id": "file:damaged"})
    shutil.rmtree(folder)
    assert (problem["code"], problem["param"]) == (code, "model.id")


@pytest.mark.parametrize(
    ("model_id", "code"),
    [
        ("file:nothing", "model_not_found"),
        ("file:../models/tiny-llama", "invalid_model_id"),
        ("file:/etc", "invalid_model_id"),
        ("file:tiny-llama\\..", "invalid_model_id"),
        ("file:link", "symlink_refused"),
        ("file:tiny\u202ellama", "invalid_model_id"),
        ("ftp:x", "invalid_model_id"),
        ("a/b/c", "invalid_model_id"),
        ("../../etc/passwd", "invalid_model_id"),
        ("job:job_01AAAAAAAAAAAAAAAAAAAAAAAA", "model_not_found"),
        ("job:x", "invalid_model_id"),
    ],
)
def test_a_model_that_cannot_be_had_is_refused(
    refused: Refused, settings: Settings, tiny_llama: Path, model_id: str, code: str
) -> None:
    link = settings.model_roots[0] / "link"
    if not link.is_symlink():
        link.symlink_to(tiny_llama)
    problem = refused(422, model={"id": model_id})
    assert (problem["code"], problem["param"]) == (code, "model.id")


@pytest.mark.parametrize("revision", ["../main", "a..b", "a b", "/x", "-x", "main\n", "x" * 201])
def test_an_odd_revision_is_refused(refused: Refused, revision: str) -> None:
    problem = refused(422, model={"id": "org/name", "revision": revision})
    assert problem["code"] in {"invalid_revision", "invalid_value"}
    assert problem["param"] == "model.revision"


class _RefusingHub(BaseHTTPRequestHandler):
    """Answers as the hub does for what is not there, and for what is gated."""

    def do_GET(self) -> None:
        code, name = (403, "GatedRepo") if "gated" in self.path else (404, "RepoNotFound")
        self.send_response(code)
        self.send_header("X-Error-Code", name)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _RefusingHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("hub")
def test_an_unknown_model_of_the_hub_is_refused(refused: Refused) -> None:
    problem = refused(422, model={"id": "org/nothing"})
    assert (problem["code"], problem["param"]) == ("model_not_found", "model.id")


@pytest.mark.usefixtures("hub")
def test_a_gated_model_is_refused_with_what_to_do(refused: Refused) -> None:
    problem = refused(403, model={"id": "org/gated"})
    assert (problem["code"], problem["param"]) == ("model_gated", "model.id")
    assert problem["hint"]


def test_a_hub_that_is_down_is_no_fault_of_the_request(
    client: TestClient, auth: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    answer = client.post("/v1/jobs", json={"model": {"id": "org/name"}, "recipe": "int8"}, headers=auth)
    assert (answer.status_code, answer.json()["code"]) == (503, "hub_unreachable")
    assert answer.headers["retry-after"]


def test_a_wrong_key_is_refused_before_the_model_is_looked_at(client: TestClient) -> None:
    answer = client.post(
        "/v1/jobs", json={"model": {"id": "org/name"}, "recipe": "int8"}, headers={"Authorization": "Bearer x"}
    )
    assert (answer.status_code, answer.json()["code"]) == (401, "invalid_api_key")


def test_a_fifo_in_place_of_a_file_does_not_hang_the_service(
    refused: Refused, settings: Settings, tiny_llama: Path
) -> None:
    folder = settings.model_roots[0] / "fifo"
    shutil.copytree(tiny_llama, folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    problem = refused(422, model={"id": "file:fifo"})
    shutil.rmtree(folder)
    assert problem["param"] == "model.id"


def test_many_faults_and_long_keys_are_refused_in_no_time(refused: Refused) -> None:
    begin = time.monotonic()
    refused(422, **{f"field_{number}": 0 for number in range(20_000)})
    refused(422, **{"k" * 100_000: [0] * 100_000})
    assert time.monotonic() - begin < 10
