"""Why a job waits and how long yet; what each model has waiting, and how many workers that calls for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Connection, text

from shared.progress import BatchView, JobView
from shared.states import State

#: jobs ahead are counted up to here; more make no difference to anybody
MOST_AHEAD = 10_000

_CIRCUMSTANCES = text("""
SELECT b.model, b.paused_at IS NOT NULL AS batch_paused, t.paused_at IS NOT NULL AS tenant_paused,
       m.paused_at IS NOT NULL AS model_paused, t.max_in_flight, b.work / b.job_count AS work_per_job,
       w.workers, w.resting, w.images_per_second, r.seconds_per_work
FROM batch b JOIN tenant t ON t.id = b.tenant_id
LEFT JOIN model_control m ON m.model = b.model
LEFT JOIN model_rate r ON r.model = b.model
CROSS JOIN LATERAL (
    SELECT count(*) AS workers, count(*) FILTER (WHERE jsonb_exists(w.resting, b.model)) AS resting,
           sum((w.rates->b.model->>'images_per_second')::double precision) AS images_per_second
    FROM worker w
    WHERE w.stopped_at IS NULL AND w.draining_at IS NULL AND b.model = ANY(w.models)
      AND w.heartbeat_at > clock_timestamp() - make_interval(secs => :lease)) w
WHERE b.id = :batch
""")

_AHEAD = text("""
SELECT count(*) FROM (
    SELECT FROM job, (SELECT model, priority, vt, id FROM job WHERE batch_id = :batch AND idx = :idx) AS mine
    WHERE job.state = 'queued' AND job.model = mine.model
      AND (job.priority, job.vt, job.id) < (mine.priority, mine.vt, mine.id)
    LIMIT :most) AS ahead
""")

# what a cap lets in before this job: its tenant's jobs of the model in flight, and those held before it
_ADMITTED_BEFORE = text("""
SELECT COALESCE(sum(flying.jobs + held.jobs), 0)
FROM (SELECT tenant_id, model, priority, vt, id FROM job WHERE batch_id = :batch AND idx = :idx) AS mine
JOIN batch b ON b.tenant_id = mine.tenant_id AND b.model = mine.model AND b.finished_at IS NULL AND b.paused_at IS NULL
CROSS JOIN LATERAL (
    SELECT COALESCE(sum(queued + rendering), 0) AS jobs FROM batch_counter WHERE batch_id = b.id) AS flying
CROSS JOIN LATERAL (
    SELECT count(*) AS jobs FROM (
        SELECT FROM job WHERE batch_id = b.id AND state = 'held'
          AND (priority, vt, id) < (mine.priority, mine.vt, mine.id) LIMIT :most) AS before) AS held
""")

_QUEUES = text("""
SELECT b.model, sum(c.queued) AS queued, sum(c.scheduled) AS scheduled, sum(c.held) AS held,
       sum(c.rendering) AS rendering,
       extract(epoch FROM clock_timestamp() - min(b.created_at) FILTER (WHERE c.queued > 0)) AS oldest_wait_seconds,
       sum(b.work / b.job_count * (c.queued + c.rendering)) * max(r.seconds_per_work) AS pending_seconds
FROM batch b
CROSS JOIN LATERAL (
    SELECT COALESCE(sum(queued), 0) AS queued, COALESCE(sum(scheduled), 0) AS scheduled, COALESCE(sum(held), 0) AS held,
           COALESCE(sum(rendering), 0) AS rendering
    FROM batch_counter WHERE batch_id = b.id) c
LEFT JOIN model_rate r ON r.model = b.model
WHERE b.finished_at IS NULL GROUP BY b.model
""")

_LIVE = text("""
SELECT model, count(*) AS live, sum((rates->model->>'images_per_second')::double precision) AS images_per_second
FROM worker CROSS JOIN LATERAL unnest(models) AS model
WHERE stopped_at IS NULL AND draining_at IS NULL
  AND heartbeat_at > clock_timestamp() - make_interval(secs => :lease)
