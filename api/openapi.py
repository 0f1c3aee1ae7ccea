"""The description of the API: OpenAPI 3.1 at `/openapi.json`, and a page to read it at `/docs`, all from here."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flask import Response, send_from_directory
from flask_openapi3.models.info import Info
from flask_openapi3.openapi import OpenAPI

from api.auth import SCHEME
from api.problems import Problem

#: what the application is made with
DESCRIPTION: dict[str, Any] = {
    "info": Info(title="imagefarm", version="1", description="A self-hosted render farm for AI images."),
    "security_schemes": {SCHEME: {"type": "http", "scheme": "bearer", "description": "A key: `imf_…`"}},
    "validation_error_model": Problem,
    # the library's own pages would be more than one and looser in what they load
    "doc_ui": False,
}

# styles are set by script; nothing else leaves this server, whatever the page would like to load
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SCRIPT = "scalar.standalone.js"
_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>imagefarm API</title></head>
<body>
<script id="api-reference" data-url="/openapi.json" data-configuration='{configuration}'></script>
<script src="/docs/{script}"></script>
</body>
</html>
"""
_CONFIGURATION = {
    "withDefaultFonts": False,
    "telemetry": False,
    "hideClientButton": True,
    "showDeveloperTools": "never",
    "agent": {"disabled": True},
    "mcp": {"disabled": True},
}


def install(app: OpenAPI) -> None:
    """Add the document and the page, which need no key."""
    app.add_url_rule("/openapi.json", "openapi", lambda: _document(app))
    app.add_url_rule("/docs", "docs", _page)
    app.add_url_rule(f"/docs/{_SCRIPT}", "docs_script", _script)


def _document(app: OpenAPI) -> Response:
    return Response(json.dumps(app.api_doc), content_type="application/json")


def _page() -> Response:
    page = _PAGE.format(configuration=json.dumps(_CONFIGURATION), script=_SCRIPT)
    return Response(page, content_type="text/html; charset=utf-8", headers={"Content-Security-Policy": _POLICY})


def _script() -> Response:
    """The reader of the page, as the flask-openapi3-scalar package carries it."""
    package = find_spec("flask_openapi3_scalar")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "templates" / "scalar" / "js"
    return send_from_directory(folder, _SCRIPT, max_age=86_400, mimetype="text/javascript")
