"""Models that are refused before anything is queued: damaged, unsupported, out of reach, gated, or not there."""

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.settings import Settings
from tests.app.jobs.refusals import Refused
from tests.models import write_tiny_model

pytestmark = pytest.mark.usefixtures("nothing_happens")


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


def called(model_type: str, *architectures: str) -> Callable[[Path], None]:
    def rename(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": model_type, "architectures": list(architectures)}
        (folder / "config.json").write_text(json.dumps(config))

    return rename


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
        (called("bert", "BertModel"), "unsupported_task"),
        (called("bert"), "unsupported_task"),
        (called("roberta", "RobertaForTokenClassification"), "unsupported_task"),
        (called("distilbert", "DistilBertForQuestionAnswering"), "unsupported_task"),
        (called("llama", "LlamaForSequenceClassification"), "unsupported_task"),
        (called("rwkv", "RwkvForCausalLM"), "unsupported_architecture"),
        (called("albert", "AlbertForMaskedLM"), "unsupported_architecture"),
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
    ("model_type", "config"),
    [
        ("mixtral", {"num_local_experts": 4, "intermediate_size": 128, "num_key_value_heads": 2}),
        (
            "qwen3_moe",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_key_value_heads": 2},
        ),
    ],
)
def test_a_mixture_of_experts_is_refused_with_what_is_supported(
    refused: Refused, settings: Settings, model_type: str, config: dict[str, Any]
) -> None:
    folder = settings.model_roots[0] / "experts"
    write_tiny_model(folder, model_type, **config)
    problem = refused(422, model={"id": "file:experts"})
    shutil.rmtree(folder)
    assert (problem["code"], problem["param"]) == ("unsupported_architecture", "model.id")
    assert "llama" in problem["hint"]


@pytest.mark.parametrize(
    "changes",
    [
        {"is_decoder": True},
        {"problem_type": "multi_label_classification"},
        {"problem_type": "regression", "id2label": {"0": "score"}},
        {"id2label": {"0": "score"}},
    ],
)
def test_an_encoder_whose_output_is_no_class_is_refused(
    refused: Refused, settings: Settings, changes: dict[str, Any]
) -> None:
    folder = settings.model_roots[0] / "scores"
    write_tiny_model(folder, "bert", task="classification", intermediate_size=128)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    problem = refused(422, model={"id": "file:scores"})
    shutil.rmtree(folder)
    assert (problem["code"], problem["param"]) == ("unsupported_task", "model.id")
    assert "classifier" in problem["hint"]


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


def test_submissions_that_wait_for_a_hub_hold_up_nobody_else(
    client: TestClient, auth: dict[str, str], refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent, ThreadPoolExecutor(50) as senders:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        body = {"model": {"id": "org/name"}, "recipe": "int8"}
        waiting = [senders.submit(client.post, "/v1/jobs", json=body, headers=auth) for _ in range(50)]
        silent.settimeout(20)
        held = [silent.accept() for _ in range(4)]
        begin = time.monotonic()
        assert client.get("/v1/jobs", headers=auth).status_code == 200
        assert client.get("/healthz").status_code == 200
        assert refused(422, model={"id": "file:nothing"})["code"] == "model_not_found"
        assert time.monotonic() - begin < 5
        for connection, _ in held:
            connection.close()
        silent.close()
        assert {future.result().json()["code"] for future in waiting} == {"hub_unreachable"}


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
