"""Who may ask: a valid key and nobody else, on every route but health."""

import pytest
from sqlalchemy import text
from starlette.testclient import TestClient

from app.database import Database
from app.keys import service as keys


def code_of(client: TestClient, header: str | None) -> tuple[int, str]:
    headers = {} if header is None else {b"Authorization": header.encode()}
    answer = client.get("/v1/jobs", headers=headers)
    assert answer.headers["www-authenticate"].startswith("Bearer")
    return answer.status_code, answer.json()["code"]


def test_a_key_opens_the_api(client: TestClient, auth: dict[str, str]) -> None:
    assert client.get("/v1/jobs", headers=auth).status_code == 200


@pytest.mark.parametrize("header", [None, "Basic YTpi", "attar_x", ""])
def test_without_a_bearer_key_there_is_no_answer(client: TestClient, header: str | None) -> None:
    assert code_of(client, header) == (401, "missing_api_key")


def test_a_body_is_not_read_for_those_without_a_key(client: TestClient) -> None:
    headers = {"Content-Type": "application/json"}
    assert client.post("/v1/jobs", content=b"not JSON", headers=headers).json()["code"] == "missing_api_key"


@pytest.mark.parametrize("secret", ["attar_" + "x" * 43, "attar_x", "x" * 5000, "attar_'; DROP TABLE jobs; --", "é"])
def test_an_unknown_key_is_refused(client: TestClient, secret: str) -> None:
    assert code_of(client, f"Bearer {secret}") == (401, "invalid_api_key")


def test_a_revoked_key_is_refused_from_the_next_request_on(client: TestClient, database: Database) -> None:
    with database.transaction() as session:
        key, secret = keys.create(session, "to be revoked")
    assert client.get("/v1/jobs", headers={"Authorization": f"Bearer {secret}"}).status_code == 200
    with database.transaction() as session:
        keys.revoke(session, key.id)
    assert code_of(client, f"Bearer {secret}") == (401, "revoked_api_key")


def test_an_expired_key_is_refused_by_the_databases_clock(client: TestClient, database: Database) -> None:
    with database.transaction() as session:
        key, secret = keys.create(session, "short-lived")
        session.execute(text("UPDATE api_keys SET expires_at = now() WHERE id = :id"), {"id": key.id})
    assert code_of(client, f"Bearer {secret}") == (401, "expired_api_key")


def test_nothing_but_health_and_documents_is_open(client: TestClient) -> None:
    open_paths = {"/healthz", "/readyz"}
    schema = client.get("/openapi.json").json()
    for path, operations in schema["paths"].items():
        for method in operations:
            answer = client.request(method, path.replace("{job_id}", "job_x").replace("{path}", "x"))
            assert (answer.status_code == 401) == (path not in open_paths), f"{method} {path}"
