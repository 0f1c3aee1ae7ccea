"""Whether rows, attempts, objects, counters and what the tenants were told agree: the invariants I1 to I7.

I1 every job that was submitted has ended, once. I2 every image that is recorded is stored, whole. I3 no result is
recorded twice. I4 no lease outlives its time. I5 counters equal counts. I6 no object is without a row. I7 the API
answered every request in time, with success or a problem.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, func, select, text

from shared.database import transaction
from shared.errors import ObjectMissing
from shared.ids import batch_id as public_batch_id
from shared.models import Attempt, Batch, BatchCounter, Job
from shared.services import Services
from shared.states import OPEN, POISON, POLICY, Outcome, State
from tests.chaos.load import Answer

#: an object whose job ended otherwise may lie about for so long; then the sweep takes it
GRACE = timedelta(hours=24)
_KEY = re.compile(r"t/\d+/(?P<batch>\d+)/\d+/(?P<idx>\d+)-[0-9a-f]{64}\.\w+")
_READERS = 8


@dataclass
class Findings:
    """What does not agree. All lists empty is what a run must end with."""

    jobs: int = 0
    states: Counter[str] = field(default_factory=Counter)
    #: accepted batches and jobs without a row, and jobs that never ended
    lost: list[str] = field(default_factory=list)
    #: batches nobody submitted, results recorded twice, a second image of a job
    doubled: list[str] = field(default_factory=list)
    #: recorded images that are not stored, or not as they were recorded
    missing: list[str] = field(default_factory=list)
    #: objects that no row knows
    orphans: list[str] = field(default_factory=list)
    #: leases, counters, open batches, causes of failure, the API
    other: list[str] = field(default_factory=list)
    #: objects of jobs that were called off or given up after the upload, and are young
    leftovers: int = 0
    #: jobs that asked for no fault, but were lost with three workers or ran out of memory three times
    struck_thrice: list[int] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.lost or self.doubled or self.missing or self.orphans or self.other)

    @property
    def differences(self) -> list[str]:
        named = [(name, getattr(self, name)) for name in ("lost", "doubled", "missing", "orphans", "other")]
        return [f"{name}: {text}" for name, texts in named for text in texts]

    def line(self, faults: int) -> str:
        """The verdict in one line."""
        figures = f"{len(self.lost)} lost, {len(self.doubled)} doubled, {len(self.missing)} missing"
        return f"reconciled: {self.jobs} jobs, {faults} faults, {figures}, {len(self.orphans)} orphans"


def reconcile(
    services: Services, accepted: Mapping[str, int], answers: Iterable[Answer] = (), *, grace: timedelta = GRACE
) -> Findings:
    """Compare everything. `accepted`: how many jobs the farm took in each batch, by the public id that it answered."""
    found = Findings()
    with transaction(services.engine) as connection:
        connection.execute(text("SET LOCAL statement_timeout = '60s'"))
        _rows(connection, accepted, found)
        _attempts(connection, found)
        _leases(connection, services.settings.lease_seconds + 2 * services.settings.keeper_seconds, found)
        _counters(connection, found)
        _causes(connection, found)
        jobs = connection.execute(select(Job.batch_id, Job.idx, Job.state, Job.result_key, Job.result_sha256)).all()
    _objects(services, {(row.batch_id, row.idx): row for row in jobs}, grace, found)
    found.other += [fault for answer in answers if (fault := answer.fault)]
    return found


def _rows(connection: Connection, accepted: Mapping[str, int], found: Findings) -> None:
    """I1: what was accepted is there, once, and has ended."""
    stored = {
        public_batch_id(row.public_id): row
        for row in connection.execute(
            select(Batch.public_id, Batch.job_count, Batch.finished_at, func.count(Job.id).label("rows"))
            .outerjoin(Job, Job.batch_id == Batch.id)
            .group_by(Batch.id)
        )
    }
    for name, size in accepted.items():
        rows = stored[name].rows if name in stored else 0
        if rows != size:
            (found.lost if rows < size else found.doubled).append(f"{name}: {rows} of {size} jobs")
    for name, row in stored.items():
        if name not in accepted:
            found.doubled.append(f"{name}: {row.rows} jobs that nobody was told of")
        if row.finished_at is None:
            found.other.append(f"{name} is not closed")
    states = connection.execute(select(Job.state, func.count().label("number")).group_by(Job.state))
    found.states = Counter({row.state: row.number for row in states})
    found.jobs = found.states.total()
    still_open = select(Job.id, Job.state).where(Job.state.in_([str(state) for state in OPEN]))
    found.lost += [f"job {row.id} is still {row.state}" for row in connection.execute(still_open)]


def _attempts(connection: Connection, found: Findings) -> None:
    """I3: one success for each job that succeeded, and for no other."""
    rows = select(Attempt.job_id).where(Attempt.outcome == Outcome.SUCCEEDED)
    successes = Counter(connection.execute(rows).scalars())
    succeeded = set(connection.execute(select(Job.id).where(Job.state == State.SUCCEEDED)).scalars())
    found.doubled += [f"job {job}: recorded {n} times" for job, n in successes.items() if n > 1]
    found.doubled += [f"job {job}: recorded, and yet not succeeded" for job in successes.keys() - succeeded]
    found.missing += [f"job {job}: succeeded in no attempt" for job in succeeded - successes.keys()]


def _leases(connection: Connection, allowed: float, found: Findings) -> None:
    """I4: no job is rendered under a lease that ran out long ago."""
    late = func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, allowed)
    query = select(Job.id, Job.lease_expires_at).where(Job.state == State.RENDERING, Job.lease_expires_at < late)
    found.other += [f"job {row.id}: its lease ran out at {row.lease_expires_at}" for row in connection.execute(query)]


def _counters(connection: Connection, found: Findings) -> None:
    """I5: the counters of every batch equal a count of its rows."""
    counted: dict[int, Counter[str]] = defaultdict(Counter)
    for batch, state, number in connection.execute(
        select(Job.batch_id, Job.state, func.count()).group_by(Job.batch_id, Job.state)
    ):
        counted[batch][state] = number
    sums = [func.sum(getattr(BatchCounter, state)) for state in State]
    kept = {
        batch: dict(zip(map(str, State), numbers, strict=True))
        for batch, *numbers in connection.execute(select(BatchCounter.batch_id, *sums).group_by(BatchCounter.batch_id))
    }
    for batch in counted.keys() | kept.keys():
        for state in map(str, State):
            here, there = kept.get(batch, {}).get(state, 0), counted[batch][state]
            if here != there:
                found.other.append(f"batch {batch}: counts {here} {state}, has {there}")


def _causes(connection: Connection, found: Findings) -> None:
    """A job fails for the fault that it asks for, or because it was lost or out of memory three times."""
    expected = {
        "crash": {POISON}, "hang": {POISON}, "out_of_memory": {"out-of-memory"}, "transient": {"transient"},
        "permanent": {"asked_for"},
    }  # fmt: skip
    rows = select(Attempt.job_id).where(Attempt.outcome == Outcome.RESOURCE)
    resource = Counter(connection.execute(rows).scalars())
    columns = (Job.id, Job.error_class, Job.error_detail, Job.lost_count, Job.overrides, Batch.parameters)
    failed = select(*columns).join(Batch, Batch.id == Job.batch_id).where(Job.state == State.FAILED)
    for row in connection.execute(failed):
        asked = {**row.parameters, **(row.overrides or {})}["fault"]
        if row.error_class in expected.get(asked, set()):
            continue
        if (row.error_class == POISON and row.lost_count >= 3) or resource[row.id] >= POLICY[Outcome.RESOURCE].tries:
            found.struck_thrice.append(row.id)
        else:
            found.other.append(f"job {row.id} (fault {asked}) failed: {row.error_class}: {row.error_detail}")


def _objects(services: Services, jobs: Mapping[tuple[int, int], Any], grace: timedelta, found: Findings) -> None:
    """I2 and I6: each recorded image is stored once, byte for byte, and nothing else is."""
    recorded = {row.result_key: row for row in jobs.values() if row.result_key is not None}
    if len(recorded) < sum(row.result_key is not None for row in jobs.values()):
        found.doubled.append("two jobs have the same object")
    oldest = datetime.now(UTC) - grace
    for info in services.storage.list():
        if info.key in recorded:
            continue
        match = _KEY.fullmatch(info.key)
        job = jobs.get((int(match["batch"]), int(match["idx"]))) if match else None
        state = getattr(job, "state", None)
        if state == State.SUCCEEDED:
            found.doubled.append(f"{info.key}: a second image of a job")
        elif state in (State.FAILED, State.CANCELED) and info.modified_at > oldest:
            found.leftovers += 1
        else:
            found.orphans.append(info.key)

    def read(key: str) -> str | None:
        try:
            digest = hashlib.sha256(services.storage.get(key)).digest()
        except ObjectMissing:
            return f"{key}: no such object"
        return None if digest == recorded[key].result_sha256 else f"{key}: other bytes than were recorded"

    with ThreadPoolExecutor(_READERS) as readers:
        found.missing += filter(None, readers.map(read, recorded))
