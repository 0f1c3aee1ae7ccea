"""The SQL of the lifecycle: one statement for each verb, built from the tables in `shared.states`.

Writable CTEs let a verb move rows, write the attempt, the outbox and the counters in one statement and one round trip.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY, BIGINT, BYTEA, DOUBLE_PRECISION, JSONB, TEXT, UUID

from shared.states import MOVES, POISON, Outcome, State


def _states(states: Iterable[State]) -> str:
    return ", ".join(f"'{state}'" for state in sorted(states))


def _leaves(verb: str) -> str:
    return f"state IN ({_states(MOVES[verb].leaves)})"


# The moved rows of a verb are (batch_id, was, now); these CTEs keep the counters equal to the rows.
_COLUMNS = ", ".join(State)

_DELTAS = ", ".join(
    f"count(*) FILTER (WHERE now = '{s}') - count(*) FILTER (WHERE was = '{s}')" for s in State
)  # fmt: skip

_SUMS = ", ".join(f"{s} = c.{s} + EXCLUDED.{s}" for s in State)

_TALLY = f"""
  tally AS (
    INSERT INTO batch_counter AS c (batch_id, shard, {_COLUMNS})
    SELECT batch_id, :shard, {_DELTAS} FROM moved GROUP BY batch_id ORDER BY batch_id
    ON CONFLICT (batch_id, shard) DO UPDATE SET {_SUMS})"""

_OUTBOX = """
  outbox AS (
    INSERT INTO webhook_outbox (event, batch_id, job_id, payload)
    SELECT 'job.' || m.now, m.batch_id, m.id, jsonb_build_object('index', m.idx)
    FROM moved m JOIN batch b ON b.id = m.batch_id
    WHERE b.webhook_url IS NOT NULL AND m.now IN ('succeeded', 'failed', 'canceled')
    ON CONFLICT DO NOTHING)"""

_ENDED = "lease_token = NULL, lease_expires_at = NULL"

# of a batch b, its tenant t and what is said about its model m
PAUSED = "(b.paused_at IS NOT NULL OR t.paused_at IS NOT NULL OR m.paused_at IS NOT NULL)"
# what waits of it is set aside: until it goes on, or until there is room
_PARKED = f"({PAUSED} OR t.max_in_flight IS NOT NULL)"

_CLAIMED = f"""
SELECT j.id, j.batch_id, j.idx, j.tenant_id, j.model, j.priority, j.vt, j.attempt, j.lost_count,
       j.cancel_requested OR b.cancel_requested_at IS NOT NULL AS cancel_requested, {PAUSED} AS paused,
       t.max_in_flight IS NOT NULL AS capped, j.prompt, j.seed, j.overrides"""

_OF_A_BATCH = "JOIN tenant t ON t.id = b.tenant_id LEFT JOIN model_control m ON m.model = b.model"

CLAIM = text(f"""
WITH head AS MATERIALIZED (
    SELECT id, batch_key, priority, vt FROM job
    WHERE {_leaves("claim")} AND model = :model
      AND (priority, vt, id)
        >= (CAST(:floor_priority AS smallint), CAST(:floor_vt AS float8), CAST(:floor_id AS bigint))
    ORDER BY priority, vt, id LIMIT 1 FOR UPDATE SKIP LOCKED),
  mates AS MATERIALIZED (
    SELECT id FROM job
    WHERE {_leaves("claim")} AND model = :model AND batch_key <= (SELECT batch_key FROM head)
      -- from the head on: what is before it is locked or done, and what is done may still stand in the index
      AND (batch_key, priority, vt, id) > ((SELECT batch_key FROM head), (SELECT priority FROM head),
                                           (SELECT vt FROM head), (SELECT id FROM head))
    -- a range in this order and not "batch_key = …", for which the planner may walk the whole queue by ix_job_claim
    ORDER BY batch_key, priority, vt, id LIMIT :mates FOR UPDATE SKIP LOCKED),
  picked AS MATERIALIZED (SELECT id FROM head UNION ALL SELECT id FROM mates),
  moved AS (
    UPDATE job j
    SET state = '{State.RENDERING}', attempt = attempt + 1, claimed_by = :worker, claimed_at = clock_timestamp(),
        lease_token = :token, lease_expires_at = clock_timestamp() + make_interval(secs => :lease)
    FROM picked WHERE j.id = picked.id
    RETURNING j.id, j.batch_id, j.idx, j.tenant_id, j.model, j.priority, j.vt, j.attempt, j.lost_count,
              j.cancel_requested, j.prompt, j.seed, j.overrides,
              '{State.QUEUED}' AS was, '{State.RENDERING}' AS now),
  started AS (
    UPDATE batch SET started_at = clock_timestamp()
    WHERE id IN (SELECT batch_id FROM moved) AND started_at IS NULL),{_TALLY}
{_CLAIMED}
FROM moved j JOIN batch b ON b.id = j.batch_id {_OF_A_BATCH} ORDER BY j.priority, j.vt, j.id
""")

CLAIMED = text(f"""
{_CLAIMED}
FROM job j JOIN batch b ON b.id = j.batch_id {_OF_A_BATCH}
WHERE j.state = '{State.RENDERING}' AND j.lease_token = :token ORDER BY j.priority, j.vt, j.id
""")

EXTEND = text(f"""
UPDATE job j SET lease_expires_at = clock_timestamp() + make_interval(secs => :lease)
FROM unnest(:ids, :tokens) AS held (id, token)
WHERE j.id = held.id AND j.state = '{State.RENDERING}' AND j.lease_token = held.token
RETURNING j.id, j.lease_token
""").bindparams(bindparam("ids", type_=ARRAY(BIGINT)), bindparam("tokens", type_=ARRAY(UUID(as_uuid=True))))

UNWANTED = text("""
SELECT j.id FROM job j JOIN batch b ON b.id = j.batch_id
WHERE j.id = ANY(:ids) AND (j.cancel_requested OR b.cancel_requested_at IS NOT NULL)
""").bindparams(bindparam("ids", type_=ARRAY(BIGINT)))

SUCCEED = text(f"""
WITH result AS (
    SELECT * FROM unnest(:ids, :keys, :hashes, :facts, :seconds)
    AS r (id, result_key, result_sha256, result, seconds) ORDER BY id),
  moved AS (
    UPDATE job j
    SET state = '{State.SUCCEEDED}', result_key = r.result_key, result_sha256 = r.result_sha256, result = r.result,
        finished_at = clock_timestamp(), {_ENDED}
    FROM result r
    WHERE j.id = r.id AND j.{_leaves("succeed")} AND j.lease_token = :token AND NOT j.cancel_requested
    RETURNING j.id, j.batch_id, j.idx, j.attempt, j.claimed_by, j.claimed_at, r.seconds,
              '{State.RENDERING}' AS was, '{State.SUCCEEDED}' AS now),
  ended AS (
    INSERT INTO attempt (job_id, lease_token, attempt, worker_id, started_at, outcome, gpu_seconds)
    SELECT id, :token, attempt, claimed_by, claimed_at, '{Outcome.SUCCEEDED}', seconds FROM moved
    ON CONFLICT DO NOTHING),{_OUTBOX},{_TALLY}
