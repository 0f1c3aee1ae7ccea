"""The circuit breaker of each model: after equal failures in a row a worker leaves the model alone for a while.

A vendor that is down, a disk that is full or a driver gone mad would otherwise burn the tries of job after job.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

from shared.settings import Settings
from shared.states import Outcome

logger = logging.getLogger(__name__)

#: what says something about the worker or the vendor; other failures say something about the job
_TELLING = frozenset({Outcome.TRANSIENT})
_LONGEST = 16


@dataclass
class _Record:
    error_class: str = ""
    in_a_row: int = 0
    rests: int = 0
    until: float = 0.0


class Breaker:
    """Counts failures by model. Its methods may be called from any thread."""

    def __init__(self, settings: Settings) -> None:
        self._limit = settings.breaker_failures
        self._seconds = settings.breaker_seconds
        self._lock = threading.Lock()
        self._records: dict[str, _Record] = {}

    def succeeded(self, model: str) -> None:
        """The model works: forget what was."""
        with self._lock:
            self._records.pop(model, None)

    def failed(self, model: str, outcome: Outcome, error_class: str) -> None:
        """One job failed; enough equal failures in a row, or the first one after a rest, begin a rest."""
        if outcome not in _TELLING:
            return
        with self._lock:
            record = self._records.setdefault(model, _Record())
            record.in_a_row = record.in_a_row + 1 if record.error_class == error_class else 1
            record.error_class = error_class
            if record.in_a_row < self._limit and not record.rests:
                return
            if record.until > time.monotonic():
                return
            rest = self._seconds * min(2**record.rests, _LONGEST)
            record.until = time.monotonic() + rest
            record.rests += 1
        logger.error("%s failed %d times in a row (%s): resting for %.0f s", model, record.in_a_row, error_class, rest)

    def rests(self, model: str) -> bool:
        """Whether the model is left alone now."""
        with self._lock:
            record = self._records.get(model)
            return record is not None and record.until > time.monotonic()

    def tries(self, model: str) -> bool:
        """Whether the model has rested and has not succeeded since: one job at a time is enough to find out."""
        with self._lock:
            record = self._records.get(model)
            return record is not None and record.rests > 0

    def view(self) -> dict[str, Any]:
        """What operators see: the resting models, why, and for how many seconds yet."""
        now = time.monotonic()
        with self._lock:
            return {
                model: {"error_class": record.error_class, "failures": record.in_a_row, "seconds": round(left, 1)}
                for model, record in self._records.items()
                if (left := record.until - now) > 0
            }
