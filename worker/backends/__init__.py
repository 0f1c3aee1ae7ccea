"""Engines that turn specs into pictures: the contract, and the lookup by name.

The folder is the registry: `worker/backends/<name>.py` holds `class Backend`. A backend knows no row, queue, bucket or
web request; it imports neither SQLAlchemy nor Celery nor another backend. Errors of an engine or vendor stop here: what
leaves a backend is a `shared.errors.RenderError` or whatever `on_step` raised.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL.Image import Image

from shared.catalogue import ModelEntry
from shared.errors import CatalogueError
from shared.settings import Settings
from shared.specs import RenderSpec

#: called after each step with (steps done, steps in all); raises `Canceled` or `Interrupted` to leave the pass
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Rendered:
    """One finished picture and what the engine has to say about it (a vendor's `revised_prompt`, usage …)."""

    image: Image
    notes: dict[str, Any] = field(default_factory=dict)


class Backend(Protocol):
    """One engine serving one model of the catalogue."""

    def __init__(self, entry: ModelEntry, settings: Settings) -> None:
        """Remember the entry; do nothing heavy. `settings` gives what an engine may need (vendor keys, downloads)."""

    def load(self) -> None:
        """Bring the model into memory. Raises `Permanent` (reason `model_missing`, `model_corrupt` …)."""

    def render(self, specs: Sequence[RenderSpec], on_step: OnStep) -> list[Rendered]:
        """Render specs of one batch key in one pass; picture i belongs to spec i and depends on nothing but spec i.

        Calls `on_step` at least once. Raises `RenderError` of the class that fits, or what `on_step` raised; after
        either, the next call works.
        """

    def unload(self) -> None:
        """Give the memory back. `load` may follow."""

    def max_batch(self, spec: RenderSpec) -> int:
        """Most images like `spec` that one pass may hold."""


def backends() -> list[str]:
    """Names of the engines in this folder, without importing any."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def open_backend(entry: ModelEntry, settings: Settings) -> Backend:
    """The engine that serves `entry`, not yet loaded."""
    if entry.backend not in backends():
        raise CatalogueError(f"backend {entry.backend!r} is unknown; known are {', '.join(backends())}")
    backend: Backend = importlib.import_module(f"worker.backends.{entry.backend}").Backend(entry, settings)
    return backend
