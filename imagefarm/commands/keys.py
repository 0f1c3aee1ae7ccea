"""`imagefarm key`: API keys, made where the database is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click
from sqlalchemy import Connection, func, select, update

from imagefarm.console import FarmGroup, plain_table, say, show
from imagefarm.farm_files import database_settings
from shared import tenants
from shared.database import open_engine, transaction
from shared.errors import NotFound
from shared.models import ApiKey, Tenant


@contextmanager
def _database() -> Iterator[Connection]:
    engine = open_engine(database_settings(), "imagefarm key", pool_size=1)
    try:
        with transaction(engine) as connection:
            yield connection
    finally:
        engine.dispose()


@click.group(cls=FarmGroup)
def key() -> None:
    """Make, list and revoke API keys (needs DATABASE_URL).

    A key speaks for a tenant: it sees that tenant's batches and nothing else.
    An operator's key may also control the farm.
    """


@key.command()
@click.option("--tenant", required=True, help="Whom the key speaks for; made if it does not exist.")
@click.option("--name", default="", help="What the key is for.")
@click.option("--weight", type=click.FloatRange(0, min_open=True), default=1.0, help="Share of a new tenant.")
@click.option("--operator", is_flag=True, help="May also stop models and tenants, set caps and drain workers.")
def create(tenant: str, name: str, weight: float, operator: bool) -> None:
    """Make a key and print it. It cannot be shown again.

    \b
    imagefarm key create --tenant alice --name laptop
    """
    with _database() as connection:
        tenant_id = tenants.ensure_tenant(connection, tenant, weight)
        made = tenants.create_key(connection, tenant_id, name, operator=operator)
    say(f"a key for {tenant}; it is not stored and cannot be shown again:", "dim")
    click.echo(made)


@key.command("list")
def list_keys() -> None:
    """List the keys, by the part of them that is no secret."""
    table = plain_table("key", "tenant", "name", "operator", "created", "revoked")
    with _database() as connection:
        statement = select(ApiKey, Tenant.name.label("tenant")).join(Tenant, Tenant.id == ApiKey.tenant_id)
        for row in connection.execute(
            statement.with_only_columns(*ApiKey.__table__.columns, Tenant.name.label("tenant")).order_by(ApiKey.id)
        ):
            revoked = f"{row.revoked_at:%Y-%m-%d %H:%M}" if row.revoked_at else ""
            created, operator = f"{row.created_at:%Y-%m-%d %H:%M}", "yes" if row.operator else ""
            table.add_row(f"imf_{row.prefix}_…", row.tenant, row.name, operator, created, revoked)
    show(table)


@key.command()
@click.argument("key_or_prefix", metavar="KEY")
def revoke(key_or_prefix: str) -> None:
    """Revoke a key, at once. KEY is the key or its part before the second underscore."""
    prefix = key_or_prefix.removeprefix("imf_").split("_", 1)[0]
    with _database() as connection:
        done = connection.execute(
            update(ApiKey)
            .where(ApiKey.prefix == prefix)
            .values(revoked_at=func.coalesce(ApiKey.revoked_at, func.clock_timestamp()))
        )
        if not done.rowcount:
            raise NotFound(f"there is no key imf_{prefix}_…; `imagefarm key list` shows those there are")
    say(f"imf_{prefix}_… is revoked")
