"""Who is asking: API keys as bearer tokens, checked before anything of a request is read."""

from __future__ import annotations

from typing import Any

from flask import g, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

from api.context import context
from api.problems import documented
from shared import tenants
from shared.database import transaction
from shared.errors import Forbidden, Unauthenticated
from shared.tenants import TenantIdentity

#: name of the security scheme in the OpenAPI document
SCHEME = "key"


def guarded_blueprint(name: str, import_name: str, *, url_prefix: str, tag: Tag, **options: Any) -> APIBlueprint:
    """A blueprint whose routes all need a key."""
    blueprint = APIBlueprint(
        name,
        import_name,
        url_prefix=url_prefix,
        abp_tags=[tag],
        abp_security=[{SCHEME: []}],
        abp_responses=documented("unauthenticated", "invalid", "unavailable"),
        **options,
    )
    blueprint.before_request(_require_key)
    return blueprint


def tenant() -> TenantIdentity:
    """Whom this request speaks for."""
    found: TenantIdentity = g.tenant
    return found


def require_operator() -> None:
    """Raise `Forbidden` where the key speaks for a tenant only."""
    if not tenant().operator:
        raise Forbidden


def _require_key() -> None:
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthenticated
    with transaction(context().services.engine) as connection:
        found = tenants.authenticate(connection, key.strip())
    if found is None:
        raise Unauthenticated("This API key is not known, or was revoked.")
    g.tenant = found
