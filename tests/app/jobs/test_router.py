"""Submitting, reading, listing and cancelling jobs over HTTP, against a real database and broker."""

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import pytest
import redis
from sqlalchemy import text
from starlette.testclient import TestClient

from app import queue
from app.attempts import service as attempts
from app.database import Database
from app.settings import Settings

NAME = "job_01AAAAAAAAAAAAAAAAAAAAAAAA"


def submit(client: TestClient, auth: dict[str, str], model_id: str, **fields: Any) -> dict[str, Any]:
    body = {"model": {"id": model_id}, "recipe": "int8", **fields}
    answer = client.post("/v1/jobs", json=body, headers=auth)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def test_a_submitted_job_is_queued_with_its_recipe_resolved(
    client: TestClient, auth: dict[str, str], model_id: str
) -> None:
    body = {
        "model": {"id": model_id, "revision": "main"},
        "recipe": {"stages": [{"technique": "gptq", "group_size": 64}], "seed": 7},
        "constraints": {"max_perplexity_ratio": 1.25, "max_size_bytes": 140_000_000},
        "priority": -100,
        "queue": "gpu",
        "timeout_seconds": 60,
        "metadata": {"team": "search"},
    }
    answer = client.post("/v1/jobs", json=body, headers=auth)
    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert job["id"].startswith("job_")
    assert (job["object"], job["status"], job["attempt"]) == ("job", "queued", 0)
    assert job["model"] == {"id": model_id, "revision": "main"}
    assert job["recipe"]["stages"][0]["damping"] == 0.01
    assert job["recipe"]["output"] == {"format": "compressed-tensors", "packing": "pack-quantized"}
    assert job["recipe"]["seed"] == 7
    assert job["constraints"] == {"max_perplexity_ratio": 1.25, "max_size_bytes": 140_000_000}
    assert (job["queue"], job["priority"], job["timeout_seconds"]) == ("gpu", -100, 60)
    assert job["metadata"] == {"team": "search"}
    assert job["progress"]["fraction"] == 0.0
    assert job["progress"]["queue_position"] == 1
    assert job["stages"] == [{"index": 0, "technique": "gptq", "status": "pending", "metrics": {}}]
    assert job["warnings"] == []
    assert [job[name] for name in ("result", "error", "retry_of", "started_at", "finished_at")] == [None] * 5
    assert datetime.fromisoformat(job["created_at"]).tzinfo is not None
    assert client.get(answer.headers["location"], headers=auth).json() == job


def test_a_worker_of_the_queue_is_woken_after_the_commit(
    client: TestClient, auth: dict[str, str], model_id: str, settings: Settings
) -> None:
    submit(client, auth, model_id, queue="woken")
    with redis.Redis.from_url(settings.required_redis_url) as broker:
        assert broker.llen("woken") == 1


def test_a_queue_without_a_worker_is_told_until_one_takes_the_job(
    client: TestClient, auth: dict[str, str], model_id: str, database: Database
) -> None:
    assert submit(client, auth, model_id, queue="cpu")["warnings"] == []
    job = submit(client, auth, model_id, queue="nobody")
    assert [(warning["code"], warning["param"]) for warning in job["warnings"]] == [("no_worker", "queue")]
    assert "'nobody'" in job["warnings"][0]["message"]
    queue.announce("nobody")
    assert submit(client, auth, model_id, queue="nobody")["warnings"] == []
    assert client.get(f"/v1/jobs/{job['id']}", headers=auth).json()["warnings"] == job["warnings"]
    with database.transaction() as session:
        claim = attempts.claim(session, "nobody", "worker", 60)
    assert claim is not None
    assert claim.job_id == job["id"]
    assert client.get(f"/v1/jobs/{job['id']}", headers=auth).json()["warnings"] == []


