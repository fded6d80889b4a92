"""Model ids and revisions: which there are, and what is refused."""

from __future__ import annotations

import pytest

from workers.errors import UserError
from workers.sources.identifiers import FileId, HubId, JobId, parse_model_id, parse_revision


def test_the_three_kinds_of_model_ids_are_told_apart() -> None:
    assert parse_model_id("gpt2") == HubId("gpt2")
    assert parse_model_id("HuggingFaceTB/SmolLM2-135M-Instruct") == HubId("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert parse_model_id("file:folder/My model (2)") == FileId(("folder", "My model (2)"))
    assert parse_model_id("job:job_01JZZZZZZZZZZZZZZZZZZZZZZZ") == JobId("job_01JZZZZZZZZZZZZZZZZZZZZZZZ")


def test_needless_slashes_of_a_file_name_are_dropped() -> None:
    assert parse_model_id("file:a//b/") == FileId(("a", "b"))


@pytest.mark.parametrize(
    "value",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/b/c",
        "a--b",
        "org/name.git",
        "-name",
        ".hidden",
        "a" * 97,
        "org/nam\u0435",  # a Cyrillic letter
        "https://example.org/model",
        "s3:bucket",
        "file:",
        "file:/",
        "file:/etc",
        "file:../secret",
        "file:a/../../secret",
        "file:a/./b",
        "file:a/.. /b",
        "file:a\\..\\b",
        "file:a\x00b",
        "file:a\nb",
        "file:safe\u202egnp.exe",
        "file:\ud800",
        "file:" + "a" * 501,
        "file:" + "ü" * 130,
        "job:1",
        "job:../job_01JZZZZZZZZZZZZZZZZZZZZZZZ",
        "job:job_01JZZZZZZZZZZZZZZZZZZZZZZZ/x",
    ],
)
def test_other_ids_are_refused_naming_the_field(value: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_model_id(value)
    assert (caught.value.code, caught.value.param) == ("invalid_model_id", "model.id")
    assert caught.value.hint


@pytest.mark.parametrize("value", ["main", "v1.0", "refs/pr/3", "a" * 40])
def test_branches_tags_and_commits_are_revisions_of_a_hub_model(value: str) -> None:
    assert parse_revision(value, HubId("gpt2")) == value


@pytest.mark.parametrize("value", ["", "../main", "a..b", "/main", "main/", "-rf", "a b", "a\n", "a" * 201, "é"])
def test_other_revisions_are_refused(value: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_revision(value, HubId("gpt2"))
    assert (caught.value.code, caught.value.param) == ("invalid_revision", "model.revision")


def test_a_local_model_has_no_branches_but_its_content_can_be_pinned() -> None:
    local = FileId(("model",))
    assert parse_revision(None, local) is None
    assert parse_revision("main", local) is None
    assert parse_revision("0" * 40, local) == "0" * 40
    with pytest.raises(UserError):
        parse_revision("v2", local)