SELECT id FROM moved
""").bindparams(
    bindparam("ids", type_=ARRAY(BIGINT)),
    bindparam("keys", type_=ARRAY(TEXT)),
    bindparam("hashes", type_=ARRAY(BYTEA)),
    bindparam("facts", type_=ARRAY(JSONB)),
    bindparam("seconds", type_=ARRAY(DOUBLE_PRECISION)),
)

ALREADY_MINE = text(f"""
SELECT a.job_id FROM attempt a JOIN job j ON j.id = a.job_id
WHERE a.job_id = ANY(:ids) AND a.lease_token = :token AND a.outcome = '{Outcome.SUCCEEDED}'
  AND j.state = '{State.SUCCEEDED}'
""").bindparams(bindparam("ids", type_=ARRAY(BIGINT)))


def _unsuccessful(verb: str, enters: str, assignments: str) -> Any:
    """One statement for the verbs by which a worker gives a job up; they differ in what they write.

    `enters` is the SQL of the new state.
    """
    return text(f"""
WITH failure AS (
    SELECT * FROM unnest(:ids, :outcomes, :classes, :details, :delays)
    AS f (id, outcome, error_class, error_detail, delay) ORDER BY id),
  moved AS (
    UPDATE job j SET state = {enters}, {_ENDED}, {assignments}
    FROM failure f WHERE j.id = f.id AND j.{_leaves(verb)} AND j.lease_token = :token
    RETURNING j.id, j.batch_id, j.idx, j.attempt, j.claimed_by, j.claimed_at, f.outcome, f.error_class, f.error_detail,
              '{State.RENDERING}' AS was, j.state AS now),
  ended AS (
    INSERT INTO attempt (job_id, lease_token, attempt, worker_id, started_at, outcome, error_class, error_detail)
    SELECT id, :token, attempt, claimed_by, claimed_at, outcome, error_class, error_detail FROM moved
    ON CONFLICT DO NOTHING),{_OUTBOX},{_TALLY}