def test_the_place_in_the_queue_counts_priority_first(client: TestClient, auth: dict[str, str], model_id: str) -> None:
    ids = [submit(client, auth, model_id, queue="places", priority=priority)["id"] for priority in (0, 0, 5)]
    places = [client.get(f"/v1/jobs/{job_id}", headers=auth).json()["progress"]["queue_position"] for job_id in ids]
    assert places == [2, 3, 1]


def test_what_has_no_effect_is_a_warning(client: TestClient, auth: dict[str, str], model_id: str) -> None:
    recipe = {"stages": [{"technique": "magnitude"}], "training": {"dataset": {"texts": ["some text"]}}}
    job = submit(client, auth, model_id, recipe=recipe, constraints={"min_accuracy": 0.9})
    assert [(warning["code"], warning["param"]) for warning in job["warnings"]] == [
        ("constraint_not_applicable", "constraints.min_accuracy"),
        ("stored_in_full", "recipe.output.format"),
        ("training_not_applicable", "recipe.training"),
    ]


@pytest.mark.parametrize(("num_warnings", "changes"), [(1, {}), (0, {"allow_overlap": True})])
def test_a_text_that_is_divided_is_told(
    client: TestClient, auth: dict[str, str], model_id: str, num_warnings: int, changes: dict[str, bool]
) -> None:
    dataset = {"texts": ["some words to count", "and more of them"]}
    recipe = {
        "stages": [{"technique": "gptq", "group_size": 64}],
        "calibration": {"dataset": dataset},
        "evaluation": {"dataset": dataset, **changes},
    }
    codes = [warning["code"] for warning in submit(client, auth, model_id, recipe=recipe)["warnings"]]
    assert codes == ["text_divided"] * num_warnings


@pytest.mark.parametrize(("codes", "changes"), [(["text_held_out"], {}), ([], {"allow_overlap": True})])
def test_own_text_that_is_held_out_is_told(
    client: TestClient, auth: dict[str, str], model_id: str, codes: list[str], changes: dict[str, bool]
) -> None:
    recipe = {
        "stages": [{"technique": "gptq", "group_size": 64}],
        "calibration": {"dataset": {"texts": ["some words to count", "and more of them"]}},
        "evaluation": changes,
    }
    assert [warning["code"] for warning in submit(client, auth, model_id, recipe=recipe)["warnings"]] == codes


def test_long_inline_texts_are_stored_whole_and_shown_short(
    client: TestClient, auth: dict[str, str], model_id: str, database: Database
) -> None:
    texts = ["word " * 1000, "more"]
    recipe = {"stages": [{"technique": "gptq", "group_size": 64}], "calibration": {"dataset": {"texts": texts}}}
    job = submit(client, auth, model_id, recipe=recipe)
    shown = job["recipe"]["calibration"]["dataset"]
    assert shown["num_texts"] == 2
    assert len(str(shown)) < 500
    with database.transaction() as session:
        stored = session.execute(text("SELECT recipe FROM jobs WHERE id = :id"), {"id": job["id"]}).scalar_one()
    assert stored["calibration"]["dataset"]["texts"] == texts


