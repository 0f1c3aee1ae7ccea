"""Which models are in memory. One engine for each model; the least recently used goes when another must come."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict

from shared.errors import Permanent
from shared.services import Services
from worker.backends import Backend, open_backend

logger = logging.getLogger(__name__)

#: models kept in memory at a time
MAX_RESIDENT = 4


class Residency:
    """Loads engines on demand and keeps the latest ones."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._loaded: OrderedDict[str, Backend] = OrderedDict()

    def names(self) -> list[str]:
        """Models in memory, the latest last."""
        return list(self._loaded)

    def engine(self, model: str) -> Backend:
        """The loaded engine of a model. Raises `Permanent` where it cannot be loaded here."""
        if model in self._loaded:
            self._loaded.move_to_end(model)
            return self._loaded[model]
        while len(self._loaded) >= MAX_RESIDENT:
            name, oldest = self._loaded.popitem(last=False)
            logger.info("unloading %s", name)
            oldest.unload()
        started = time.monotonic()
        try:
            backend = open_backend(self._services.catalogue[model], self._services.settings)
        except ImportError as error:
            raise Permanent(
                f"the engine of {model} is not installed here: {error}; install imagefarm[worker]", code="model_missing"
            ) from error
        backend.load()
        logger.info("loaded %s in %.1f s", model, time.monotonic() - started)
        self._loaded[model] = backend
        return backend

    def clear(self) -> None:
        for backend in self._loaded.values():
            backend.unload()
        self._loaded.clear()
