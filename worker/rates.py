"""How fast this worker renders each model, smoothed over its latest passes."""

from __future__ import annotations

import threading

#: weight of the latest pass
_SHARE = 0.2


class Rates:
    """Exponentially weighted means by model. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rates: dict[str, dict[str, float]] = {}

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
