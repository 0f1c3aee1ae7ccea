"""Tenants and their API keys. A key is shown once; the database keeps a prefix to find it and a SHA-256 to prove it."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

from sqlalchemy import Connection, select
from sqlalchemy.dialects.postgresql import insert

from shared.errors import FarmError
from shared.models import ApiKey, Tenant
from shared.specs import text_fault

_KEY = re.compile(r"imf_([a-z0-9]{12})_([A-Za-z0-9_-]{43})")
_MAX_NAME = 200
#: shares further apart would leave nothing of one job's effort in the digits of a clock
_LEAST_WEIGHT = 0.001
_NOBODY = hashlib.sha256(b"no such key").digest()


@dataclass(frozen=True)
class TenantIdentity:
    """Whom a request speaks for."""

    id: int
    name: str
    weight: float
    #: may speak for the whole farm
    operator: bool = False


@dataclass(frozen=True)
class TenantView:
    """A tenant as operators see it."""

    name: str
    weight: float
    paused: bool
    max_in_flight: int | None


def all_tenants(connection: Connection) -> list[TenantView]:
    """Every tenant, by name."""
    statement = select(Tenant.name, Tenant.weight, Tenant.paused_at.is_not(None), Tenant.max_in_flight)
    return [TenantView(*row) for row in connection.execute(statement.order_by(Tenant.name))]


def ensure_tenant(connection: Connection, name: str, weight: float = 1.0) -> int:
    """The id of the tenant of this name, made if need be. Raises `FarmError`."""
    if not 0 < len(name.strip()) <= _MAX_NAME or text_fault(name):
        raise FarmError(f"a tenant needs a name of 1 to {_MAX_NAME} characters of valid text")
    if not _LEAST_WEIGHT <= weight <= 1 / _LEAST_WEIGHT:  # NaN is not, either; it would stop the clock of everybody
        raise FarmError(f"a weight must be from {_LEAST_WEIGHT} to {1 / _LEAST_WEIGHT:g}")
    connection.execute(insert(Tenant).values(name=name, weight=weight).on_conflict_do_nothing())
    return connection.execute(select(Tenant.id).where(Tenant.name == name)).scalar_one()


def create_key(connection: Connection, tenant_id: int, name: str, *, operator: bool = False) -> str:
    """A new key for a tenant, in clear. This is the only time that it can be seen. Raises `FarmError`."""
    if len(name) > _MAX_NAME or text_fault(name):
        raise FarmError(f"the name of a key must have at most {_MAX_NAME} characters of valid text")
    prefix = "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(12))
    key = f"imf_{prefix}_{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(key.encode()).digest()
    row = {"tenant_id": tenant_id, "name": name, "prefix": prefix, "sha256": digest, "operator": operator}
    connection.execute(insert(ApiKey).values(**row))
    return key


def authenticate(connection: Connection, key: str) -> TenantIdentity | None:
    """The tenant of a key, or None. Takes the same path for unknown, wrong and revoked keys."""
    match = _KEY.fullmatch(key)
    row = connection.execute(
        select(Tenant.id, Tenant.name, Tenant.weight, ApiKey.operator, ApiKey.sha256)
        .join(ApiKey, ApiKey.tenant_id == Tenant.id)
        .where(ApiKey.prefix == (match[1] if match else ""), ApiKey.revoked_at.is_(None))
    ).one_or_none()
    expected = row.sha256 if row else _NOBODY
    if not hmac.compare_digest(hashlib.sha256(key.encode()).digest(), expected) or row is None:
        return None
    return TenantIdentity(row.id, row.name, row.weight, row.operator)