SELECT id FROM moved
""").bindparams(
        bindparam("ids", type_=ARRAY(BIGINT)),
        bindparam("outcomes", type_=ARRAY(TEXT)),
        bindparam("classes", type_=ARRAY(TEXT)),
        bindparam("details", type_=ARRAY(TEXT)),
        bindparam("delays", type_=ARRAY(DOUBLE_PRECISION)),
    )


FAIL = _unsuccessful(
    "fail", f"'{State.FAILED}'",
    "error_class = f.error_class, error_detail = f.error_detail, finished_at = clock_timestamp()",
)  # fmt: skip


def _waits_again(state: str) -> str:
    """A job that goes back to wait ends here instead where somebody has asked to cancel it. `state` is SQL."""
    return f"CASE WHEN j.cancel_requested THEN '{State.CANCELED}' ELSE {state} END"


_ENDS_IF_CANCELED = "finished_at = CASE WHEN j.cancel_requested THEN clock_timestamp() END"
# a job that was away while its batch changed classes comes back into the right one
_CLASS = "priority = (SELECT b.priority FROM batch b WHERE b.id = j.batch_id)"

RETRY = _unsuccessful(
    "retry", _waits_again(f"'{State.SCHEDULED}'"),
    f"{_CLASS}, error_detail = f.error_detail,"
    " run_at = CASE WHEN NOT j.cancel_requested THEN clock_timestamp() + make_interval(secs => f.delay) END, "
    + _ENDS_IF_CANCELED,
)  # fmt: skip

# what is paused must not stand at the head of the queue again
_QUEUED_OR_HELD = f"""CASE WHEN EXISTS (SELECT FROM batch b {_OF_A_BATCH} WHERE b.id = j.batch_id AND {PAUSED})
    THEN '{State.HELD}' ELSE '{State.QUEUED}' END"""

RELEASE = _unsuccessful(
    "release", _waits_again(_QUEUED_OR_HELD), f"{_CLASS}, attempt = j.attempt - 1, {_ENDS_IF_CANCELED}"
)

DROP = _unsuccessful("drop", f"'{State.CANCELED}'", "finished_at = clock_timestamp(), cancel_requested = true")

RESCUE = text(f"""
WITH lost AS MATERIALIZED (
    SELECT id, lease_token,
           CASE WHEN cancel_requested THEN '{State.CANCELED}'
                WHEN lost_count + 1 >= :losses THEN '{State.FAILED}' ELSE '{State.QUEUED}' END AS now
    FROM job
    WHERE {_leaves("rescue")} AND (lease_expires_at < clock_timestamp() OR claimed_by = ANY(:workers))
    ORDER BY id LIMIT :limit FOR UPDATE SKIP LOCKED),
  moved AS (
    UPDATE job j
    SET state = lost.now, {_ENDED}, lost_count = j.lost_count + 1, {_CLASS},
        batch_key = NULL, -- from now on it is rendered alone: its mates shall not pay if it kills workers
        finished_at = CASE WHEN lost.now <> '{State.QUEUED}' THEN clock_timestamp() END,
        error_class = CASE WHEN lost.now = '{State.FAILED}' THEN '{POISON}' END,
        error_detail = 'lost with worker ' || j.claimed_by
    FROM lost WHERE j.id = lost.id
    RETURNING j.id, j.batch_id, j.idx, j.model, j.attempt, j.claimed_by, j.claimed_at, lost.lease_token,
              '{State.RENDERING}' AS was, lost.now),
  ended AS (
    INSERT INTO attempt (job_id, lease_token, attempt, worker_id, started_at, outcome, error_class, error_detail)
    SELECT id, lease_token, attempt, claimed_by, claimed_at, '{Outcome.WORKER_LOST}', '{Outcome.WORKER_LOST}',
           'its lease ran out' FROM moved
    ON CONFLICT DO NOTHING),{_OUTBOX},{_TALLY}
