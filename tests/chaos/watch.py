"""Looks at the farm's rows while chaos goes on: how far it is, and how soon what a fault hit goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from sqlalchemy import Engine, bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY, BIGINT

from shared.database import transaction
from shared.errors import Unavailable
from tests.chaos.stage import Held

_TOTALS = text("""
SELECT coalesce(sum(queued + scheduled + held + rendering), 0), coalesce(sum(succeeded + failed + canceled), 0),
       (SELECT count(*) FROM batch WHERE finished_at IS NULL)
FROM batch_counter
""")
_FOLLOWED = text("SELECT id, state, lease_token::text FROM job WHERE id = ANY(:ids)").bindparams(
    bindparam("ids", type_=ARRAY(BIGINT))
)
# nobody wants to sit through minutes of back-off: the keeper finds these retries due
_SOON = text("""
UPDATE job SET run_at = clock_timestamp() + interval '1 second'
WHERE state = 'scheduled' AND run_at > clock_timestamp() + interval '2 seconds'
""")


@dataclass
class _Followed:
    kind: str
    since: float
    tokens: dict[int, str]
    #: of a fault that hit no job in particular: how many jobs had ended when it was over
    ended: int | None = None


@dataclass
class Totals:
    """Jobs that are open and that have ended, and batches that are not closed."""

    open: int = 0
    ended: int = 0
    unclosed: int = 0


@dataclass
class Watch:
    """A thread that polls; used as a context manager."""

    engine: Engine
    totals: Totals = field(default_factory=Totals)
    #: seconds until the jobs that a fault hit went on, by kind of fault
    recoveries: dict[str, list[float]] = field(default_factory=dict)
    #: when the number of ended jobs last grew
    progress_at: float = field(default_factory=time.monotonic)

    def __enter__(self) -> Watch:
        self._followed: list[_Followed] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join(20)

    def follow(self, kind: str, since: float, held: Sequence[Held]) -> None:
        """Note when the first of these jobs is claimed anew or ends; without any, when the farm's next job ends."""
        followed = _Followed(kind, since, {each.job_id: each.token for each in held})
        if not held:
            followed.ended = self.totals.ended
            if not self.totals.open:
                return
        with self._lock:
            self._followed.append(followed)

    def _run(self) -> None:
        rounds = 0
        while not self._closing.wait(0.1):
            rounds += 1
            try:
                with transaction(self.engine) as connection:
                    totals = Totals(*map(int, connection.execute(_TOTALS).one()))
                    if rounds % 10 == 0:
                        connection.execute(_SOON)
                    with self._lock:
                        ids = [job_id for each in self._followed for job_id in each.tokens]
                    rows = connection.execute(_FOLLOWED, {"ids": ids}).all() if ids else []
            except Unavailable:
                continue
            if totals.ended != self.totals.ended:
                self.progress_at = time.monotonic()
            self.totals = totals
            self._note({row.id: (row.state, row.lease_token) for row in rows})

    def _note(self, jobs: dict[int, tuple[str, str | None]]) -> None:
        now = time.monotonic()
        with self._lock:
            for each in self._followed:
                moved = any(_moved(token, *jobs[job_id]) for job_id, token in each.tokens.items() if job_id in jobs)
                if moved or (each.ended is not None and self.totals.ended > each.ended):
                    self.recoveries.setdefault(each.kind, []).append(now - each.since)
                    each.kind = ""
            self._followed = [each for each in self._followed if each.kind]


def _moved(token: str, state: str, now_held: str | None) -> bool:
    return state in ("succeeded", "failed", "canceled") or (now_held is not None and now_held != token)
