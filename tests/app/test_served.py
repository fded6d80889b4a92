"""The API as a process of its own, without a broker: jobs are accepted all the same, and its log names them."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from app.settings import Settings


@dataclass
class Served:
    url: str
    log: Path


@pytest.fixture(scope="module")
def served(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        port = chosen.getsockname()[1]
    log = tmp_path_factory.mktemp("logs") / "api.log"
    environment = {
        **os.environ,
        "ATTAR_DATABASE_URL": settings.required_database_url,
        "ATTAR_REDIS_URL": "redis://127.0.0.1:1/0",
        "ATTAR_HOME": str(settings.home),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "api", "--port", str(port)], env=environment, stderr=output
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(url, process)
        yield Served(url, log)
    finally:
        process.terminate()
        process.wait(timeout=20)


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "the API ended"
        try:
            httpx2.get(f"{url}/healthz").raise_for_status()
        except httpx2.TransportError:
            time.sleep(0.05)
        else:
            return
    pytest.fail("the API did not answer within a minute")


def test_a_job_is_accepted_while_the_broker_is_down(served: Served, auth: dict[str, str], model_id: str) -> None:
    body = {"model": {"id": model_id}, "recipe": "int8"}
    answer = httpx2.post(f"{served.url}/v1/jobs", json=body, headers=auth, timeout=30)
    job_id = answer.json()["id"]
    assert answer.status_code == 202
    assert httpx2.get(f"{served.url}/v1/jobs/{job_id}", headers=auth).json()["status"] == "queued"
    assert httpx2.get(f"{served.url}/readyz", timeout=30).status_code == 503
    log = served.log.read_text()
    assert re.search(
        rf"^time=\S+ level=info role=api logger=app\.jobs\.service job_id={job_id} .*message=queued$", log, re.MULTILINE
    )
    assert re.search(r"level=warning .*cannot reach the broker", log)
