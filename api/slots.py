"""Keeps slow clients from taking every thread: a bounded number of places for one kind of waiting."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Slots:
    """At most `limit` threads wait at a time, and at most three quarters of them for one tenant."""

    def __init__(self, limit: int) -> None:
        self._limit = max(1, limit)
        self._share = max(1, limit * 3 // 4)
        self._held: Counter[int] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def hold(self, tenant_id: int) -> Iterator[bool]:
        """Take a place for the block, if there is one now: the value says so. Never waits."""
        with self._lock:
            free = self._held.total() < self._limit and self._held[tenant_id] < self._share
            if free:
                self._held[tenant_id] += 1
        try:
            yield free
        finally:
            if free:
                with self._lock:
                    self._held[tenant_id] -= 1
                    if not self._held[tenant_id]:
                        del self._held[tenant_id]
