"""API keys: made and shown once, stored as a hash, looked up by it."""

from __future__ import annotations

import hashlib
import re
import secrets

from sqlalchemy.orm import Session
from ulid import ULID

from app.errors import InvalidRequestError, NotFoundError, UnauthorizedError
from app.keys import repository
from app.keys.models import ApiKey
from app.keys.repository import KnownKey

DEFAULT_TENANT = "default"

_SECRET = re.compile(r"attar_[A-Za-z0-9_-]{43}")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PREFIX_CHARACTERS = 12


def create(session: Session, name: str, tenant_id: str = DEFAULT_TENANT) -> tuple[ApiKey, str]:
    """A new key of a tenant, and the secret itself, which nobody can read again."""
    if not name.strip() or len(name) > 200 or not name.isprintable():
        raise InvalidRequestError("invalid_name", "A key's name is 1 to 200 printable characters.", param="name")
    if not _TENANT.fullmatch(tenant_id):
        raise InvalidRequestError(
            "invalid_tenant", "A tenant is 1 to 64 letters, digits, dots, dashes and underscores.", param="tenant_id"
        )
    secret = "attar_" + secrets.token_urlsafe(32)
    key = ApiKey(
        id=f"key_{ULID()}",
        tenant_id=tenant_id,
        name=name,
        prefix=secret[:_PREFIX_CHARACTERS],
        key_sha256=_hashed(secret),
        scopes=[],
    )
    return repository.insert(session, key), secret


def list_keys(session: Session) -> list[ApiKey]:
    """Every key of every tenant, oldest first."""
    return repository.list_all(session)


def revoke(session: Session, key_id: str) -> ApiKey:
    """Make a key useless from now on."""
    key = repository.revoke(session, key_id)
    if key is None:
        raise NotFoundError("key_not_found", f"There is no key {key_id}.")
    return key


def authenticate(session: Session, secret: str) -> KnownKey:
    """The key that ``secret`` is; raises UnauthorizedError for one that is unknown, revoked or expired."""
    key = repository.find_by_hash(session, _hashed(secret)) if _SECRET.fullmatch(secret) else None
    if key is None:
        raise _unauthorized("invalid_api_key", "The API key is not valid.")
    if key.is_revoked:
        raise _unauthorized("revoked_api_key", "The API key has been revoked.")
    if key.has_expired:
        raise _unauthorized("expired_api_key", "The API key has expired.")
    return key


def _unauthorized(code: str, message: str) -> UnauthorizedError:
    return UnauthorizedError(
        code,
        message,
        hint="`attar keys create NAME` makes a key.",
        headers={"WWW-Authenticate": 'Bearer error="invalid_token"'},
    )


def _hashed(secret: str) -> str:
    # 256 random bits need no salt and no slow hash.
    return hashlib.sha256(secret.encode()).hexdigest()
