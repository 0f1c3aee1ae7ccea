"""What goes wrong: each kind of fault by name, done to a running farm for real.

A fault is done when its function returns: what it hindered is free again, and the supervisor restarts what it killed.
The answer are the jobs that it hit, whose recovery is then timed.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import psycopg
from sqlalchemy import text

from shared.database import transaction
from shared.errors import Unavailable
from shared.queue import drain_message, queue_name
from tests.chaos.stage import GRACE_SECONDS, LEASE_SECONDS, MODELS, STALL_SECONDS, Held, Post, Stage
from tests.fakes.faulty_proxy import Fault
from tests.farm import Process


@dataclass(frozen=True)
class Struck:
    """What a fault hit: the jobs, none where it was the whole farm; and when, if not at its beginning."""

    held: Sequence[Held] = ()
    at: float | None = None


Strike = Callable[[Stage, random.Random], Struck]

FAULTS: dict[str, Strike] = {}
#: faults that are in the jobs themselves, and submissions that are called off: the load brings them
IN_JOBS = ("crash", "hang", "out_of_memory", "transient", "permanent", "cancel")
#: a failpoint that is not reached within this time is given up
_REACH_SECONDS = 25.0


class Missed(Exception):
    """The fault could not be done here and now; it does not count."""


def _fault(name: str) -> Callable[[Strike], Strike]:
    def keep(strike: Strike) -> Strike:
        FAULTS[name] = strike
        return strike

    return keep


# ------------------------------------------------------------------------------------------------------------- workers


@_fault("worker: kill -9 group")
def _kill_group(stage: Stage, dice: random.Random) -> Struck:
    with stage.one_of(stage.workers, dice) as worker:
        held = stage.held_by(worker)
        worker.kill()
        return Struck(held)


@_fault("worker: kill -9 child")
def _kill_child(stage: Stage, dice: random.Random) -> Struck:
    with stage.one_of(stage.workers, dice) as worker:
        if not stage.wait_until(lambda: bool(worker.children()), 10):
            raise Missed("it had no child")
        held = stage.held_by(worker)
        _kill(worker.children()[0])
        return Struck(held)


@_fault("worker: kill -9 parent")
def _kill_parent(stage: Stage, dice: random.Random) -> Struck:
    with stage.one_of(stage.workers, dice) as worker:
        held = stage.held_by(worker)
        children = worker.children()
        assert worker.process is not None
        worker.away = True
        _kill(worker.process.pid)
        worker.process.popen.wait()
        if not stage.wait_until(lambda: not any(_runs(child) for child in children), 5):
            stage.complaints.append(f"{worker.name}: its child outlived its parent")
        return Struck(held)


@_fault("worker: SIGSTOP past the lease, SIGCONT")
def _freeze_worker(stage: Stage, dice: random.Random) -> Struck:
    with stage.one_of(stage.workers, dice) as worker:
        held = stage.held_by(worker)
        worker.signal_group(signal.SIGSTOP)
        stage.pause(LEASE_SECONDS + dice.uniform(0.7, 2.0))
        worker.signal_group(signal.SIGCONT)
        return Struck(held)


@_fault("worker: SIGTERM storm")
def _storm(stage: Stage, dice: random.Random) -> Struck:
    """All at once, and more than once each."""
    with ExitStack() as stack:
        for worker in stage.workers:
            stack.enter_context(stage.alone(worker.name))
        before = {worker: worker.process for worker in stage.workers}
        for _ in range(3):
            for worker in stage.workers:
                with suppress(ProcessLookupError):
                    os.kill(_pid(worker), signal.SIGTERM)
            stage.pause(0.1)
        for worker in stage.workers:
            if not stage.wait_until(partial(_replaced, worker, before[worker]), GRACE_SECONDS + 10):
                stage.complaints.append(f"{worker.name} does not end on SIGTERM")
                worker.kill()
                worker.start()
    return Struck()


@_fault("all: rolling restart")
def _roll(stage: Stage, dice: random.Random) -> Struck:
    for post in stage.posts:
        with stage.alone(post.name):
            if not post.leave(GRACE_SECONDS + 15):
                stage.complaints.append(f"{post.name} does not end on SIGTERM")
            post.start()
    return Struck(at=time.monotonic())


# ---------------------------------------------------------------------------------------------------------- failpoints


def _failpoint(choose: Callable[[Stage], Sequence[Post]], point: str, action: str, odds: str = "1/1") -> None:
    @_fault(f"failpoint: {point}={action}")
    def strike(stage: Stage, dice: random.Random) -> Struck:
        with stage.one_of(choose(stage), dice) as post, _leading(stage, post):
            post.leave(GRACE_SECONDS + 10)
            position = post.log_size()
            post.start(f"{point}={action}:{odds},seed={dice.randrange(1000)}")

            def reached() -> bool:
                post.children()
                stage.nudge()
                return f"failpoint {point}: {action}" in post.log_since(position)

            if not stage.wait_until(reached, _REACH_SECONDS):
                post.leave(GRACE_SECONDS + 10)
                raise Missed(f"{point} was not reached")
            struck = Struck(stage.held_by(post) if post in stage.workers else [], time.monotonic())
            if action == "hang" and not stage.wait_until(
                lambda: "the device hangs" in post.log_since(position), STALL_SECONDS + 10
            ):
                stage.complaints.append(f"{post.name} hangs and nobody ends it")
            if action == "oom":
                post.leave(GRACE_SECONDS + 10)
                return Struck((), struck.at)
            post.kill()
            return struck


@contextmanager
def _leading(stage: Stage, post: Post) -> Iterator[None]:
    """A keeper that stands by passes no failpoint: meanwhile the others are away."""
    others = [keeper for keeper in stage.keepers if keeper is not post and post in stage.keepers]
    for keeper in others:
        keeper.leave(5)
    try:
        yield
    finally:
        for keeper in others:
            keeper.start()


_failpoint(lambda stage: stage.workers, "after_claim", "kill")
_failpoint(lambda stage: stage.workers, "render_step", "kill", "1/2")
_failpoint(lambda stage: stage.workers, "render_step", "hang", "1/2")
_failpoint(lambda stage: stage.workers, "render_step", "oom", "1/4")
_failpoint(lambda stage: stage.workers, "after_upload", "kill", "1/2")
_failpoint(lambda stage: stage.workers, "after_result", "kill", "1/2")
_failpoint(lambda stage: stage.apis, "before_bell", "kill")
_failpoint(lambda stage: stage.apis, "mid_copy", "kill")
_failpoint(lambda stage: stage.keepers, "before_chore", "kill", "1/4")
_failpoint(lambda stage: stage.keepers, "mid_fold", "kill")


# --------------------------------------------------------------------------------------------------- API and keepers


@_fault("api: kill -9 group")
def _kill_api(stage: Stage, dice: random.Random) -> Struck:
    with stage.one_of(stage.apis, dice) as api:
        api.kill()
    return Struck()


@_fault("api: kill -9 child")
def _kill_api_child(stage: Stage, dice: random.Random) -> Struck:
    with stage.one_of(stage.apis, dice) as api:
        if not stage.wait_until(lambda: bool(api.children()), 10):
            raise Missed("it had no child")
        _kill(dice.choice(api.children()))
    return Struck()


@_fault("keeper: kill -9 all")
def _kill_keepers(stage: Stage, dice: random.Random) -> Struck:
    for keeper in stage.keepers:
        with stage.one_of([keeper], dice) as post:
            post.kill()
    return Struck()


@_fault("keeper: SIGSTOP, SIGCONT")
def _freeze_keeper(stage: Stage, dice: random.Random) -> Struck:
    with stage.one_of(stage.keepers, dice) as keeper:
        keeper.signal_group(signal.SIGSTOP)
        stage.pause(dice.uniform(1.0, 3.0))
        keeper.signal_group(signal.SIGCONT)
    return Struck()


# ------------------------------------------------------------------------------------------------------------- redis


@_fault("redis: kill -9, nothing on disk")
def _kill_redis(stage: Stage, dice: random.Random) -> Struck:
    with stage.alone("redis"):
        _kill(stage.redis.pid)
        stage.wait_until(lambda: not stage.redis.alive, 5)
        stage.pause(dice.uniform(0.2, 2.0))
        stage.redis.start()
    return Struck()


@_fault("redis: FLUSHALL")
def _flush(stage: Stage, dice: random.Random) -> Struck:
    with stage.alone("redis"), stage.bells() as client:
        client.flushall()
    return Struck()


@_fault("redis: SIGSTOP, SIGCONT")
def _freeze_redis(stage: Stage, dice: random.Random) -> Struck:
    with stage.alone("redis"):
        os.kill(stage.redis.pid, signal.SIGSTOP)
        stage.pause(dice.uniform(1.0, 4.0))
        os.kill(stage.redis.pid, signal.SIGCONT)
    return Struck()


@_fault("redis: full")
def _fill_redis(stage: Stage, dice: random.Random) -> Struck:
    with stage.alone("redis"), stage.bells() as client:
        client.config_set("maxmemory", "1mb")
        stage.pause(dice.uniform(0.5, 3.0))
        client.config_set("maxmemory", "0")
    return Struck()


@_fault("redis: 100 doubled bells")
def _double_bells(stage: Stage, dice: random.Random) -> Struck:
    with stage.alone("redis"), stage.bells() as client:
        for model in MODELS:
            client.lpush(queue_name(model), *(drain_message(model) for _ in range(50)))
    return Struck()


# ---------------------------------------------------------------------------------------------------------- postgres


@_fault("postgres: immediate stop, start")
def _stop_postgres(stage: Stage, dice: random.Random) -> Struck:
    with stage.alone("postgres"):
        os.kill(stage.postgres.pid, signal.SIGQUIT)  # as `pg_ctl stop -m immediate` does
        if not stage.wait_until(lambda: not stage.postgres.alive, 10):
            raise Missed("it did not stop")
        stage.pause(dice.uniform(0.1, 1.5))
        stage.postgres.start()
    return Struck()


@_fault("postgres: pg_terminate_backend")
def _terminate_backends(stage: Stage, dice: random.Random) -> Struck:
    """Of all, or of those that are in the middle of something."""
    busy = dice.choice(["", "AND state <> 'idle'"])
    query = f"""SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                WHERE application_name LIKE 'imagefarm%' AND pid <> pg_backend_pid() {busy}"""
    with stage.alone("postgres"):
        for _ in range(1 if not busy else 20):
            with suppress(Unavailable), transaction(stage.services.engine) as connection:
                connection.execute(text(query))
            stage.pause(0.02)
    return Struck()


@_fault("postgres: no connection left")
def _use_up_connections(stage: Stage, dice: random.Random) -> Struck:
    with stage.alone("postgres"), ExitStack() as stack:
        with suppress(psycopg.OperationalError):
            for _ in range(300):
                stack.enter_context(psycopg.connect(stage.postgres.url, application_name="greedy"))
        stage.pause(dice.uniform(0.5, 2.0))
    return Struck()


# ----------------------------------------------------------------------------------------------------------- storage


def _storage_fault(name: str, fault: Fault) -> None:
    @_fault(f"s3: {name}")
    def strike(stage: Stage, dice: random.Random) -> Struck:
        with stage.alone("s3"):
            stage.proxy.fault = fault
            stage.proxy.reset()
            stage.pause(dice.uniform(1.0, 3.0))
            stage.proxy.fault = "none"
            stage.proxy.reset()
        return Struck()


_storage_fault("500", "broken")
_storage_fault("503", "busy")
_storage_fault("black hole", "hole")
_storage_fault("cut within the body", "cut")
_storage_fault("answer cut short", "shorten")
_storage_fault("slow", "trickle")


# -------------------------------------------------------------------------------------------------------------- plan


def draw(count: int, seed: int) -> list[str]:
    """`count` faults: every kind before any comes again, in an order that the seed gives. `job: …` are in jobs."""
    dice = random.Random(seed)
    kinds = [*FAULTS, *(f"job: {name}" for name in IN_JOBS)]
    drawn: list[str] = []
    while len(drawn) < count:
        dice.shuffle(kinds)
        drawn += kinds
    return drawn[:count]


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _replaced(post: Post, by: Process | None) -> bool:
    return post.process is not by


def _pid(post: Post) -> int:
    assert post.process is not None
    return post.process.pid


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
