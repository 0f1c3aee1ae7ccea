"""The states of a job, the verbs that move it, and what each kind of failure leads to.

Data only: code, docs and tests read these tables. `shared.lifecycle` is the one module that acts on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum


class State(StrEnum):
    """Where a job stands. Text in the database, with a CHECK."""

    #: waiting for its time: a retry after a failure that may pass
    SCHEDULED = "scheduled"
    #: may be claimed by any worker that serves its model
    QUEUED = "queued"
    #: set aside while its batch, tenant or model is paused, or its tenant has no room
    HELD = "held"
    #: leased to one worker
    RENDERING = "rendering"
    #: the image is stored and recorded
    SUCCEEDED = "succeeded"
    #: given up; `error_class` and `error_detail` say why
    FAILED = "failed"
    #: called off before it was done
    CANCELED = "canceled"


FINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELED})
OPEN = frozenset(State) - FINAL


@dataclass(frozen=True)
class Move:
    """One verb of the lifecycle: the states it may leave, those it may enter, and whether a lease token guards it."""

    leaves: frozenset[State]
    enters: frozenset[State]
    fenced: bool = False


def _move(leaves: set[State], enters: set[State], fenced: bool = False) -> Move:
    return Move(frozenset(leaves), frozenset(enters), fenced)


MOVES: dict[str, Move] = {
    "claim": _move({State.QUEUED}, {State.RENDERING}),
    "succeed": _move({State.RENDERING}, {State.SUCCEEDED}, fenced=True),
    "fail": _move({State.RENDERING}, {State.FAILED}, fenced=True),
    "retry": _move({State.RENDERING}, {State.SCHEDULED, State.CANCELED}, fenced=True),
    "release": _move({State.RENDERING}, {State.QUEUED, State.HELD, State.CANCELED}, fenced=True),
    "drop": _move({State.RENDERING}, {State.CANCELED}, fenced=True),
    "rescue": _move({State.RENDERING}, {State.QUEUED, State.FAILED, State.CANCELED}),
    "promote": _move({State.SCHEDULED}, {State.QUEUED, State.HELD}),
    "hold": _move({State.QUEUED}, {State.HELD}),
    "resume": _move({State.HELD}, {State.QUEUED}),
    "admit": _move({State.HELD}, {State.QUEUED}),
    "cancel": _move({State.QUEUED, State.SCHEDULED, State.HELD}, {State.CANCELED}),
    "resubmit": _move({State.FAILED, State.CANCELED}, {State.QUEUED, State.HELD}),
}


class Priority(StrEnum):
    """How urgent a batch is. A higher class is always claimed before a lower one."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"

    @property
    def rank(self) -> int:
        """Position in the claim order: 0 first."""
        return list(Priority).index(self)

    @classmethod
    def of_rank(cls, rank: int) -> Priority:
        return list(cls)[rank]


class Outcome(StrEnum):
    """How one attempt ended."""

    SUCCEEDED = "succeeded"
    #: may pass by itself: network, storage, a vendor's 429 or 5xx
    TRANSIENT = "transient"
    #: the worker died or fell silent; its lease ran out
    WORKER_LOST = "worker_lost"
    #: out of memory, even alone
    RESOURCE = "resource"
    #: will fail the same way every time: bad input, content policy, missing weights
    PERMANENT = "permanent"
    #: the tenant's or the vendor's money is used up
    BUDGET = "budget"
    #: the worker was told to stop; the attempt does not count
    INTERRUPTED = "interrupted"
    #: called off while it rendered
    CANCELED = "canceled"


@dataclass(frozen=True)
class Policy:
    """What happens after an attempt ended so. Delays grow as `base · 2^(n-1)` up to `ceiling`, with full jitter."""

    tries: int
    base: timedelta = timedelta(seconds=2)
    ceiling: timedelta = timedelta(minutes=10)


#: Attempts granted in all, by outcome. WORKER_LOST counts losses (`lost_count`) rather than attempts.
POLICY: dict[Outcome, Policy] = {
    Outcome.TRANSIENT: Policy(tries=8),
    Outcome.WORKER_LOST: Policy(tries=3),
    Outcome.RESOURCE: Policy(tries=3, base=timedelta(seconds=30)),
    Outcome.PERMANENT: Policy(tries=1),
    Outcome.BUDGET: Policy(tries=1),
}

#: `error_class` of a job that took three workers down with it
POISON = "poison"
