"""What an earlier attempt fetched is used by the next one if it is complete, unchanged, and what is asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.workers.sources.checkpoints import write_llama
from tests.workers.sources.hub_server import Hub
from workers.errors import JobError
from workers.fetch import fetch

RECIPE: dict[str, Any] = {"stages": [{"technique": "gptq"}]}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "job_1.1" / "source").mkdir(parents=True)
    return tmp_path / "job_1.1"


def run(work: Path, model_id: str = "org/tiny", revision: str | None = None, **changes: Any) -> str:
    """Fetch; the revision that it told."""
    request = {
        "model": {"id": model_id, "revision": revision},
        "recipe": RECIPE,
        "model_roots": [str(work.parent / "root")],
        **changes,
    }
    events: list[dict[str, Any]] = []
    fetch(work, request, events.append)
    assert events[-1] == {"event": "progress", "fraction": 1.0, "step": "fetch"}
    return str(next(event["revision"] for event in events if event["event"] == "resolved"))


def successor(work: Path) -> Path:
    """The work folder of the next attempt, which was given the source."""
    following = work.with_name("job_1.2")
    following.mkdir()
    (work / "source").rename(following / "source")
    return following


def held(mark: Path) -> Path:
    """Another name of the file that is ``mark`` now: while it stands, no file made later has its inode number."""
    other = mark.parents[2] / "earlier-mark.json"
    other.hardlink_to(mark)
    return other


def contents(work: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (work / "source").rglob("*") if path.is_file()}


def test_a_complete_source_is_not_asked_for_again(hub: Hub, work: Path) -> None:
    commit = run(work)
    before = contents(work)
    hub.requests.clear()
    hub.repositories["models/org/tiny"].commit = "beef" * 10
    following = successor(work)
    assert run(following) == commit  # as when the first attempt died before it could tell the revision
    assert run(following, revision=commit) == commit
    assert hub.requests == []
    assert contents(following) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda source: (source / "fetched.json").unlink(),
        lambda source: (source / "fetched.json").write_text("{"),
        lambda source: (source / "fetched.json").write_text("[]"),
        lambda source: (source / "model.json").unlink(),
        lambda source: (source / "model.json").write_text("null"),
        lambda source: (source / "evaluation.jsonl").unlink(),
        lambda source: (source / "calibration.jsonl").write_text("{}"),
        lambda source: (source / "model" / "stray.json").write_text("{}"),
        lambda source: os.truncate(source / "model" / "model-00001-of-00002.safetensors", 100),
        lambda source: os.utime(source / "model" / "model-00002-of-00002.safetensors", ns=(1, 1)),
    ],
)
def test_one_that_is_half_there_or_changed_is_fetched_again(
    damage: Callable[[Path], None], hub: Hub, work: Path
) -> None:
    commit = run(work)
    before = contents(work)
    following = successor(work)
    damage(following / "source")
    hub.requests.clear()
    assert run(following, revision=commit) == commit
    assert hub.downloaded() >= {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    after = contents(following)
    assert {name: after[name] for name in after if "fetched" not in name and name != "model.json"} == {
        name: before[name] for name in before if "fetched" not in name and name != "model.json"
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"revision": "beef" * 10},
        {"recipe": {**RECIPE, "seed": 1}},
        {"model_roots": []},
        {"model_id": "org/other"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_request_fetches_for_itself(changes: dict[str, Any], hub: Hub, work: Path) -> None:
    run(work)
    hub.repositories["models/org/other"] = hub.repositories["models/org/tiny"]
    hub.repositories["models/org/tiny"].commit = "beef" * 10
    hub.requests.clear()
    run(successor(work), **changes)
    assert hub.downloaded() >= {"model-00001-of-00002.safetensors"}


def test_a_fetch_that_fails_leaves_no_mark(hub: Hub, work: Path) -> None:
    run(work)
    os.truncate(work / "source" / "evaluation.jsonl", 1)
    hub.repositories.clear()
    with pytest.raises(JobError):
        run(work)
    assert not (work / "source" / "fetched.json").exists()


def test_links_to_a_local_folder_are_followed_by_the_check(work: Path) -> None:
    folder = write_llama(work.parent / "root" / "model")
    first = run(work, "file:model")
    following = successor(work)
    mark = following / "source" / "fetched.json"
    earlier = held(mark)
    assert run(following, "file:model") == first
    assert mark.samefile(earlier)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert run(following, "file:model") == first
    assert not mark.samefile(earlier)


def test_an_earlier_result_is_found_in_the_successors_own_folder(work: Path) -> None:
    write_llama(work / "source" / "artifact")
    first = run(work, "job:job_01JZZZZZZZZZZZZZZZZZZZZZZZ")
    following = successor(work)
    mark = following / "source" / "fetched.json"
    earlier = held(mark)
    assert run(following, "job:job_01JZZZZZZZZZZZZZZZZZZZZZZZ") == first
    assert mark.samefile(earlier)
    model = following / "source" / "model"
    assert json.loads((model / "config.json").read_text())["model_type"] == "llama"
    assert (model / "model.safetensors").resolve().parent == following / "source" / "artifact"
