"""How long a user waits: from POST to the first progress of compression, and for an answer while a job computes.

    .venv/bin/python -m bench.service [--jobs 5] [--polls 300]

Starts `attar serve` on a free port with a home of its own, and leaves nothing running.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2

from bench.materials import FOLDER, ROOT, smollm2

GPTQ = {
    "stages": [{"technique": "gptq", "scheme": "W4A16", "group_size": 64}],
    "calibration": {"num_samples": 64, "max_seq_length": 512},
}
QUICK = {
    "stages": [{"technique": "round_to_nearest", "scheme": "W4A16", "group_size": 64}],
    "evaluation": {"num_tokens": 256, "max_seq_length": 128},
}


def main() -> None:
    """Serve, submit, poll, print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--jobs", type=int, default=5)
    arguments.add_argument("--polls", type=int, default=300)
    options = arguments.parse_args()
    home = FOLDER / "service"
    shutil.rmtree(home, ignore_errors=True)
    (home / "models").mkdir(parents=True)
    model = smollm2()
    shutil.copytree(model, home / "models" / model.name, copy_function=os.link)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "ATTAR_HOME": str(home)}
    with (home / "serve.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "serve", "--port", str(port)],
            cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        with _client(home, port) as client:
            waits = [_first_progress(client, f"file:{model.name}") for _ in range(options.jobs)]
            print(f"POST to compression's first progress, warm: {_spread(waits, 's')}")
            answers = _polls(client, f"file:{model.name}", options.polls)
            print(f"GET /v1/jobs/{{id}} while GPTQ computes: {_spread(answers, 'ms')}")
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def _client(home: Path, port: int) -> httpx2.Client:
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while not _is_ready(url) and time.monotonic() < deadline:
        time.sleep(0.2)
    credentials = json.loads((home / "credentials.json").read_text())
    time.sleep(15)  # the worker's spare process imports torch
    return httpx2.Client(
        base_url=url, timeout=30, headers={"Authorization": f"Bearer {credentials['api_key']}"}, trust_env=False
    )


def _is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/readyz", trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False


def _submit(client: httpx2.Client, model: str, recipe: dict[str, Any]) -> str:
    answer = client.post("/v1/jobs", json={"model": {"id": model}, "recipe": recipe})
    answer.raise_for_status()
    return str(answer.json()["id"])


def _first_progress(client: httpx2.Client, model: str) -> float:
    """Seconds until a poll shows that compression began; waits for the job's end and a new spare."""
    begin = time.perf_counter()
    job = _submit(client, model, QUICK)
    while True:
        shown = client.get(f"/v1/jobs/{job}").json()
        if shown["status"] not in {"queued", "running"}:
            sys.exit(f"the job ended as {shown['status']} before it was seen to compress: {shown['error']}")
        if shown["progress"]["step"] not in {None, "fetch"}:
            break
        time.sleep(0.02)
    seconds = time.perf_counter() - begin
    while client.get(f"/v1/jobs/{job}").json()["status"] == "running":
        time.sleep(0.2)
    time.sleep(15)
    return seconds


def _polls(client: httpx2.Client, model: str, count: int) -> list[float]:
    """Milliseconds of each poll of a job that is in its blocks; the job is cancelled afterwards."""
    job = _submit(client, model, GPTQ)
    while not client.get(f"/v1/jobs/{job}").json()["progress"]["block"]:
        time.sleep(0.5)
    answers = []
    for _ in range(count):
        begin = time.perf_counter()
        client.get(f"/v1/jobs/{job}")
        answers.append(1000 * (time.perf_counter() - begin))
        time.sleep(0.05)
    begin = time.perf_counter()
    client.post(f"/v1/jobs/{job}/cancel")
    while client.get(f"/v1/jobs/{job}").json()["status"] != "cancelled":
        time.sleep(0.05)
    print(f"cancel to cancelled: {time.perf_counter() - begin:.2f} s")
    return answers


def _spread(values: list[float], unit: str) -> str:
    ordered = sorted(values)
    late = ordered[int(0.95 * (len(ordered) - 1))]
    return f"median {statistics.median(ordered):.2f} {unit}, 95 % under {late:.2f} {unit} ({len(ordered)} of them)"


if __name__ == "__main__":
    main()
