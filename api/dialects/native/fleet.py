"""What this farm can render, and who renders it."""

from __future__ import annotations

from flask import Response
from flask_openapi3.models.tag import Tag

from api.auth import guarded_blueprint, require_operator, tenant
from api.context import context
from api.dialects.native import fleet_schemas, schemas
from api.dialects.native.fleet_schemas import Model, Worker
from api.parameters import NoQuery
from api.problems import documented
from shared import control, progress
from shared.database import transaction
from shared.errors import NotFound

blueprint = guarded_blueprint(
    "fleet", __name__, url_prefix=schemas.PREFIX, tag=Tag(name="fleet", description="Models and workers")
)


@blueprint.get("/models", operation_id="list_models", responses={200: fleet_schemas.ModelList})
def list_models(query: NoQuery) -> Response:
    """List the models."""
    served = _served()
    data = [Model.of(entry, entry.name in served) for entry in context().services.catalogue.values()]
    return fleet_schemas.ModelList(data=data).response()


@blueprint.get("/models/<name>", operation_id="get_model", responses={200: Model, **documented("not-found")})
def get_model(path: schemas.ModelPath, query: NoQuery) -> Response:
    """See what a model takes."""
    entry = context().services.catalogue.get(path.name)
    if entry is None:
        raise NotFound("There is no such model.")
    return Model.of(entry, entry.name in _served()).response()


@blueprint.patch(
    "/models/<name>",
    operation_id="change_model",
    responses={200: fleet_schemas.ModelChanged, **documented("forbidden", "not-found")},
)
def change_model(path: schemas.ModelPath, query: NoQuery, body: fleet_schemas.ModelChange) -> Response:
    """Stop or go on rendering with a model, everywhere. New batches for it are taken and wait."""
    require_operator()
    if path.name not in context().services.catalogue:
        raise NotFound("There is no such model.")
    control.pause_model(context().services, path.name, body.paused)
    return fleet_schemas.ModelChanged(name=path.name, paused=body.paused).response()


@blueprint.get("/workers", operation_id="list_workers", responses={200: fleet_schemas.WorkerList})
def list_workers(query: NoQuery) -> Response:
    """List the workers, the living ones first."""
    services = context().services
    with transaction(services.engine) as connection:
        views = progress.workers(connection, lease_seconds=services.settings.lease_seconds)
    return fleet_schemas.WorkerList(data=[Worker.of(view, for_operator=tenant().operator) for view in views]).response()


def _served() -> set[str]:
    services = context().services
    with transaction(services.engine) as connection:
        return progress.served_models(connection, lease_seconds=services.settings.lease_seconds)
