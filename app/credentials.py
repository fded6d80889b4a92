"""The key that `attar serve` makes for the person who starts it, kept where the command line finds it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from app.files import write_private

if TYPE_CHECKING:
    from app.database import Database

KEY_NAME = "made by attar serve"


@dataclass(frozen=True)
class Credentials:
    """A service's address and a key for it."""

    url: str
    api_key: str


def credentials_file(home: Path) -> Path:
    """Where the credentials of a home lie."""
    return home / "credentials.json"


def read_credentials(home: Path) -> Credentials | None:
    """The credentials of a home; None where there are none that can be read."""
    try:
        data = json.loads(credentials_file(home).read_text())
        return Credentials(str(data["url"]), str(data["api_key"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def ensure_credentials(home: Path, database: Database, url: str) -> Credentials:
    """Keep the key of an earlier start where the database still accepts it, else make one; note the address."""
    # Imported here, as the command line reads credentials and needs no database for that.
    from app.errors import UnauthorizedError
    from app.keys import service as keys

    known = read_credentials(home)
    with database.transaction() as session:
        api_key = known.api_key if known is not None else ""
        try:
            keys.authenticate(session, api_key)
        except UnauthorizedError:
            _, api_key = keys.create(session, KEY_NAME)
    credentials = Credentials(url, api_key)
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(credentials_file(home), json.dumps(asdict(credentials)))
    return credentials
