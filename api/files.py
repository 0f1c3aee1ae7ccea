"""Serves the links that file storage makes. S3 serves its own."""

from __future__ import annotations

from flask import Flask, Response, request

from api.context import context
from shared.errors import NotFound
from shared.storage import inline
from shared.storage.file import FileStorage

_SECONDS = 300


def install(app: Flask) -> None:
    """Add the route of the links."""
    app.add_url_rule("/files/<path:key>", "files", _serve)


def _serve(key: str) -> Response:
    """One stored object, to whoever holds a link to it. The link fixes its type and name."""
    storage = context().services.storage
    if not isinstance(storage, FileStorage):
        raise NotFound
    link = storage.verify(key, request.args)
    return Response(
        storage.get(key),
        content_type=link.content_type,
        headers={
            "Content-Disposition": inline(link.filename),
            "Content-Security-Policy": "default-src 'none'; sandbox",
            "Cache-Control": f"private, max-age={_SECONDS}",
        },
    )
