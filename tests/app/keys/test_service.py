"""Keys: shown once, kept as a hash, revoked for good."""

import re

import pytest
from sqlalchemy import text

from app.database import Database
from app.errors import InvalidRequestError, NotFoundError
from app.keys import service as keys


def test_a_key_is_shown_once_and_never_stored(database: Database) -> None:
    with database.transaction() as session:
        key, secret = keys.create(session, "laptop", "team-a")
    assert re.fullmatch(r"attar_[A-Za-z0-9_-]{43}", secret)
    with database.transaction() as session:
        row = session.execute(text("SELECT api_keys::text FROM api_keys WHERE id = :id"), {"id": key.id}).scalar_one()
        found = keys.authenticate(session, secret)
    assert secret not in row
    assert (found.id, found.tenant_id) == (key.id, "team-a")
    assert key.name == "laptop"
    assert secret.startswith(key.prefix)


def test_keys_are_listed_oldest_first(database: Database) -> None:
    with database.transaction() as session:
        made = [keys.create(session, name)[0].id for name in ("first", "second")]
        listed = [key.id for key in keys.list_keys(session)]
    assert [key_id for key_id in listed if key_id in made] == sorted(made)


def test_revoking_twice_keeps_the_first_time(database: Database) -> None:
    with database.transaction() as session:
        key, _ = keys.create(session, "old")
    with database.transaction() as session:
        first = keys.revoke(session, key.id).revoked_at
    with database.transaction() as session:
        assert keys.revoke(session, key.id).revoked_at == first
    assert first is not None


def test_revoking_an_unknown_key_says_so(database: Database) -> None:
    with database.transaction() as session, pytest.raises(NotFoundError) as caught:
        keys.revoke(session, "key_x")
    assert caught.value.code == "key_not_found"


@pytest.mark.parametrize(("name", "tenant"), [("", "a"), (" ", "a"), ("a\nb", "a"), ("a", ""), ("a", "../b")])
def test_odd_names_and_tenants_are_refused(database: Database, name: str, tenant: str) -> None:
    with database.transaction() as session, pytest.raises(InvalidRequestError):
        keys.create(session, name, tenant)
