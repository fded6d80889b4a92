"""SQL of API keys."""

from __future__ import annotations

from sqlalchemy import func, select, update
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


def find_by_hash(session: Session, key_sha256: str) -> tuple[ApiKey, bool] | None:
    """The key with this hash, and whether it has expired by the database's clock."""
    has_expired = func.coalesce(ApiKey.expires_at <= func.now(), False)
    row = session.execute(select(ApiKey, has_expired).where(ApiKey.key_sha256 == key_sha256)).one_or_none()
    return (row[0], row[1]) if row is not None else None


def revoke(session: Session, key_id: str) -> ApiKey | None:
    """Revoke a key; one that is revoked keeps its time. None when there is no such key."""
    return session.scalar(
        update(ApiKey)
        .where(ApiKey.id == key_id)
        .values(revoked_at=func.coalesce(ApiKey.revoked_at, func.now()))
        .returning(ApiKey)
    )
