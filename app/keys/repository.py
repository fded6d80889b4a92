"""SQL of API keys."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import bindparam, func, select, update
from sqlalchemy.orm import Session

from app.keys.models import ApiKey


def insert(session: Session, key: ApiKey) -> ApiKey:
    """Store a key and read back what the database filled in."""
    session.add(key)
    session.flush()
    session.refresh(key)
    return key


def list_all(session: Session) -> list[ApiKey]:
    """Every key, oldest first."""
    return list(session.scalars(select(ApiKey).order_by(ApiKey.id)))


@dataclass(frozen=True)
class KnownKey:
    """What every request asks of its key; times are compared by the database's clock."""

    id: str
    tenant_id: str
    scopes: list[str]
    is_revoked: bool
    has_expired: bool


_FIND_BY_HASH = select(
    ApiKey.id,
    ApiKey.tenant_id,
    ApiKey.scopes,
    ApiKey.revoked_at.is_not(None),
    func.coalesce(ApiKey.expires_at <= func.now(), False),
).where(ApiKey.key_sha256 == bindparam("key_sha256"))


def find_by_hash(session: Session, key_sha256: str) -> KnownKey | None:
    """The key with this hash."""
    row = session.execute(_FIND_BY_HASH, {"key_sha256": key_sha256}).one_or_none()
    return KnownKey(*row) if row is not None else None


def revoke(session: Session, key_id: str) -> ApiKey | None:
    """Revoke a key; one that is revoked keeps its time. None when there is no such key."""
    return session.scalar(
        update(ApiKey)
        .where(ApiKey.id == key_id)
        .values(revoked_at=func.coalesce(ApiKey.revoked_at, func.now()))
        .returning(ApiKey)
    )