SELECT model, now FROM moved
""").bindparams(bindparam("workers", type_=ARRAY(TEXT)))

PROMOTE = text(f"""
WITH due AS MATERIALIZED (
    SELECT id FROM job WHERE {_leaves("promote")} AND run_at <= clock_timestamp()
    ORDER BY run_at LIMIT :limit FOR UPDATE SKIP LOCKED),
  moved AS (
    UPDATE job j
    SET run_at = NULL, {_CLASS}, state = CASE
        WHEN EXISTS (SELECT FROM batch b {_OF_A_BATCH} WHERE b.id = j.batch_id AND {_PARKED}) THEN '{State.HELD}'
        ELSE '{State.QUEUED}' END
    FROM due WHERE j.id = due.id
    RETURNING j.batch_id, j.model, '{State.SCHEDULED}' AS was, j.state AS now),{_TALLY}
SELECT model FROM moved WHERE now = '{State.QUEUED}'
""")


def _mass_move(verb: str, enters: str, assignments: str, only: str = "true", refunded: str = "0") -> Any:
    """One chunk of a move of a batch, or of one of its jobs, in order of id.

    `enters` is the SQL of the new state, `only` narrows what is moved, and `refunded` is the SQL of how many moved jobs
    give their share of the queue back: those that are no longer in it.
    """
    return text(f"""
WITH picked AS MATERIALIZED (
    SELECT id, state FROM job
    WHERE batch_id = :batch AND (CAST(:idx AS int) IS NULL OR idx = :idx) AND {_leaves(verb)} AND {only}
    ORDER BY id LIMIT :limit FOR UPDATE),
  parked AS MATERIALIZED (SELECT {_PARKED} AS yes FROM batch b {_OF_A_BATCH} WHERE b.id = :batch),
  numbered AS (SELECT id, state, row_number() OVER (ORDER BY id) - 1 AS n FROM picked),
  moved AS (
    UPDATE job j SET state = {enters}, {assignments} FROM numbered WHERE j.id = numbered.id
    RETURNING j.id, j.batch_id, j.idx, numbered.state AS was, j.state AS now),
  refund AS (
    UPDATE tenant_clock c SET vt = GREATEST(c.vt - r.jobs * b.work / b.job_count / t.weight, 0)
    FROM batch b JOIN tenant t ON t.id = b.tenant_id, LATERAL (SELECT {refunded} AS jobs FROM moved) r
    WHERE b.id = :batch AND c.model = b.model AND c.tenant_id = b.tenant_id AND r.jobs > 0),{_OUTBOX},{_TALLY}
SELECT count(*) FROM moved
""")


# what is held has given its share back already, unless it only waits for room
CANCEL = _mass_move(
    "cancel", f"'{State.CANCELED}'", "run_at = NULL, finished_at = clock_timestamp()",
    refunded="CASE WHEN t.max_in_flight IS NULL"
    f" THEN count(*) FILTER (WHERE was <> '{State.HELD}') ELSE count(*) END",
)  # fmt: skip

HOLD = _mass_move(
    "hold", f"'{State.HELD}'", "run_at = NULL", refunded="CASE WHEN t.max_in_flight IS NULL THEN count(*) ELSE 0 END"
)

# what comes back into the queue stands where a new submission would, and not before all that came meanwhile
_STAMPED = f"vt = COALESCE(CAST(:vt AS float8) + n * CAST(:step AS float8), j.vt), {_CLASS}"

RESUME = _mass_move("resume", f"'{State.QUEUED}'", f"run_at = NULL, {_STAMPED}")

RESUBMIT = _mass_move(
    "resubmit", f"CASE WHEN (SELECT yes FROM parked) THEN '{State.HELD}' ELSE '{State.QUEUED}' END",
    "attempt = 0, lost_count = 0, cancel_requested = false, error_class = NULL, error_detail = NULL,"
    f" finished_at = NULL, {_STAMPED}",
    "(CAST(:states AS text[]) IS NULL OR state = ANY(:states))"
    " AND (CAST(:classes AS text[]) IS NULL OR error_class = ANY(:classes))",
).bindparams(bindparam("states", type_=ARRAY(TEXT)), bindparam("classes", type_=ARRAY(TEXT)))  # fmt: skip

# Room is what the cap leaves beside the jobs that are queued or rendered; one transaction at a time looks at it.
LOCK_ROOM = text("SELECT pg_advisory_xact_lock(7236512, CAST(:tenant AS int))")

_IN_FLIGHT = """
    SELECT t.id, t.max_in_flight,
           (SELECT COALESCE(sum(c.queued + c.rendering), 0) FROM batch_counter c JOIN batch b ON b.id = c.batch_id
            WHERE b.tenant_id = t.id AND b.model = :model AND b.finished_at IS NULL) AS in_flight
    FROM tenant t WHERE t.id = :tenant AND t.max_in_flight IS NOT NULL"""

ADMIT = text(f"""
WITH room AS ({_IN_FLIGHT} AND t.paused_at IS NULL
      AND NOT EXISTS (SELECT FROM model_control m WHERE m.model = :model AND m.paused_at IS NOT NULL)),
  places AS (SELECT COALESCE((SELECT GREATEST(max_in_flight - in_flight, 0) FROM room), 0) AS free),
  first AS MATERIALIZED (
    SELECT j.id FROM batch b CROSS JOIN LATERAL (
        SELECT id, priority, vt FROM job WHERE batch_id = b.id AND {_leaves("admit")}
        ORDER BY priority, vt, id LIMIT (SELECT free FROM places)) j
    WHERE b.tenant_id = :tenant AND b.model = :model AND b.finished_at IS NULL AND b.paused_at IS NULL
    ORDER BY j.priority, j.vt, j.id LIMIT (SELECT free FROM places)),
  picked AS MATERIALIZED (
    SELECT id FROM job WHERE id IN (SELECT id FROM first) AND {_leaves("admit")} FOR UPDATE SKIP LOCKED),
  moved AS (
    UPDATE job j SET state = '{State.QUEUED}' FROM picked WHERE j.id = picked.id
    RETURNING j.batch_id, '{State.HELD}' AS was, '{State.QUEUED}' AS now),{_TALLY}
