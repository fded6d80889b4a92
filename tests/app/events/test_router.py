"""What happened to a job, numbered without gaps, for its own tenant."""

import pytest
from starlette.testclient import TestClient

from app.database import Database
from app.events import repository as events


@pytest.fixture(scope="module")
def url(client: TestClient, auth: dict[str, str], model_id: str, database: Database) -> str:
    job_id = client.post("/v1/jobs", json={"model": {"id": model_id}, "recipe": "int8"}, headers=auth).json()["id"]
    for number in range(2, 5):
        with database.transaction() as session:
            events.append(session, job_id, "warning", {"number": number})
    return f"/v1/jobs/{job_id}/events"


def test_events_are_numbered_from_one_without_gap(client: TestClient, auth: dict[str, str], url: str) -> None:
    answer = client.get(url, headers=auth).json()
    assert [event["id"] for event in answer["data"]] == [1, 2, 3, 4]
    assert answer["data"][0]["type"] == "job.queued"
    assert answer["data"][3]["data"] == {"number": 4}
    assert (answer["first_id"], answer["last_id"], answer["has_more"]) == (1, 4, False)


def test_reading_goes_on_after_the_last_id(client: TestClient, auth: dict[str, str], url: str) -> None:
    first = client.get(url, params={"limit": 3}, headers=auth).json()
    assert (first["last_id"], first["has_more"]) == (3, True)
    rest = client.get(url, params={"after": first["last_id"]}, headers=auth).json()
    assert [event["id"] for event in rest["data"]] == [4]


@pytest.mark.parametrize(("name", "value"), [("after", "-1"), ("after", "x"), ("limit", "0"), ("after", str(2**40))])
def test_a_wrong_parameter_is_named(client: TestClient, auth: dict[str, str], url: str, name: str, value: str) -> None:
    answer = client.get(url, params={name: value}, headers=auth)
    assert (answer.status_code, answer.json()["param"]) == (422, name)
