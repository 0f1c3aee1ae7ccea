"""Headers that every answer carries, and the request id that ties an answer to the log."""

from __future__ import annotations

import re
import uuid

from flask import Flask, Response, g, request

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

_DEFAULTS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


def install(app: Flask) -> None:
    """Add the headers to every answer of `app`."""
    app.before_request(_name_request)
    app.after_request(_add)


def _name_request() -> None:
    given = request.headers.get("X-Request-ID", "")
    g.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _add(response: Response) -> Response:
    response.headers["X-Request-ID"] = g.request_id
    for name, value in _DEFAULTS.items():
        response.headers.setdefault(name, value)
    return response
