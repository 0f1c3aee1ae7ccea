"""What only operators may do: stop models and tenants, set caps, drain workers."""

from __future__ import annotations

from flask import Response
from flask_openapi3.models.tag import Tag
from pydantic import ConfigDict, Field

from api.answers import Answer
from api.auth import guarded_blueprint, require_operator
from api.context import context
from api.dialects.native import schemas
from api.parameters import NoQuery, Parameters
from api.problems import documented
from shared import control, tenants
from shared.database import transaction
from shared.specs import StorableText

blueprint = guarded_blueprint(
    "operators", __name__, url_prefix=schemas.PREFIX, tag=Tag(name="operators", description="Needs an operator's key")
)


class TenantPath(Parameters):
    """Names a tenant."""

    name: StorableText


class WorkerPath(Parameters):
    """Names a worker."""

    worker_id: StorableText


class WorkerChange(Parameters):
    """What to change about a worker."""

    draining: bool = Field(strict=True, description="Whether it claims nothing more.")


class TenantChange(Parameters):
    """What to change about a tenant; what is left out stays."""

    paused: bool | None = Field(None, strict=True, description="Whether its jobs are set aside.")
    max_in_flight: int | None = Field(
        None,
        strict=True,
        ge=1,
        le=2**31 - 1,
        description="Most jobs of a model queued or rendered at a time; null: any.",
    )


class WorkerChanged(Answer):
    """How a worker stands now."""

    id: str
    draining: bool


class Tenant(Answer):
    """A tenant."""

    model_config = ConfigDict(from_attributes=True)

    name: str
    weight: float
    paused: bool
    max_in_flight: int | None


class TenantList(Answer):
    """All tenants."""

    data: list[Tenant]


_FORBIDDEN = documented("forbidden", "not-found")


@blueprint.get("/tenants", operation_id="list_tenants", responses={200: TenantList, **documented("forbidden")})
def list_tenants(query: NoQuery) -> Response:
    """List the tenants."""
    require_operator()
    with transaction(context().services.engine) as connection:
        found = tenants.all_tenants(connection)
    return TenantList(data=[Tenant.model_validate(one) for one in found]).response()


@blueprint.patch("/tenants/<name>", operation_id="change_tenant", responses={200: Tenant, **_FORBIDDEN})
def change_tenant(path: TenantPath, query: NoQuery, body: TenantChange) -> Response:
    """Pause a tenant or let it go on; set or lift its cap."""
    require_operator()
    services = context().services
    capping = "max_in_flight" in body.model_fields_set
    control.set_tenant(
        services,
        path.name,
        paused=body.paused,
        max_in_flight=body.max_in_flight,
        uncap=capping and body.max_in_flight is None,
    )
    with transaction(services.engine) as connection:
        found = next(one for one in tenants.all_tenants(connection) if one.name == path.name)
    return Tenant.model_validate(found).response()


@blueprint.patch("/workers/<worker_id>", operation_id="change_worker", responses={200: WorkerChanged, **_FORBIDDEN})
def change_worker(path: WorkerPath, query: NoQuery, body: WorkerChange) -> Response:
    """Let a worker claim nothing more, or again. What it renders now is finished."""
    require_operator()
    control.drain_worker(context().services, path.worker_id, body.draining)
    return WorkerChanged(id=path.worker_id, draining=body.draining).response()
