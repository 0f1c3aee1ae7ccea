"""One chaos run: a farm, tenants, faults one after the other and beside each other, then the reckoning."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from shared.errors import Unavailable
from tests.chaos import load, reconcile
from tests.chaos.faults import FAULTS, Missed, draw
from tests.chaos.load import Ledger, Load
from tests.chaos.reconcile import Findings
from tests.chaos.stage import GRACE_SECONDS, Stage
from tests.chaos.watch import Totals, Watch

#: faults that are at work at the same time, and what lies between two starts
_AT_ONCE = 3
_PAUSE_SECONDS = (0.3, 1.2)
#: a fault that waits for work is given some so often
_NUDGE_SECONDS = 0.7
#: a farm that ends no job for so long, after all faults, has lost something
_PATIENCE_SECONDS = 60.0


@dataclass
class Outcome:
    """What a run did and what was found after it."""

    findings: Findings
    ledger: Ledger
    #: by kind
    done: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    recoveries: dict[str, list[float]] = field(default_factory=dict)
    late_results: int = 0
    #: objects of jobs that were called off or given up after the upload
    swept: int = 0
    seconds: float = 0.0

    @property
    def line(self) -> str:
        return self.findings.line(self.done.total())


#: told how far a run is: (what goes on, jobs that have ended, faults done)
OnProgress = Callable[[str, int, int], None]


def run(
    jobs: int,
    faults: int,
    seed: int,
    *,
    workers: int = 4,
    image_seconds: float = 0.1,
    logs: Path | None = None,
    on_progress: OnProgress = lambda *_: None,
) -> Outcome:
    """Play `faults` faults, drawn from `seed`, on a farm that renders `jobs` jobs."""
    started = time.monotonic()
    kinds = draw(faults, seed)
    shares = load.plan(jobs, kinds, seed, image_seconds)
    on_progress("starting a farm", 0, 0)
    with Stage(workers=workers, log_folder=logs) as stage, Watch(stage.services.engine) as watch:
        game = _Game(stage, watch, on_progress)
        with Load(stage.urls, stage.keys) as tenants:
            game.play(kinds, shares, tenants, random.Random(seed))
            stage.heal()
            game.wait_for_the_end(tenants)
        # what a zombie still has in hand comes now, and must change nothing
        for post in stage.workers:
            if not post.leave(GRACE_SECONDS + 15):
                stage.complaints.append(f"{post.name} does not end on SIGTERM")
        on_progress("reconciling", watch.totals.ended, game.done.total())
        ledger = tenants.ledger
        accepted = {name: ledger.submitted[key].size for key, name in ledger.accepted.items()}
        # nobody renders any more, so that no object is too young to be swept
        swept = stage.sweep(jobs)
        findings = reconcile.reconcile(stage.services, accepted, ledger.answers, grace=timedelta(0))
        findings.lost += [f"{key} was never accepted" for key in ledger.submitted.keys() - ledger.accepted.keys()]
        findings.other += stage.complaints + ledger.surprises
        return Outcome(
            findings,
            ledger,
            game.done,
            game.missed,
            watch.recoveries,
            stage.late_results(),
            swept,
            time.monotonic() - started,
        )


class _Game:
    def __init__(self, stage: Stage, watch: Watch, on_progress: OnProgress) -> None:
        self.done: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self._stage = stage
        self._watch = watch
        self._on_progress = on_progress
        self._lock = threading.Lock()
        #: what is still to be submitted
        self._reserve: deque[load.Submission] = deque()
        self._brought_at = 0.0

    def play(self, kinds: list[str], shares: list[list[load.Submission]], tenants: Load, dice: random.Random) -> None:
        """Each fault with its share of the load; at last the share that no fault accompanies."""
        running: list[Future[None]] = []
        self._stage.nudge = lambda: self._bring_more(tenants)
        with ThreadPoolExecutor(_AT_ONCE) as pool, self._abandoning():
            for kind, share in zip(kinds, shares, strict=False):
                # one part comes now, the other where a fault waits for work
                tenants.submit(share[:1])
                self._reserve.extend(share[1:])
                if kind in FAULTS:
                    running.append(pool.submit(self._strike, kind, dice.randrange(2**32)))
                else:
                    self._count(self.done, kind)
                self._wait(dice.uniform(*_PAUSE_SECONDS), running)
            self._reserve.extend(shares[-1])
            while not all(each.done() for each in running):
                self._wait(0.2, [])
        tenants.submit(list(self._reserve))
        for each in running:
            each.result()

    @contextmanager
    def _abandoning(self) -> Iterator[None]:
        """An interrupted run does not wait for the faults that are at work."""
        try:
            yield
        except BaseException:
            self._stage.abandon()
            raise

    def _bring_more(self, tenants: Load) -> None:
        with self._lock:
            if not self._reserve or time.monotonic() - self._brought_at < _NUDGE_SECONDS:
                return
            self._brought_at = time.monotonic()
            submission = self._reserve.popleft()
        tenants.submit([submission])

    def _wait(self, seconds: float, running: list[Future[None]]) -> None:
        """Let some time pass, and more while as many faults are at work as may be."""
        until = time.monotonic() + seconds
        while time.monotonic() < until or sum(not each.done() for each in running) >= _AT_ONCE:
            self._on_progress("breaking things", self._watch.totals.ended, self.done.total())
            self._stage.pause(0.1)

    def _strike(self, kind: str, seed: int) -> None:
        since = time.monotonic()
        try:
            struck = FAULTS[kind](self._stage, random.Random(seed))
        except (Missed, Unavailable):
            self._count(self.missed, kind)
            return
        self._watch.follow(kind, struck.at or since, struck.held)
        self._count(self.done, kind)

    def _count(self, counter: Counter[str], kind: str) -> None:
        with self._lock:
            counter[kind] += 1

    def wait_for_the_end(self, tenants: Load) -> None:
        """Until every batch is accepted, ended and closed, or nothing has happened for too long."""
        self._watch.progress_at = time.monotonic()
        while tenants.waiting or not _over(self._watch.totals):
            if time.monotonic() - self._watch.progress_at > _PATIENCE_SECONDS:
                self._stage.complaints.append(f"nothing happens any more: {self._watch.totals}")
                return
            self._on_progress("waiting for the end", self._watch.totals.ended, self.done.total())
            self._stage.pause(0.2)


def _over(totals: Totals) -> bool:
    return not totals.open and not totals.unclosed
