"""One file a row: `measure() -> Row`. Adding a row is adding a file."""

from __future__ import annotations

import importlib
import pkgutil

from benchmarks.measure import Row


def known_rows() -> list[str]:
    """The rows that can be measured, from the files in this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def measure(name: str, **options: float) -> Row:
    """Measure one row."""
    row: Row = importlib.import_module(f"{__name__}.{name}").measure(**options)
    return row
