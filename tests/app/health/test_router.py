"""Alive is not ready: what is missing is named."""

import socket
import time
from pathlib import Path

import psycopg
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings


def readiness(settings: Settings) -> tuple[int, str]:
    with TestClient(create_app(settings)) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        answer = client.get("/readyz")
        return answer.status_code, answer.json().get("detail", "")


def test_a_service_with_all_its_parts_is_ready(settings: Settings) -> None:
    assert readiness(settings) == (200, "")


def test_a_service_without_redis_is_alive_and_not_ready(settings: Settings) -> None:
    status, detail = readiness(settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"}))
    assert (status, detail) == (503, "redis does not answer.")


def test_a_service_without_a_database_is_alive_and_not_ready(settings: Settings) -> None:
    without = settings.model_copy(update={"database_url": "postgresql://attar@127.0.0.1:1/attar"})
    status, detail = readiness(without)
    assert status == 503
    assert "database does not answer" in detail


def test_requests_without_a_database_are_told_to_come_back(settings: Settings, auth: dict[str, str]) -> None:
    without = settings.model_copy(update={"database_url": "postgresql://attar@127.0.0.1:1/attar"})
    with TestClient(create_app(without)) as client:
        answer = client.get("/v1/jobs", headers=auth)
    assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
    assert answer.headers["retry-after"]


def test_an_unusable_storage_is_told(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, detail = readiness(settings.model_copy(update={"storage_url": (tmp_path / "file").as_uri()}))
    assert (status, detail) == (503, "storage cannot be used.")


def test_a_database_that_stands_still_is_told_in_time(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://attar@127.0.0.1:{silent.getsockname()[1]}/attar"
        begin = time.monotonic()
        status, detail = readiness(settings.model_copy(update={"database_url": url}))
    assert status == 503
    assert "database does not answer" in detail
    assert time.monotonic() - begin < 10


def test_a_database_that_was_not_migrated_is_told(settings: Settings) -> None:
    with psycopg.connect(settings.required_database_url, autocommit=True) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0000'")
        status, detail = readiness(settings)
        connection.execute("UPDATE alembic_version SET version_num = '0001'")
    assert status == 503
    assert "run `attar migrate`" in detail
