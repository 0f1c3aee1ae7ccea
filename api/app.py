"""Puts the HTTP API together."""

from __future__ import annotations

import threading

from flask_openapi3.openapi import OpenAPI

from api import context, dialects, files, headers, health, openapi, problems
from api.bodies import StrictRequest
from shared.services import Services


class Api(OpenAPI):
    """The WSGI application."""

    request_class = StrictRequest


def create_app(services: Services, closing: threading.Event | None = None) -> Api:
    """The API over these services. `closing` is set by the server when the process is told to stop."""
    app = Api(__name__, static_folder=None, **openapi.DESCRIPTION)
    # one more than may be: where Flask cuts a body of unknown length off, it then shows that it is too large
    app.config["MAX_CONTENT_LENGTH"] = services.settings.max_body_bytes + 1
    # a path means one thing: no redirects to the same path with other slashes
    app.url_map.merge_slashes = False
    context.install(app.extensions, services, closing or threading.Event())
    headers.install(app)
    problems.install(app)
    health.install(app)
    files.install(app)
    openapi.install(app)
    for dialect in dialects.found():
        dialect.register(app)
    return app