class TestIdempotency:
    def test_the_same_key_and_body_are_one_job(self, client: TestClient, auth: dict[str, str], model_id: str) -> None:
        headers = {**auth, "Idempotency-Key": "same"}
        first = client.post("/v1/jobs", json={"model": {"id": model_id}, "recipe": "int8"}, headers=headers)
        again = client.post("/v1/jobs", json={"recipe": "int8", "model": {"id": model_id}}, headers=headers)
        assert (first.status_code, again.status_code) == (202, 202)
        assert again.json()["id"] == first.json()["id"]
        assert again.headers["location"] == first.headers["location"]
        assert "idempotency-replayed" not in first.headers
        assert again.headers["idempotency-replayed"] == "true"

    def test_another_body_is_refused(self, client: TestClient, auth: dict[str, str], model_id: str) -> None:
        headers = {**auth, "Idempotency-Key": "reused"}
        client.post("/v1/jobs", json={"model": {"id": model_id}, "recipe": "int8"}, headers=headers)
        answer = client.post("/v1/jobs", json={"model": {"id": model_id}, "recipe": "int4"}, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_key_reused")

    def test_tenants_do_not_share_keys(
        self, client: TestClient, auth: dict[str, str], other_auth: dict[str, str], model_id: str
    ) -> None:
        body = {"model": {"id": model_id}, "recipe": "int8"}
        made = {
            client.post("/v1/jobs", json=body, headers={**headers, "Idempotency-Key": "shared"}).json()["id"]
            for headers in (auth, other_auth)
        }
        assert len(made) == 2

    def test_simultaneous_requests_make_one_job(
        self, client: TestClient, auth: dict[str, str], model_id: str, database: Database
    ) -> None:
        headers = {**auth, "Idempotency-Key": "race"}
        body = {"model": {"id": model_id}, "recipe": "int8", "metadata": {"race": "yes"}}
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: client.post("/v1/jobs", json=body, headers=headers), range(8)))
        assert {answer.status_code for answer in answers} == {202}
        assert len({answer.json()["id"] for answer in answers}) == 1
        with database.transaction() as session:
            count = session.execute(text("SELECT count(*) FROM jobs WHERE metadata->>'race' = 'yes'")).scalar_one()
        assert count == 1

    @pytest.mark.parametrize("key", ["", "a b", "x" * 256])
    def test_an_odd_key_is_refused(self, client: TestClient, auth: dict[str, str], model_id: str, key: str) -> None:
        body = {"model": {"id": model_id}, "recipe": "int8"}
        answer = client.post("/v1/jobs", json=body, headers={**auth, "Idempotency-Key": key})
        assert (answer.status_code, answer.json()["param"]) == (422, "Idempotency-Key")


class TestListing:
    @pytest.fixture(autouse=True, scope="class")
    @staticmethod
    def made(client: TestClient, other_auth: dict[str, str], model_id: str) -> list[str]:
        return [submit(client, other_auth, model_id, queue="listing")["id"] for _ in range(5)]

    def test_pages_go_from_newest_to_oldest_without_gap(
        self, client: TestClient, other_auth: dict[str, str], made: list[str]
    ) -> None:
        found: list[str] = []
        after: dict[str, str] = {}
        while True:
            page = client.get("/v1/jobs", params={"limit": 2, **after}, headers=other_auth).json()
            found += [job["id"] for job in page["data"]]
            assert page["object"] == "list"
            assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
            if not page["has_more"]:
                break
            after = {"after": page["last_id"]}
        assert found[:5] == sorted(made, reverse=True)
        assert found == sorted(found, reverse=True)

    def test_status_and_model_filter(self, client: TestClient, other_auth: dict[str, str], model_id: str) -> None:
        def count(**params: str) -> int:
            return len(client.get("/v1/jobs", params=params, headers=other_auth).json()["data"])

        assert count(status="queued", model=model_id) >= 5
        assert count(status="succeeded") == count(model="file:other") == 0

    def test_an_empty_page_has_no_ids(self, client: TestClient, other_auth: dict[str, str]) -> None:
        page = client.get("/v1/jobs", params={"status": "failed"}, headers=other_auth).json()
        assert page == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}

    @pytest.mark.parametrize(
        ("name", "value"),
        [("limit", "0"), ("limit", "101"), ("limit", "x"), ("after", "x"), ("status", "done"), ("model", "a\0b")],
    )
    def test_a_wrong_parameter_is_named(self, client: TestClient, auth: dict[str, str], name: str, value: str) -> None:
        answer = client.get("/v1/jobs", params={name: value}, headers=auth)
        assert (answer.status_code, answer.json()["param"]) == (422, name)


