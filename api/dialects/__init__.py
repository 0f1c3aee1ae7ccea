"""The languages that the API speaks. Each module or package in this folder is one, and has `register(app)`.

`register` adds the dialect's blueprints, made by `api.auth.guarded_blueprint`, with `app.register_api`. A dialect
translates only: what it does is `shared.plan`, `shared.submit`, `shared.progress` and `shared.control`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Protocol, cast

from flask_openapi3.openapi import OpenAPI


class Dialect(Protocol):
    """One language of the API."""

    def register(self, app: OpenAPI) -> None:
        """Add the routes of this dialect."""


def found() -> Iterator[Dialect]:
    """Every dialect of this folder, by name."""
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        yield cast(Dialect, importlib.import_module(f"{__name__}.{module.name}"))
