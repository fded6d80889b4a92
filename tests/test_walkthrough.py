"""The tutorial that runs: one real model, from a request body to a verified download that loads without Attar.

Real PostgreSQL, real Redis, the real API, dispatcher and worker as `attar serve` starts them, SmolLM2-135M-Instruct.
Read it downwards; every step is something that a user can do.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import httpx2
import pytest

from app.demo import MODEL_NAME, prepare_model
from app.local import remove_servers
from tests.jobs import wait_until

pytestmark = pytest.mark.service

# Real English that this test knows, so that it can measure for itself what the report says.
TEXTS = [topics[name] for name in ("assert", "del", "pass", "return", "break", "continue", "global", "if", "while")]
NUM_TOKENS, WINDOW = 768, 256


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("walkthrough")
    prepare_model(home / "models")
    yield home
    remove_servers(home)


@pytest.fixture(scope="module")
def service(home: Path) -> Iterator[httpx2.Client]:
    """`attar serve`, and a client with the key that it made."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ATTAR_")}
    with (home / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "serve", "--port", "0"],
            stdout=log,
            stderr=log,
            env={**environment, "ATTAR_HOME": str(home)},
        )
    try:
        wait_until(lambda: process.poll() is not None or b"Attar is ready" in (home / "serve.log").read_bytes(), 60)
        kept = json.loads((home / "credentials.json").read_text())
        headers = {"Authorization": f"Bearer {kept['api_key']}"}
        with httpx2.Client(base_url=kept["url"], headers=headers, trust_env=False) as client:
            yield client
    finally:
        process.terminate()
        assert process.wait(60) == 0


def attar(home: Path, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "app.cli", *arguments],
        env={**os.environ, "ATTAR_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_one_real_job_from_body_to_verified_download(home: Path, service: httpx2.Client, tmp_path: Path) -> None:
    # 1. The body: a model, a recipe, and what the result has to keep to.
    body: dict[str, Any] = {
        "model": {"id": f"file:{MODEL_NAME}"},
        "recipe": {
            "stages": [
                {"technique": "magnitude", "sparsity": 0.1},
                {"technique": "round_to_nearest", "scheme": "W4A16", "group_size": 64},
            ],
            "evaluation": {"dataset": {"texts": TEXTS}, "num_tokens": NUM_TOKENS, "max_seq_length": WINDOW},
            "seed": 7,
        },
        "constraints": {"max_perplexity_ratio": 10.0, "max_size_bytes": 140_000_000},
        "metadata": {"team": "walkthrough"},
    }

    # 2. Submit it. Everything that can be refused is refused here; the answer says where the job is.
    answer = service.post("/v1/jobs", json=body, headers={"Idempotency-Key": "walkthrough"}, timeout=60)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert answer.headers["Location"].endswith(f"/v1/jobs/{job['id']}")
    assert job["recipe"]["output"] == {"format": "compressed-tensors", "packing": "pack-quantized"}, "resolved"

    # 3. A lost answer may be asked for again: the same key and body give the same job.
    again = service.post("/v1/jobs", json=body, headers={"Idempotency-Key": "walkthrough"}, timeout=60)
    assert again.json()["id"] == job["id"]

    # 4. Poll until it has ended. Progress never falls.
    fractions = [0.0]
    while job["status"] not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.2)
        job = service.get(f"/v1/jobs/{job['id']}").json()
        fractions.append(job["progress"]["fraction"])
    assert job["status"] == "succeeded", job["error"]
    assert fractions == sorted(fractions)
    assert len(set(fractions)) > 3
    assert job["attempt"] == 1
    assert len(job["model"]["revision"]) == 40
    assert [stage["status"] for stage in job["stages"]] == ["succeeded", "succeeded"]
    kinds = [event["type"] for event in service.get(f"/v1/jobs/{job['id']}/events").json()["data"]]
    assert kinds[:2] == ["job.queued", "job.running"]
    assert kinds[-1] == "job.succeeded"

    # 5. The report: what it was, what it is, measured on the files of the artifact.
    report = service.get(f"/v1/jobs/{job['id']}/report").json()
    assert report["size"]["artifact_bytes"] < 140_000_000 < report["size"]["original_bytes"]
    assert report["quality"]["original_perplexity"] < report["quality"]["perplexity"] < math.inf
    assert {constraint["name"] for constraint in report["constraints"]} == set(body["constraints"])
    assert job["result"]["perplexity"] == report["quality"]["perplexity"]

    # 6. Download it. Every file is what the manifest says.
    folder = tmp_path / "smaller"
    downloaded = json.loads(attar(home, "download", job["id"], "-o", str(folder), "--json"))
    assert downloaded["verified"]
    manifest = json.loads((folder / "manifest.json").read_text())
    for file in manifest["files"]:
        content = (folder / file["path"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])
    names = {file["path"] for file in manifest["files"]}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "recipe.json", "report.json", "README.md"}
    assert json.loads((folder / "report.json").read_text()) == report

    # 7. Load it with plain transformers, where nothing of Attar can be imported, and measure: the same number.
    evaluated = read_evaluation_tokens(folder)
    measured = perplexity_without_attar(folder, evaluated, tmp_path)
    assert measured == pytest.approx(report["quality"]["perplexity"], rel=1e-3)

    # 8. The result is a model like any other: it can be the source of the next job.
    refused = service.post("/v1/jobs", json={**body, "model": {"id": "job:job_none"}}, timeout=60)
    assert refused.status_code == 422
    assert refused.json()["param"] == "model.id"

    # 9. Nothing of the attempt is left on disk but the artifact in the storage.
    assert not [path for path in (home / "work").rglob("*") if path.is_file()]


def read_evaluation_tokens(folder: Path) -> list[list[int]]:
    """The windows that the recipe's evaluation describes: documents joined by blank lines, cut without overlap."""
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("\n\n".join(TEXTS)).ids[:NUM_TOKENS]
    return [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]


def perplexity_without_attar(folder: Path, windows: list[list[int]], elsewhere: Path) -> Any:
    script = """
import json, sys
sys.modules["app"] = sys.modules["workers"] = None  # as on a machine without Attar
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
losses = []
with torch.inference_mode():
    for window in json.loads(sys.stdin.read()):
        ids = torch.tensor([window])
        log_probabilities = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        losses.append(-log_probabilities.gather(-1, ids[0, 1:, None]).double())
print(torch.cat(losses).mean().exp().item())
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        input=json.dumps(windows),
        cwd=elsewhere,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return float(result.stdout)
