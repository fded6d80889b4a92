"""The client: what the service says becomes values, and what goes wrong becomes three kinds of error."""

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from app.client import Client, RefusedError, UnreachableError
from app.database import Database
from app.settings import Settings
from tests.jobs import insert_job, read_job
from tests.server import listening_app

RECIPE = {"stages": [{"technique": "round_to_nearest", "scheme": "W8A16"}]}


@pytest.fixture(scope="module")
def url(settings: Settings) -> Iterator[str]:
    with listening_app(settings) as url:
        yield url


@pytest.fixture(scope="module")
def connected(url: str, api_key: str) -> Iterator[Client]:
    with Client(url, api_key) as client:
        yield client


def test_a_job_is_submitted_read_listed_and_cancelled(connected: Client, model_id: str) -> None:
    job = connected.submit({"model": {"id": model_id}, "recipe": RECIPE, "metadata": {"test": "life"}})
    assert job["status"] == "queued"
    assert connected.job(job["id"])["id"] == job["id"]
    assert connected.jobs(status="queued", limit=1)["data"][0]["id"] == job["id"]
    assert connected.cancel(job["id"])["status"] == "cancelled"
    assert [seen["status"] for seen in connected.watch(job["id"])] == ["cancelled"]


def test_submitting_again_with_a_key_makes_no_second_job(connected: Client, model_id: str) -> None:
    body = {"model": {"id": model_id}, "recipe": RECIPE}
    first, second = (connected.submit(body, idempotency_key="twice") for _ in range(2))
    assert first["id"] == second["id"]


def test_a_refusal_tells_code_field_and_hint(connected: Client) -> None:
    with pytest.raises(RefusedError) as raised:
        connected.submit({"model": {"id": "file:nothing"}, "recipe": RECIPE})
    error = raised.value
    assert (error.status, error.code, error.param) == (422, "model_not_found", "model.id")
    assert error.hint
    assert "nothing" in str(error)


def test_a_missing_key_is_refused(url: str) -> None:
    with Client(url) as client, pytest.raises(RefusedError) as raised:
        client.jobs()
    assert raised.value.code == "missing_api_key"


@pytest.mark.parametrize("job_id", ["job_x", "../keys", "", "a b/c?d"])
def test_any_text_is_a_job_that_does_not_exist(connected: Client, job_id: str) -> None:
    with pytest.raises(RefusedError) as raised:
        connected.job(job_id)
    assert raised.value.status == 404


def test_watching_waits_for_a_service_that_is_away(settings: Settings, database: Database, api_key: str) -> None:
    job_id = insert_job(database)
    with ExitStack() as service:
        url = service.enter_context(listening_app(settings))
        with Client(url, api_key) as client:
            seen = client.watch(job_id, poll_seconds=0.05, patience_seconds=0.3)
            assert next(seen)["status"] == "queued"
            service.close()
            with pytest.raises(UnreachableError):
                next(seen)
    assert read_job(database, job_id).status == "queued"


def test_nobody_there_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}") as client:
        assert not client.ready()
        with pytest.raises(UnreachableError, match=f"no answer from http://127.0.0.1:{port}"):
            client.jobs()


class _Stranger(BaseHTTPRequestHandler):
    status, body = 200, b"<html>hello</html>"

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.parametrize(("status", "body"), [(200, b"<html>"), (200, b"[1]"), (502, b"<html>"), (404, b'{"a": 1}')])
def test_something_that_is_not_attar_is_unreachable(status: int, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Stranger, "status", status)
    monkeypatch.setattr(_Stranger, "body", body)
    with HTTPServer(("127.0.0.1", 0), _Stranger) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with (
            Client(f"http://127.0.0.1:{server.server_port}") as client,
            pytest.raises(UnreachableError, match="is not Attar"),
        ):
            client.jobs()


def test_a_proxy_of_the_environment_is_not_asked_about_this_machine(
    connected: Client, url: str, api_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with Client(url, api_key) as client:
        assert client.ready()


def test_an_address_that_is_none_is_unreachable() -> None:
    with pytest.raises(UnreachableError), Client("http://[half") as client:
        client.jobs()
    with pytest.raises(UnreachableError), Client("nonsense") as client:
        client.jobs()


def test_watching_what_never_answered_ends_at_once() -> None:
    lost: list[int] = []
    with Client("http://127.0.0.1:1") as client, pytest.raises(UnreachableError):
        next(client.watch("job_01M80W7713Z0HZ9NTVBGXYXV3F", on_lost=lambda: lost.append(1)))
    assert lost == []
