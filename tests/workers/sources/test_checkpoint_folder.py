"""Folders below the model roots: nothing outside, no links, no other kinds of files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.workers.sources.checkpoints import write_llama
from workers.errors import UserError
from workers.sources.checkpoint_folder import open_file, open_model


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_llama(tmp_path / "root" / "group" / "model")
    return tmp_path / "root"


def files_of(root: Path, *parts: str) -> set[str]:
    with open_model(parts, [root]) as (folder, _):
        return set(folder.files)


def test_a_folder_below_a_root_is_opened_with_its_sizes(root: Path) -> None:
    with open_model(("group", "model"), [root]) as (folder, gguf_name):
        assert gguf_name is None
        assert folder.files["config.json"] == (root / "group/model/config.json").stat().st_size
        assert folder.read("config.json", 1, 5) == (root / "group/model/config.json").read_bytes()[1:6]
        assert folder.read("config.json", 10**6, 5) == b""


def test_the_root_itself_may_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert "config.json" in files_of(tmp_path / "link", "group", "model")


def test_roots_are_tried_in_order_and_may_be_missing(root: Path, tmp_path: Path) -> None:
    with open_model(("group", "model"), [tmp_path / "nowhere", root]) as (folder, _):
        assert folder.path == root.resolve() / "group" / "model"


def test_links_to_folders_and_files_are_refused_wherever_they_lead(root: Path, tmp_path: Path) -> None:
    (root / "elsewhere").symlink_to(tmp_path)
    (root / "inside").symlink_to("group")
    for parts in (("elsewhere",), ("elsewhere", "root"), ("inside", "model")):
        with pytest.raises(UserError) as caught:
            files_of(root, *parts)
        assert caught.value.code == "symlink_refused"
    (root / "group/model/config.json").unlink()
    (root / "group/model/config.json").symlink_to("/etc/hostname")
    with pytest.raises(UserError) as caught:
        files_of(root, "group", "model")
    assert caught.value.code == "symlink_refused"


def test_what_is_no_folder_is_not_found(root: Path) -> None:
    for parts in (("nothing",), ("group", "model", "config.json"), ("group", "model", "config.json", "x")):
        with pytest.raises(UserError) as caught:
            files_of(root, *parts)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model.id")


@pytest.mark.parametrize(
    ("parts", "meant"),
    [
        (("group", "modell"), "'file:group/model'"),
        (("gruop", "model"), "'file:group'"),
        (("group", "model", "weights.gguf"), "'file:group/model/weight.gguf'"),
        (("group", "else"), None),
        (("group", "model", "config.json"), None),
        (("hiden",), None),
        (("lin",), None),
        (("zz\u202ez",), None),
    ],
)
def test_what_has_a_similar_name_is_told(root: Path, parts: tuple[str, ...], meant: str | None) -> None:
    (root / "group/model/weight.gguf").touch()
    (root / "zz\u202ezz").mkdir()
    (root / ".hidden").mkdir()
    (root / "link").symlink_to(root / "group")
    with pytest.raises(UserError) as caught:
        files_of(root, *parts)
    assert caught.value.hint is not None
    assert caught.value.hint.partition(" meant?")[0] == (f"Is {meant}" if meant else caught.value.hint)


def test_pipes_and_folders_are_not_files_of_a_checkpoint(root: Path) -> None:
    os.mkfifo(root / "group/model/added_tokens.json")
    (root / "group/model/vocab.json").mkdir()
    assert files_of(root, "group", "model") == {"config.json", "tokenizer.json", "model.safetensors"}


def test_a_file_swapped_for_a_link_after_listing_is_not_opened(root: Path) -> None:
    with open_model(("group", "model"), [root]) as (folder, _):
        (root / "group/model/config.json").unlink()
        (root / "group/model/config.json").symlink_to("/etc/hostname")
        with pytest.raises(UserError, match="symbolic link"):
            folder.read("config.json", 0, 10)


def test_a_single_file_is_opened_under_the_same_rules(root: Path) -> None:
    descriptor = open_file(("group", "model", "config.json"), [root])
    assert descriptor is not None
    os.close(descriptor)
    assert open_file(("group", "nothing.txt"), [root]) is None
    assert open_file(("group",), [root]) is None
    os.mkfifo(root / "pipe.txt")
    assert open_file(("pipe.txt",), [root]) is None
    (root / "link.txt").symlink_to("group/model/config.json")
    with pytest.raises(UserError, match="symbolic link"):
        open_file(("link.txt",), [root])


def test_no_descriptor_is_left_open(root: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for parts in (("group", "model"), ("nothing",), ("group", "model", "config.json")):
        try:
            files_of(root, *parts)
        except UserError:
            continue
    assert len(list(Path("/proc/self/fd").iterdir())) == before
