"""The demo: the example of the interface, nothing smaller; its own service; nothing left when interrupted."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import psycopg
import pytest
from pydantic import TypeAdapter

from app.demo import SUBMISSION, prepare_model
from app.embedded.errors import HomeInUseError
from app.jobs.schemas import SUBMISSION_EXAMPLE, JobSubmission
from app.local import remove_servers, running_servers, start_servers
from tests.jobs import wait_until


def test_its_job_is_the_example_of_the_interface() -> None:
    submission = TypeAdapter(JobSubmission).validate_python(SUBMISSION)
    assert submission.recipe.calibration.num_samples == 64
    assert submission.recipe.calibration.max_seq_length == 512
    for part in ("recipe", "constraints"):
        assert SUBMISSION[part] == SUBMISSION_EXAMPLE[part]


@pytest.mark.service
def test_the_model_is_prepared_once(tmp_path: Path) -> None:
    prepare_model(tmp_path)
    (folder,) = tmp_path.iterdir()
    names = {file.name for file in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json"}
    before = (folder / "model.safetensors").stat()
    prepare_model(tmp_path)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.service
def test_an_interrupted_demo_leaves_nothing_running_and_no_job_waiting(tmp_path: Path) -> None:
    log = tmp_path / "demo.log"
    environment = {
        **os.environ,
        "ATTAR_HOME": str(tmp_path / "home"),
        # Of another service: the demo minds its own.
        "ATTAR_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
        "ATTAR_MODEL_ROOTS": "/nowhere",
        "ATTAR_NUM_THREADS": "1",
    }
    with log.open("wb") as output:
        demo = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "demo"], stdout=output, stderr=output, env=environment
        )
    try:
        wait_until(lambda: demo.poll() is not None or " running" in log.read_text(), 120)
        assert demo.poll() is None, log.read_text()
        family = psutil.Process(demo.pid).children(recursive=True)
    finally:
        demo.send_signal(signal.SIGINT)
        assert demo.wait(60) == 130
    wait_until(lambda: not any(member.is_running() for member in family))
    text = log.read_text()
    assert "Interrupted; nothing is left running" in text
    assert "Traceback" not in text
    assert "\x1b" not in text, "a file gets plain lines"
    assert running_servers(tmp_path / "home") is None
    with start_servers(tmp_path / "home") as servers:
        with psycopg.connect(servers.database_url) as connection:
            assert connection.execute("SELECT status FROM jobs").fetchall() == [("cancelled",)]
        with pytest.raises(HomeInUseError):
            remove_servers(tmp_path / "home")
    remove_servers(tmp_path / "home")