GROUP BY model
""")


@dataclass(frozen=True)
class Circumstances:
    """What the waiting jobs of one batch wait for."""

    model: str
    batch_paused: bool
    tenant_paused: bool
    model_paused: bool
    max_in_flight: int | None
    work_per_job: float
    #: living workers that serve the model and are not draining, and those of them that leave it alone after failures
    workers: int
    resting: int
    #: of all these workers together, where they have rendered it
    images_per_second: float | None
    seconds_per_work: float | None

    def reason(self, state: State, run_at: datetime | None = None, ahead: int | None = None) -> str | None:
        """Why a job in this state waits, for people; None where it does not."""
        if state is State.SCHEDULED:
            return f"tried again at {run_at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}" if run_at else "tried again soon"
        if state not in (State.HELD, State.QUEUED):
            return None
        for paused, what in (
            (self.batch_paused, "its batch"),
            (self.tenant_paused, "its tenant"),
            (self.model_paused, f"the model {self.model}"),
        ):
            if paused:
                return f"{what} is paused"
        if state is State.HELD and self.max_in_flight is not None:
            return f"its tenant may have {self.max_in_flight} jobs in flight"
        if not self.workers:
            return f"no live worker serves {self.model}"
        if state is State.HELD:
            return "it is let in within a moment"
        if self.resting == self.workers:
            return f"every worker of {self.model} rests after failures"
        if ahead is None:
            return "waits for its turn"
        return f"behind {'more than ' if ahead >= MOST_AHEAD else ''}{ahead} jobs" if ahead else "next in line"

    def seconds_for(self, jobs: int) -> float | None:
        """Estimated seconds until so many jobs are rendered by the workers that are there now."""
        if not self.workers:
            return None
        if self.images_per_second:
            return jobs / self.images_per_second
        if self.seconds_per_work:
            return jobs * self.work_per_job * self.seconds_per_work / self.workers
        return None


@dataclass(frozen=True)
class Waiting:
    """Why one job waits, how many are before it (up to `MOST_AHEAD`), and for how long yet."""

    reason: str | None
    ahead: int | None = None
    eta_seconds: float | None = None


@dataclass(frozen=True)
class QueueView:
    """What one model has waiting, and who renders it. `pending_seconds` is device time of one worker."""

    model: str
    queued: int
    scheduled: int
    held: int
    rendering: int
    oldest_wait_seconds: float | None
    images_per_second: float | None
    pending_seconds: float | None
    live_workers: int
    wanted_workers: int


def circumstances(connection: Connection, batch_id: int, *, lease_seconds: float) -> Circumstances:
    """What the jobs of a batch wait for."""
    row = connection.execute(_CIRCUMSTANCES, {"batch": batch_id, "lease": lease_seconds}).one()
    return Circumstances(**row._mapping)


def of_batch(connection: Connection, batch: BatchView, *, lease_seconds: float) -> str | None:
    """Why the jobs of a batch wait, where none of them is rendered."""
    waiting = [state for state in (State.QUEUED, State.HELD, State.SCHEDULED) if batch.counts[state]]
    if batch.counts[State.RENDERING] or not waiting:
        return None
    return circumstances(connection, batch.id, lease_seconds=lease_seconds).reason(waiting[0])


def of_job(connection: Connection, job: JobView, *, lease_seconds: float) -> Waiting:
    """Why a job waits, with its place in the queue."""
    found = circumstances(connection, job.batch_id, lease_seconds=lease_seconds)
    paused = found.batch_paused or found.tenant_paused or found.model_paused
    capped = job.state is State.HELD and found.max_in_flight is not None
    if paused or not (job.state is State.QUEUED or capped):
        return Waiting(found.reason(job.state, job.run_at))
    values = {"batch": job.batch_id, "idx": job.idx, "most": MOST_AHEAD}
    counted = connection.execute(_ADMITTED_BEFORE if capped else _AHEAD, values).scalar_one()
    ahead = min(int(counted), MOST_AHEAD)
    eta = found.seconds_for(ahead + 1) if ahead < MOST_AHEAD else None
    return Waiting(found.reason(job.state, ahead=ahead), ahead, eta)


def queues(
    connection: Connection, models: Sequence[str], *, lease_seconds: float, scale_seconds: float
) -> list[QueueView]:
    """How each of these models stands; `scale_seconds` is the time in which its waiting work should be done."""
    waiting = {row.model: row for row in connection.execute(_QUEUES)}
    living = {row.model: row for row in connection.execute(_LIVE, {"lease": lease_seconds})}
    found = []
    for model in models:
        row, live = waiting.get(model), living.get(model)
        counts = {n: int(getattr(row, n)) if row else 0 for n in ("queued", "scheduled", "held", "rendering")}
        pending = row.pending_seconds if row else 0.0
        busy = counts["queued"] + counts["rendering"]
        wanted = 0 if not busy else 1 if pending is None else min(busy, max(1, math.ceil(pending / scale_seconds)))
        found.append(
            QueueView(
                model=model,
                **counts,
                oldest_wait_seconds=_number(row.oldest_wait_seconds) if row else None,
                images_per_second=live.images_per_second if live else None,
                pending_seconds=pending,
                live_workers=live.live if live else 0,
                wanted_workers=wanted,
            )
        )
    return found


def _number(value: object) -> float | None:
    return None if value is None else float(value)  # type: ignore[arg-type]
