"""Which service the command line talks to, and as whom."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from app.cli.output import Failed
from app.client import Client
from app.credentials import read_credentials
from app.settings import get_settings

if TYPE_CHECKING:
    from app.database import Database

DEFAULT_URL = "http://127.0.0.1:8000"


def open_client() -> Client:
    """A client of the service that the environment names, else of the one that `attar serve` started here."""
    url, api_key = os.environ.get("ATTAR_URL"), os.environ.get("ATTAR_API_KEY")
    kept = read_credentials(get_settings().home)
    if kept is not None:
        url = url or kept.url
        # The key of the service on this machine is nobody else's business.
        if not api_key and url.rstrip("/") == kept.url:
            api_key = kept.api_key
    return Client(url or DEFAULT_URL, api_key)


@contextmanager
def open_database() -> Iterator[Database]:
    """The database of the settings, else the one of a running `attar serve`."""
    from sqlalchemy.exc import ProgrammingError

    from app.database import Database
    from app.local import running_servers

    settings = get_settings()
    url = settings.database_url
    if url is None:
        servers = running_servers(settings.home)
        if servers is None:
            raise Failed(
                "there is no database to work on",
                code="no_database",
                exit_code=2,
                hint="set ATTAR_DATABASE_URL, or start `attar serve` in another terminal",
            )
        url = servers.database_url
    database = Database(url, pool_size=1)
    try:
        yield database
    except ProgrammingError as error:
        raise Failed(
            "the database has not Attar's tables",
            code="not_migrated",
            exit_code=2,
            hint="run `attar migrate` with the same ATTAR_DATABASE_URL",
        ) from error
    finally:
        database.dispose()
