"""Maintenance beside the data flow: one file a service, each run every few seconds by the keeper that leads.

A service is a module with `run(services) -> int`, the number of things it put right. Adding one is adding a file.
Every service is idempotent, so that two keepers at once would be harmless; leadership only spares the database.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from shared.services import Services

Service = Callable[[Services], int]


def keeper_services() -> dict[str, Service]:
    """The services by name, from the files in this folder."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name not in {"__main__", "leader"}]
    return {name: importlib.import_module(f"{__name__}.{name}").run for name in sorted(names)}