class TestCancelling:
    def test_a_waiting_job_ends_at_once(self, client: TestClient, auth: dict[str, str], model_id: str) -> None:
        job = submit(client, auth, model_id)
        answer = client.post(f"/v1/jobs/{job['id']}/cancel", headers=auth)
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
        assert answer.json()["finished_at"] is not None
        events = client.get(f"/v1/jobs/{job['id']}/events", headers=auth).json()["data"]
        assert [event["type"] for event in events] == ["job.queued", "job.cancelled"]

    def test_an_ended_job_cannot_be_cancelled(self, client: TestClient, auth: dict[str, str], model_id: str) -> None:
        job = submit(client, auth, model_id)
        client.post(f"/v1/jobs/{job['id']}/cancel", headers=auth)
        answer = client.post(f"/v1/jobs/{job['id']}/cancel", headers=auth)
        assert (answer.status_code, answer.json()["code"]) == (409, "job_conflict")

    def test_a_running_job_is_asked_to_stop(
        self, client: TestClient, auth: dict[str, str], model_id: str, database: Database
    ) -> None:
        job = submit(client, auth, model_id)
        with database.transaction() as session:
            session.execute(text("UPDATE jobs SET status = 'running' WHERE id = :id"), {"id": job["id"]})
        answer = client.post(f"/v1/jobs/{job['id']}/cancel", headers=auth)
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelling")


class TestTenants:
    @pytest.mark.parametrize("path", ["", "/report", "/events", "/artifacts", "/artifacts/config.json"])
    def test_anothers_job_is_not_there(
        self, client: TestClient, auth: dict[str, str], other_auth: dict[str, str], model_id: str, path: str
    ) -> None:
        job = submit(client, auth, model_id)
        answer = client.get(f"/v1/jobs/{job['id']}{path}", headers=other_auth)
        assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")

    def test_anothers_job_cannot_be_cancelled(
        self, client: TestClient, auth: dict[str, str], other_auth: dict[str, str], model_id: str
    ) -> None:
        job = submit(client, auth, model_id)
        answer = client.post(f"/v1/jobs/{job['id']}/cancel", headers=other_auth)
        assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")
        assert client.get(f"/v1/jobs/{job['id']}", headers=auth).json()["status"] == "queued"

    @pytest.mark.parametrize("path", ["", "/report", "/events", "/artifacts", "/artifacts/config.json"])
    @pytest.mark.parametrize("job_id", [NAME, "x", "job_%00", "%F0%9F%A6%8A", "job_" + "9" * 3000])
    def test_no_id_whatever_it_is_breaks_anything(
        self, client: TestClient, auth: dict[str, str], job_id: str, path: str
    ) -> None:
        answer = client.get(f"/v1/jobs/{job_id}{path}", headers=auth)
        assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")


class TestReport:
    def test_there_is_none_before_it_was_measured(
        self, client: TestClient, auth: dict[str, str], model_id: str
    ) -> None:
        job = submit(client, auth, model_id)
        answer = client.get(f"/v1/jobs/{job['id']}/report", headers=auth)
        assert (answer.status_code, answer.json()["code"]) == (404, "report_not_found")

    def test_it_is_what_was_stored(
        self, client: TestClient, auth: dict[str, str], model_id: str, database: Database
    ) -> None:
        job = submit(client, auth, model_id)
        with database.transaction() as session:
            session.execute(
                text("""UPDATE jobs SET report = '{"version": 1}', result = '{"size_bytes": 5}',
                        error = '{"code": "c", "message": "m", "retryable": false}' WHERE id = :id"""),
                {"id": job["id"]},
            )
        assert client.get(f"/v1/jobs/{job['id']}/report", headers=auth).json() == {"version": 1}
        job = client.get(f"/v1/jobs/{job['id']}", headers=auth).json()
        assert job["result"]["size_bytes"] == 5
        assert job["result"]["accuracy"] is None
        assert job["error"] == {"code": "c", "message": "m", "param": None, "hint": None, "retryable": False}
