"""imagefarm's own language: batches, jobs, models, workers and queues below `/api/v1`."""

from __future__ import annotations

from flask_openapi3.openapi import OpenAPI

from api.dialects.native import batches, fleet, jobs, operators, queues


def register(app: OpenAPI) -> None:
    """Add the routes of the native dialect."""
    for part in (batches, jobs, fleet, queues, operators):
        app.register_api(part.blueprint)