SELECT count(*) FROM moved
""")

HOLD_EXCESS = text(f"""
WITH room AS ({_IN_FLIGHT}),
  picked AS MATERIALIZED (
    SELECT j.id FROM job j JOIN batch b ON b.id = j.batch_id
    WHERE j.state = '{State.QUEUED}' AND b.tenant_id = :tenant AND b.model = :model AND b.finished_at IS NULL
    ORDER BY j.priority DESC, j.vt DESC, j.id DESC
    LIMIT COALESCE((SELECT LEAST(GREATEST(in_flight - max_in_flight, 0), :limit) FROM room), 0)
    FOR UPDATE OF j SKIP LOCKED),
  moved AS (
    UPDATE job j SET state = '{State.HELD}' FROM picked WHERE j.id = picked.id
    RETURNING j.batch_id, '{State.QUEUED}' AS was, '{State.HELD}' AS now),{_TALLY}
SELECT count(*) FROM moved
""")

REPRIORITIZE = text("""
WITH picked AS MATERIALIZED (
    SELECT id FROM job
    WHERE batch_id = :batch AND state IN ('queued', 'scheduled', 'held') AND priority <> :priority
    ORDER BY id LIMIT :limit FOR UPDATE),
  moved AS (UPDATE job SET priority = :priority FROM picked WHERE job.id = picked.id RETURNING job.id)
SELECT count(*) FROM moved
""")

RAISE_HEAD = text(f"""
WITH head AS MATERIALIZED (
    SELECT id FROM job WHERE state = '{State.QUEUED}' AND model = :model AND priority = :priority
    ORDER BY vt, id LIMIT :limit FOR UPDATE SKIP LOCKED),
  moved AS (UPDATE job SET priority = 0 FROM head WHERE job.id = head.id RETURNING job.id)
SELECT count(*) FROM moved
""")

LOCK_BATCH = text("SELECT FROM batch WHERE id = :batch FOR NO KEY UPDATE")

#: Before one job is canceled: what a worker is just about to write about it comes either before or after.
LOCK_JOB = text("SELECT FROM job WHERE batch_id = :batch AND idx = :idx FOR UPDATE")

FLAG_RENDERING = text(f"""
UPDATE job SET cancel_requested = true WHERE id IN (
    SELECT id FROM job WHERE state = '{State.RENDERING}' AND batch_id = :batch
      AND (CAST(:idx AS int) IS NULL OR idx = :idx) AND NOT cancel_requested
    ORDER BY id FOR UPDATE)
""")

REOPEN_BATCH = text("UPDATE batch SET finished_at = NULL, cancel_requested_at = NULL WHERE id = :batch")
