"""The command line as a user meets it: what it prints, and the exit code that tells a script what happened."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.database import Database
from app.settings import Settings
from tests.jobs import insert_job
from tests.server import insert_finished_job, listening_app

Attar = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def url(settings: Settings) -> Iterator[str]:
    with listening_app(settings) as url:
        yield url


@pytest.fixture
def attar(url: str, api_key: str, settings: Settings, tmp_path: Path) -> Attar:
    """Run the command line in an empty folder, as the owner of a key."""
    base = {name: value for name, value in os.environ.items() if not name.startswith("ATTAR_")}
    base |= {"ATTAR_URL": url, "ATTAR_API_KEY": api_key, "ATTAR_HOME": str(settings.home)}

    def run(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "app.cli", *arguments],
            input=stdin,
            env={**base, **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def parsed(result: subprocess.CompletedProcess[str]) -> Any:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_job_is_submitted_shown_listed_and_cancelled(attar: Attar, model_id: str) -> None:
    submitted = attar("submit", model_id, "--recipe", "int8", "--metadata", "team=search", "--priority", "3")
    assert submitted.returncode == 0, submitted.stderr
    job_id, status = submitted.stdout.split()
    assert status == "queued"
    shown = attar("show", job_id)
    assert "round_to_nearest W8A16" in shown.stdout
    assert "metadata team" in shown.stdout
    assert job_id in attar("list").stdout
    assert attar("cancel", job_id).stdout.split() == [job_id, "cancelled"]
    again = attar("cancel", job_id)
    assert again.returncode == 3
    assert "cancelled" in again.stderr


def test_every_command_speaks_json(attar: Attar, model_id: str) -> None:
    job = parsed(attar("submit", model_id, "--recipe", "int8", "--json"))
    assert parsed(attar("show", job["id"], "--json"))["id"] == job["id"]
    assert job["id"] in [listed["id"] for listed in parsed(attar("list", "--json"))["data"]]
    assert parsed(attar("cancel", job["id"], "--json"))["status"] == "cancelled"
    assert {preset["name"] for preset in parsed(attar("recipes", "--json"))["data"]} >= {"int8", "int4", "sparse50"}
    assert "gptq" in [technique["name"] for technique in parsed(attar("techniques", "--json"))["data"]]
    assert [technique["name"] for technique in parsed(attar("techniques", "gptq", "--json"))["data"]] == ["gptq"]
    refused = attar("show", "job_none", "--json")
    assert refused.returncode == 3
    assert json.loads(refused.stderr)["code"] == "job_not_found"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("recipe.yaml", "stages:\n  - technique: magnitude\n    sparsity: 0.25\n"),
        ("recipe.json", '{"stages": [{"technique": "magnitude", "sparsity": 0.25}]}'),
        ("-", "stages: [{technique: magnitude, sparsity: 0.25}]"),
        (
            "artifact.json",
            '{"model": {"id": "x"}, "recipe": {"stages": [{"technique": "magnitude", "sparsity": 0.25}]}}',
        ),
    ],
)
def test_a_recipe_comes_from_yaml_json_or_standard_input(
    attar: Attar, model_id: str, tmp_path: Path, name: str, text: str
) -> None:
    if name != "-":
        (tmp_path / name).write_text(text)
    job = parsed(attar("submit", model_id, "--recipe", name, "--json", stdin=text if name == "-" else ""))
    assert job["recipe"]["stages"][0]["sparsity"] == 0.25


@pytest.mark.parametrize("content", ["seed: 2024-01-01", "damping: .nan", "a: &b {c: *b}", "- 1", "{"])
def test_a_file_that_is_no_recipe_is_wrong_use(attar: Attar, model_id: str, tmp_path: Path, content: str) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    result = attar("submit", model_id, "--recipe", "recipe.yaml")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_a_refused_recipe_names_its_field(attar: Attar, model_id: str) -> None:
    refused = attar("submit", model_id, "-r", "-", stdin="stages: [{technique: magnitude, sparsity: 1.5}]")
    assert refused.returncode == 3
    assert "recipe.stages[0].sparsity" in refused.stderr
    assert refused.stdout == ""


def test_every_fault_of_a_recipe_is_told(attar: Attar, model_id: str) -> None:
    text = "stage: [{technique: magnitude}]\nseed: -1"
    refused = attar("submit", model_id, "-r", "-", stdin=text)
    assert refused.returncode == 3
    assert "recipe.stage)" in refused.stderr
    assert "Is 'stages' meant?" in refused.stderr
    assert "recipe.seed" in refused.stderr
    problem = json.loads(attar("submit", model_id, "-r", "-", "--json", stdin=text).stderr)
    assert problem["param"] == "recipe.stage"
    assert {fault["param"] for fault in problem["errors"]} == {"recipe.stage", "recipe.seed", "recipe.stages"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["submit"],
        ["submit", "file:x", "--recipe", "missing.json"],
        ["submit", "file:x", "--recipe", "-"],
        ["submit", "file:x", "--constraint", "max_size_bytes"],
        ["list", "--limit", "many"],
        ["nonsense"],
        ["worker", "--queue"],
    ],
)
def test_wrong_use_exits_with_2(attar: Attar, arguments: list[str]) -> None:
    result = attar(*arguments)
    assert result.returncode == 2
    assert result.stderr
    assert "Traceback" not in result.stderr


def test_a_service_that_is_away_exits_with_4(attar: Attar) -> None:
    result = attar("list", ATTAR_URL="http://127.0.0.1:1")
    assert result.returncode == 4
    assert "attar serve" in result.stderr


def test_a_wrong_key_exits_with_3(attar: Attar) -> None:
    assert attar("list", ATTAR_API_KEY="attar_wrong").returncode == 3


def test_the_outcome_of_a_watched_job_is_the_exit_code(attar: Attar, database: Database) -> None:
    error = {
        "code": "not_smaller",
        "message": "No byte less.",
        "param": None,
        "hint": "Use fewer bits.",
        "retryable": False,
    }
    failed = attar("watch", insert_job(database, status="failed", error=error))
    assert failed.returncode == 1
    assert "not_smaller" in failed.stdout
    assert "Use fewer bits." in failed.stdout
    assert attar("watch", insert_job(database, status="cancelled")).returncode == 1
    assert attar("watch", insert_job(database, status="succeeded")).returncode == 0


def test_a_key_kept_for_this_machine_is_not_sent_elsewhere(
    attar: Attar, settings: Settings, url: str, api_key: str
) -> None:
    (settings.home / "credentials.json").write_text(json.dumps({"url": url, "api_key": api_key}))
    assert attar("list", ATTAR_URL="", ATTAR_API_KEY="").returncode == 0
    assert attar("list", ATTAR_URL=url + "/", ATTAR_API_KEY="").returncode == 0
    elsewhere = attar(
        "list",
        ATTAR_URL=url.replace("127.0.0.1", "localhost"),
        ATTAR_API_KEY="",
    )
    assert elsewhere.returncode == 3
    assert "key" in elsewhere.stderr


def test_an_artifact_is_downloaded_into_a_folder_of_the_jobs_name(
    attar: Attar, settings: Settings, database: Database, tmp_path: Path
) -> None:
    job_id = insert_finished_job(settings, database, tmp_path / "artifact", {"config.json": b"{}"})
    result = attar("download", job_id)
    assert result.returncode == 0, result.stderr
    assert "2 files" in result.stdout
    assert (tmp_path / job_id / "config.json").read_bytes() == b"{}"
    assert parsed(attar("download", job_id, "-o", "there", "--json"))["verified"] is True
    assert (tmp_path / "there" / "manifest.json").is_file()


def test_what_cannot_be_downloaded_is_told_in_a_line(
    attar: Attar, settings: Settings, database: Database, model_id: str, tmp_path: Path
) -> None:
    job_id = insert_finished_job(settings, database, tmp_path / "artifact", {"config.json": b"{}"})
    (tmp_path / "taken").write_text("mine")
    onto_a_file = attar("download", job_id, "-o", "taken")
    assert (onto_a_file.returncode, onto_a_file.stderr.count("\n")) == (2, 2)
    assert "cannot write to taken" in onto_a_file.stderr
    waiting = parsed(attar("submit", model_id, "--recipe", "int8", "--json"))["id"]
    attar("cancel", waiting)
    of_nothing = attar("download", waiting, "-o", "nothing")
    assert (of_nothing.returncode, of_nothing.stderr.count("\n")) == (3, 2)
    assert f"job {waiting} is cancelled and has no artifact" in of_nothing.stderr
    assert not (tmp_path / "nothing").exists()


def test_keys_are_made_once_listed_and_revoked(attar: Attar, settings: Settings) -> None:
    database_url = {"ATTAR_DATABASE_URL": settings.required_database_url}
    made = parsed(attar("keys", "create", "for a friend", "--tenant", "friend", "--json", **database_url))
    assert attar("list", ATTAR_API_KEY=made["api_key"]).returncode == 0
    listed = attar("keys", "list", **database_url)
    assert made["id"] in listed.stdout
    assert made["api_key"] not in listed.stdout
    assert attar("keys", "revoke", made["id"], **database_url).returncode == 0
    assert attar("list", ATTAR_API_KEY=made["api_key"]).returncode == 3
    assert attar("keys", "revoke", "key_none", **database_url).returncode == 3
    assert attar("keys", "create", "", **database_url).returncode == 2


def test_keys_without_a_database_say_what_to_do(attar: Attar, tmp_path: Path) -> None:
    result = attar("keys", "list", ATTAR_HOME=str(tmp_path / "empty"))
    assert result.returncode == 2
    assert "ATTAR_DATABASE_URL" in result.stderr


@pytest.mark.parametrize("role", ["api", "dispatcher", "worker", "migrate"])
def test_a_role_without_its_settings_says_which(attar: Attar, role: str) -> None:
    result = attar(role)
    assert result.returncode == 2, result.stderr
    assert "ATTAR_DATABASE_URL" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_command_line_never_loads_torch_or_the_database() -> None:
    code = "import sys, app.cli; print(*({'torch', 'transformers', 'sqlalchemy', 'celery'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
