"""Real parts for every test that wants them: PostgreSQL 18, Redis, a migrated database, the app, keys, a model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
import redis
from psycopg import sql
from starlette.testclient import TestClient

from app import migrate
from app.database import Database
from app.keys import service as keys
from app.local import LocalServers, start_servers
from app.main import create_app
from app.queue import worker_key
from app.settings import Settings
from tests.models import write_tiny_llama

_TEMPLATE = "attar_test_template"
# Files that take minutes begin first: two processes that share the tests by file end at about the same time then.
_LONGEST = (
    *("training/test_inequalities", "supervisor/test_resume", "tests/test_walkthrough", "training/test_kept_work"),
    *("training/test_processes", "techniques/test_iterate", "training/test_stages", "tests/app/test_serve"),
    *("workers/test_memory", "training/test_classifiers"),
    *("techniques/test_quantization_aware_finetuning", "workers/test_full_disk", "workers/test_pipeline"),
)
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServers]:
    """PostgreSQL and Redis, with a migrated database to make others from."""
    with start_servers(tmp_path_factory.mktemp("servers"), temporary=True) as running:
        _create_database(running.database_url, _TEMPLATE)
        migrate.upgrade(_with_path(running.database_url, _TEMPLATE))
        yield running


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-block Llama. Nobody writes to it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    write_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def settings(servers: LocalServers, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a service of one's own: a fresh database, an empty Redis, an empty home."""
    number = next(_numbers)
    name = f"attar_test_{number}"
    with redis.Redis.from_url(servers.redis_url) as broker:  # one for all: Celery's connections outlive a module
        broker.flushdb()
    _create_database(servers.database_url, name, template=_TEMPLATE)
    home = tmp_path_factory.mktemp(f"home-{number}")
    (home / "models").mkdir()
    return Settings(
        database_url=_with_path(servers.database_url, name),
        redis_url=servers.redis_url,
        home=home,
        model_roots=[home / "models"],
        storage_url=None,
        work_dir=home / "work",
        hub_timeout_seconds=2,
    )


@pytest.fixture(scope="module")
def database(settings: Settings) -> Iterator[Database]:
    """The service's database."""
    database = Database(settings.required_database_url)
    yield database
    database.dispose()


@pytest.fixture(scope="module")
def client(settings: Settings) -> Iterator[TestClient]:
    """The running app, without a key. It believes that the queues `cpu` and `gpu` have workers."""
    with redis.Redis.from_url(settings.required_redis_url) as broker:
        for queue in ("cpu", "gpu"):
            broker.set(worker_key(queue), "")
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def api_key(database: Database) -> str:
    """A key of the tenant `default`."""
    with database.transaction() as session:
        return keys.create(session, "tests")[1]


@pytest.fixture(scope="module")
def auth(api_key: str) -> dict[str, str]:
    """The header that carries the key."""
    return {"Authorization": f"Bearer {api_key}"}


@pytest.fixture(scope="module")
def other_auth(database: Database) -> dict[str, str]:
    """The header of another tenant."""
    with database.transaction() as session:
        return {"Authorization": f"Bearer {keys.create(session, 'tests', 'other')[1]}"}


@pytest.fixture(scope="module")
def model_id(settings: Settings, tiny_llama: Path) -> str:
    """The tiny Llama as a `file:` model of the service."""
    folder = settings.model_roots[0] / "tiny-llama"
    folder.mkdir()
    for file in tiny_llama.iterdir():
        (folder / file.name).hardlink_to(file)
    return "file:tiny-llama"


def _create_database(url: str, name: str, template: str = "template0") -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
        )


def _with_path(url: str, path: str) -> str:
    """The same server, another database of it."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{path}"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the servers, and what runs the processes of whole jobs: the quick check leaves both out.

    And put what takes longest first.
    """
    for item in items:
        if "servers" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.service)
        used = {getattr(value, "__module__", None) for value in vars(getattr(item, "module", None) or object).values()}
        if "tests.workers.attempts" in used:
            item.add_marker(pytest.mark.job)
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    path = item.path.with_suffix("").as_posix()
    return next((index for index, name in enumerate(_LONGEST) if path.endswith(name)), len(_LONGEST))
