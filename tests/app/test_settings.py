"""Settings from the environment: defaults, lists, and names of what is wrong."""

from pathlib import Path

import pytest

from app.settings import SettingInvalidError, SettingMissingError, Settings, get_settings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"ATTAR_{name.upper()}", raising=False)


def test_paths_follow_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTAR_HOME", "/srv/attar")
    settings = Settings()
    assert settings.model_roots == [Path("/srv/attar/models")]
    assert settings.work_dir == Path("/srv/attar/work")


def test_model_roots_are_separated_like_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTAR_MODEL_ROOTS", "/srv/models:~/models:")
    assert Settings().model_roots == [Path("/srv/models"), Path("~/models").expanduser()]


def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTAR_DATABASE_URL", "")
    monkeypatch.setenv("ATTAR_PORT", "")
    assert Settings().database_url is None
    assert Settings().port == 8000


def test_a_role_that_needs_a_missing_url_says_what_to_do() -> None:
    with pytest.raises(SettingMissingError, match=r"set ATTAR_DATABASE_URL, .*`attar serve`"):
        _ = Settings().required_database_url
    with pytest.raises(SettingMissingError, match="ATTAR_REDIS_URL"):
        _ = Settings().required_redis_url


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ATTAR_DATABASE_URL", "mysql://x"),
        ("ATTAR_REDIS_URL", "http://x"),
        ("ATTAR_LEASE_SECONDS", "-1"),
        ("ATTAR_PORT", "many"),
    ],
)
def test_a_setting_that_cannot_be_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    with pytest.raises(SettingInvalidError, match=f"^{name}: "):
        get_settings()
    monkeypatch.undo()
    get_settings.cache_clear()
