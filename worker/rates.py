"""How fast this worker renders each model, smoothed over its latest passes; and when it last claimed of which class."""

from __future__ import annotations

import threading
import time

#: weight of the latest pass
_SHARE = 0.2


class Rates:
    """Exponentially weighted means by model. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rates: dict[str, dict[str, float]] = {}
        self._claims: dict[tuple[str, int], float] = {}

    def note(self, model: str, images: int, work: float, seconds: float) -> None:
        """One pass of `images` with `work` in all (see `RenderSpec.work`) took `seconds`."""
        latest = {"images_per_second": images / max(seconds, 1e-6), "seconds_per_work": seconds / max(work, 1e-9)}
        with self._lock:
            known = self._rates.setdefault(model, latest)
            for name, value in latest.items():
                known[name] += _SHARE * (value - known[name])

    def view(self) -> dict[str, dict[str, float]]:
        """By model: `images_per_second` and `seconds_per_work`."""
        with self._lock:
            return {model: dict(rates) for model, rates in self._rates.items()}

    def claimed(self, model: str, priority: int) -> None:
        """Jobs of this class were claimed now."""
        with self._lock:
            self._claims[model, priority] = time.monotonic()

    def since_claims(self) -> dict[str, dict[str, float]]:
        """By model and class: seconds since the last claim."""
        found: dict[str, dict[str, float]] = {}
        now = time.monotonic()
        with self._lock:
            for (model, priority), at in self._claims.items():
                found.setdefault(model, {})[str(priority)] = round(now - at, 3)
        return found
