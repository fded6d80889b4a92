"""Requests that are refused, and the proof that nothing of them stays."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from sqlalchemy import text
from starlette.testclient import TestClient

from app.database import Database
from app.settings import Settings
from tests.app.jobs.refusals import GPTQ


@pytest.fixture
def nothing_happens(settings: Settings, database: Database, model_id: str) -> Iterator[None]:
    """The test leaves no row, no message and no file."""

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
