"""The production form says the same as the code: images, commands, settings, servers."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from app.cli.main import application
from app.embedded.postgres import MAJOR_VERSION
from app.settings import Settings

ROOT = Path(__file__).parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
OURS = sorted(name for name, service in SERVICES.items() if "build" in service)


def test_every_role_runs_once_and_a_worker_for_each_kind_of_machine() -> None:
    roles = sorted(SERVICES[name]["command"][1] for name in OURS)
    assert roles == ["api", "dispatcher", "migrate", "worker", "worker"]


@pytest.mark.parametrize("name", OURS)
def test_a_service_runs_a_command_that_the_command_line_has(name: str) -> None:
    program, command, *options = SERVICES[name]["command"]
    assert program == "attar"
    shown = CliRunner().invoke(application, [command, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    for option in options:
        if option.startswith("--"):
            assert option in shown.output


@pytest.mark.parametrize("name", OURS)
def test_a_service_is_built_from_a_target_of_the_dockerfile(name: str) -> None:
    target = SERVICES[name]["build"]["target"]
    assert re.search(rf"^FROM base AS {target}$", DOCKERFILE, re.MULTILINE)
    assert target == ("worker" if SERVICES[name]["command"][1] == "worker" else "api")


def environment_names() -> Iterator[str]:
    for service in SERVICES.values():
        yield from service.get("environment", {})
    yield from re.findall(r"\bATTAR_[A-Z_]+", DOCKERFILE)


def test_every_variable_is_a_setting() -> None:
    named = {name for name in environment_names() if name.startswith("ATTAR_")}
    assert named >= {"ATTAR_DATABASE_URL", "ATTAR_REDIS_URL", "ATTAR_STORAGE_URL", "ATTAR_HOME"}
    assert named <= {f"ATTAR_{field.upper()}" for field in Settings.model_fields}


@pytest.mark.parametrize("name", OURS)
def test_the_variables_of_a_service_make_valid_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [variable for variable in os.environ if variable.startswith("ATTAR_")]:
        monkeypatch.delenv(variable)
    for variable, value in SERVICES[name]["environment"].items():
        monkeypatch.setenv(variable, re.sub(r"\$\{\w+:[?-]\}", "secret", value))
    settings = Settings()
    assert settings.required_database_url.endswith("@postgres:5432/attar")
    assert settings.required_redis_url.endswith("@redis:6379/0")
    mounts = [volume.split(":")[1] for volume in SERVICES[name]["volumes"]]
    assert settings.storage_url == f"file://{mounts[0]}"
    assert [str(root) for root in settings.model_roots] == [mounts[1]]


def test_a_worker_takes_the_queue_that_its_settings_name() -> None:
    for name in OURS:
        if SERVICES[name]["command"][1] == "worker":
            assert SERVICES[name]["command"][-1] == SERVICES[name]["environment"]["ATTAR_QUEUE"]


def test_postgresql_is_the_version_that_is_embedded_and_keeps_its_data() -> None:
    assert SERVICES["postgres"]["image"] == f"postgres:{MAJOR_VERSION}"
    # The image of 18 moved its data folder below this one.
    assert SERVICES["postgres"]["volumes"] == ["postgres:/var/lib/postgresql"]


def test_redis_appends_to_disk_and_evicts_nothing() -> None:
    command = " ".join(SERVICES["redis"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command
    assert "--requirepass" in command


def test_nothing_listens_outside_this_host() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published == ["127.0.0.1:8000:8000"]


def test_a_gpu_is_reserved_for_the_gpu_worker() -> None:
    (device,) = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_the_api_image_goes_without_torch_and_the_worker_image_does_not() -> None:
    left_out = re.findall(r"grep -vE '\^\(([^)]*)\)=='", DOCKERFILE)
    assert len(left_out) == 2
    assert "torch" not in left_out[0].split("|")
    assert "torch" in left_out[1].split("|")
    locked = set(re.findall(r"^([\w-]+)==", (ROOT / "requirements/runtime.lock").read_text(), re.MULTILINE))
    assert {name for names in left_out for name in names.split("|")} <= locked


@pytest.mark.service
def test_the_api_needs_none_of_the_packages_that_its_image_leaves_out() -> None:
    left_out = [
        name.replace("-", "_") for names in re.findall(r"\^\(([^)]*)\)==", DOCKERFILE) for name in names.split("|")
    ]
    code = (
        f"import sys\nfor name in {left_out!r}: sys.modules[name] = None\nimport app.main, app.dispatcher, app.migrate"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", ["runtime.lock", "dev.lock"])
def test_a_lock_pins_exactly_and_fits_every_machine(name: str) -> None:
    lines = [line for line in (ROOT / "requirements" / name).read_text().splitlines() if not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[a-z0-9.-]+==[a-zA-Z0-9.]+( ; python_full_version < \"3\.11\.\d+\")?", line), line
        assert not line.startswith(("nvidia-", "cuda-", "triton"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[><=\[]", need)[0].lower() for need in project["dependencies"]}
    assert {need.replace("_", "-") for need in wanted} <= {line.partition("==")[0] for line in lines}
    assert set(project["optional-dependencies"]["embedded"]) <= set(lines)


def test_the_image_gets_what_the_code_imports_and_nothing_of_the_machine() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*"
    copied = set(re.findall(r"^COPY (\S+) \1$", DOCKERFILE, re.MULTILINE))
    assert copied == {"app", "workers", "migrations"}
    assert {f"!{folder}" for folder in copied} <= set(ignored)
