"""imagefarm's own language: batches, jobs, models and workers below `/api/v1`."""

from __future__ import annotations

from flask_openapi3.openapi import OpenAPI

from api.dialects.native import batches, fleet, jobs


def register(app: OpenAPI) -> None:
    """Add the routes of the native dialect."""
    for part in (batches, jobs, fleet):
        app.register_api(part.blueprint)
