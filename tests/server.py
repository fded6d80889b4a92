"""The app behind a real socket, for clients that speak HTTP; and an artifact that no worker had to make."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from app.artifacts import service as artifacts
from app.database import Database
from app.main import create_app
from app.settings import Settings
from app.storage import open_storage
from tests.jobs import insert_job, wait_until


@contextmanager
def listening_app(settings: Settings) -> Iterator[str]:
    """The app on a free loopback port; yields its address."""
    config = uvicorn.Config(create_app(settings), host="127.0.0.1", port=0, log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def insert_finished_job(settings: Settings, database: Database, folder: Path, files: dict[str, bytes]) -> str:
    """A succeeded job whose artifact holds ``files``."""
    job_id = insert_job(database, status="succeeded", report={"version": 1})
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    published = artifacts.publish(open_storage(settings), folder, job_id=job_id, fence=1)
    with database.transaction() as session:
        artifacts.record(session, published, job_id=job_id, fence=1)
    return job_id
