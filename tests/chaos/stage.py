"""The farm that chaos plays on: every part real and its own, started again whenever it was killed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from sqlalchemy import text

from imagefarm.embedded import EmbeddedPostgres, EmbeddedRedis
from shared import schema, tenants
from shared.database import transaction
from shared.errors import Unavailable
from shared.queue import redis_client
from shared.services import Services, open_services
from shared.settings import Settings, load_settings
from tests.fakes.faulty_proxy import FaultyProxy
from tests.fakes.s3_server import BUCKET, moto_server
from tests.farm import Process, celery_worker, free_port, keeper, wait_for

MODELS = ("fake", "fake-second")
TENANTS = 8
#: short, so that a run meets many expiries; a frozen worker outlives its lease without counting as hung
LEASE_SECONDS, STALL_SECONDS, GRACE_SECONDS = 3.0, 6.0, 5.0
#: small passes, so that every worker has a share of every batch
_CATALOGUE = "".join(
    f'[models.{name}]\nbackend = "fake"\nmax_batch = 6\nlimits = {{ size_multiple = 1, min_size = 1 }}\n'
    for name in MODELS
)
#: a write of the S3 fault `cut` ends within the body of a small image
_CUT_AT_BYTE = 1_200

_HELD = text("""
SELECT id, lease_token::text FROM job
WHERE state = 'rendering' AND claimed_by LIKE ANY(:names)
""")


@dataclass(frozen=True)
class Held:
    """A job that a worker held, under one lease."""

    job_id: int
    token: str


class Post:
    """A place for one process, which is never empty for long."""

    def __init__(self, name: str, make: Callable[[str], Process]) -> None:
        self.name = name
        self.process: Process | None = None
        #: a fault is at work here and starts the process again itself
        self.away = False
        self.pids: set[int] = set()
        self._make = make
        self._leftovers: list[psutil.Process] = []
        #: the supervisor and a fault must not both start a process here
        self._lock = threading.RLock()

    def start(self, failpoints: str = "") -> None:
        """Put a new process here; what is left of the former one is its own matter until `clear`."""
        with self._lock:
            if self.process is not None and self.process.popen.poll() is None:
                self.kill()
            elif self.process is not None:
                self._leftovers += self._group()
            self.pids = set()
            self.process = self._make(failpoints).__enter__()
            self.away = False

    def signal_group(self, number: int) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.kill_group(number)

    def leave(self, seconds: float) -> bool:
        """Ask the process to end, and tell whether it did so in time; killed otherwise. The post stays empty."""
        with self._lock:
            self.away = True
        assert self.process is not None
        self.process.popen.terminate()
        try:
            self.process.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.signal_group(signal.SIGKILL)
            self.process.popen.wait()
            return False
        return True

    def kill(self) -> None:
        """`kill -9` of the whole group; the post stays empty."""
        with self._lock:
            self.away = True
        self.signal_group(signal.SIGKILL)
        assert self.process is not None
        self.process.popen.wait()

    def tend(self) -> None:
        """Start the process again where it has died."""
        with self._lock:
            if not self.away and self.process is not None and self.process.popen.poll() is not None:
                self.start()

    def children(self) -> list[int]:
        """The processes that it has started; their ids are also kept in `pids`."""
        assert self.process is not None
        found: list[int] = []
        with contextlib.suppress(psutil.Error):
            found = [child.pid for child in psutil.Process(self.process.pid).children()]
        self.pids.update(found)
        return found

    def log_size(self) -> int:
        assert self.process is not None
        return self.process.log.stat().st_size

    def log_since(self, position: int) -> str:
        assert self.process is not None
        with self.process.log.open("rb") as log:
            log.seek(position)
            return log.read().decode(errors="replace")

    def _group(self) -> list[psutil.Process]:
        assert self.process is not None
        members = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.getpgid(process.pid) == self.process.pid:
                    members.append(process)
        return members

    def clear(self) -> None:
        """End everything that was ever started here."""
        self.away = True
        if self.process is None:
            return
        for process in self._leftovers + self._group():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.popen.wait()


class Stage:
    """A whole farm: PostgreSQL, Redis, S3 behind a proxy, APIs, keepers, workers, and the hand that restarts them."""

    def __init__(self, *, apis: int = 2, keepers: int = 2, workers: int = 4, log_folder: Path | None = None) -> None:
        self._counts = (apis, keepers, workers)
        self._logs = log_folder
        self._free = threading.Condition()
        self._busy: set[str] = set()
        self._closing = threading.Event()
        #: what a fault saw and no invariant covers
        self.complaints: list[str] = []
        #: brings a little more work where a fault waits for some
        self.nudge: Callable[[], None] = lambda: None

    def __enter__(self) -> Stage:
        with contextlib.ExitStack() as stack:
            # not in a folder that is closed to others: as root, PostgreSQL runs as a user of its own
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="imagefarm-chaos-")))
            self.logs = self._logs or folder
            self.logs.mkdir(parents=True, exist_ok=True)
            self.postgres = stack.enter_context(EmbeddedPostgres(folder / "postgres"))
            self.redis = stack.enter_context(EmbeddedRedis(folder / "redis"))
            s3 = stack.enter_context(moto_server())
            self.proxy = stack.enter_context(FaultyProxy(s3.endpoint, damage_at=_CUT_AT_BYTE))
            (folder / "catalogue.toml").write_text(_CATALOGUE)
            self.settings = load_settings(
                database_url=self.postgres.url,
                redis_url=self.redis.url,
                storage_url=f"s3://{BUCKET}/chaos",
                s3_endpoint_url=self.proxy.endpoint,
                s3_access_key=s3.access_key,
                s3_secret_key=s3.secret_key,
                catalogue=folder / "catalogue.toml",
                lease_seconds=LEASE_SECONDS,
                heartbeat_seconds=0.8,
                keeper_seconds=0.5,
                stall_seconds=STALL_SECONDS,
                grace_seconds=GRACE_SECONDS,
                cancel_poll_seconds=0.3,
                linger_seconds=4.0,
                affinity_seconds=3.0,
                log_level="WARNING",
            )
            direct = self.settings.model_copy(update={"s3_endpoint_url": s3.endpoint})
            self.services: Services = open_services("chaos", direct)
            stack.callback(self.services.engine.dispose)
            schema.upgrade(self.services.engine)
            with transaction(self.services.engine) as connection:
                owners = [tenants.ensure_tenant(connection, f"tenant-{n}", 1.0 + n % 3) for n in range(TENANTS)]
                self.keys = [tenants.create_key(connection, owner, "chaos") for owner in owners]
            self._open_posts(stack)
            stack.callback(self._closing.set)
            threading.Thread(target=self._tend, name="tend", daemon=True).start()
            wait_for(self._ready, 60, "a farm that answers")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _open_posts(self, stack: contextlib.ExitStack) -> None:
        ports = [free_port() for _ in range(self._counts[0])]
        self.urls = [f"http://127.0.0.1:{port}" for port in ports]
        self.apis = [Post(f"api-{n}", self._api(n, port)) for n, port in enumerate(ports)]
        self.keepers = [Post(f"keeper-{n}", self._keeper(n)) for n in range(self._counts[1])]
        self.workers = [Post(f"worker-{n}", self._worker(n)) for n in range(self._counts[2])]
        for post in self.posts:
            stack.callback(post.clear)
            post.start()

    @property
    def posts(self) -> list[Post]:
        return [*self.apis, *self.keepers, *self.workers]

    def _api(self, number: int, port: int) -> Callable[[str], Process]:
        settings = self.settings.model_copy(update={"listen": f"127.0.0.1:{port}", "api_threads": 32})
        command = [sys.executable, "-m", "api.serve"]
        return lambda mines: Process(command, _mined(settings, mines), self.logs / f"api-{number}.log")

    def _keeper(self, number: int) -> Callable[[str], Process]:
        return lambda mines: keeper(_mined(self.settings, mines), self.logs / f"keeper-{number}.log")

    def _worker(self, number: int) -> Callable[[str], Process]:
        log = self.logs / f"worker-{number}.log"
        return lambda mines: celery_worker(_mined(self.settings, mines), log, *MODELS)

    def _ready(self) -> bool:
        """Every worker has said hello, and somebody answers for each API."""
        with transaction(self.services.engine) as connection:
            workers = connection.execute(text("SELECT count(*) FROM worker")).scalar_one()
        listening = sum("Listening" in post.log_since(0) or bool(post.children()) for post in self.apis)
        return workers >= len(self.workers) and listening == len(self.apis)

    def _tend(self) -> None:
        while not self._closing.wait(0.1):
            for post in self.posts:
                post.tend()

    # ------------------------------------------------------------------------------------------------ for the faults

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Only one fault at a time works on the part of this name."""
        with self._free:
            self._free.wait_for(lambda: name not in self._busy)
            self._busy.add(name)
        try:
            yield
        finally:
            with self._free:
                self._busy.discard(name)
                self._free.notify_all()

    @contextlib.contextmanager
    def one_of(self, posts: Sequence[Post], dice: random.Random) -> Iterator[Post]:
        """A running post that no other fault works on; of workers, one that holds jobs if there is any."""
        with self._free:
            self._free.wait_for(lambda: any(post.name not in self._busy for post in posts))
            post = dice.choice([post for post in posts if post.name not in self._busy])
            self._busy.add(post.name)
        try:
            if post in self.workers:
                with contextlib.suppress(AssertionError):
                    wait_for(lambda: self.held_by(post), 3, "a worker with jobs")
            yield post
        finally:
            if post.away:
                post.start()
            with self._free:
                self._busy.discard(post.name)
                self._free.notify_all()

    def held_by(self, post: Post) -> list[Held]:
        """The jobs that a worker's processes hold, also those that were killed since it was started."""
        post.children()
        host = os.uname().nodename
        values = {"names": [f"{host}-{pid}-%" for pid in post.pids]}
        try:
            with transaction(self.services.engine) as connection:
                return [Held(*row) for row in connection.execute(_HELD, values)]
        except Unavailable:
            return []

    def bells(self) -> contextlib.closing:  # type: ignore[type-arg]
        """A client of Redis, to be closed."""
        return contextlib.closing(redis_client(self.settings, timeout_seconds=5))

    def pause(self, seconds: float) -> None:
        """Let time pass; ends early when the stage is taken down."""
        self._closing.wait(seconds)

    def wait_until(self, look: Callable[[], bool], seconds: float) -> bool:
        """Look until it is true; False where it is not within `seconds` or the stage is taken down."""
        deadline = time.monotonic() + seconds
        while not look():
            if time.monotonic() > deadline or self._closing.wait(0.05):
                return False
        return True

    def abandon(self) -> None:
        """No fault and no tenant waits for anything any more."""
        self._closing.set()
        for post in self.posts:
            post.signal_group(signal.SIGKILL)

    def heal(self) -> None:
        """Everything runs and nothing is hindered any more."""
        self.proxy.fault = "none"
        self.proxy.reset()
        if not self.redis.alive:
            self.redis.start()
        if not self.postgres.alive:
            self.postgres.start()
        with self.bells() as client:
            client.config_set("maxmemory", "0")
        for post in self.posts:
            post.signal_group(signal.SIGCONT)

    def late_results(self) -> int:
        """How many results the fence refused, as the workers' logs tell."""
        words = (line.split(" result(s) came too late")[0].rsplit(" ", 1)[-1] for line in self._lines("came too late"))
        return sum(int(word) for word in words)

    def _lines(self, phrase: str) -> Iterator[str]:
        for post in self.workers:
            yield from (line for line in post.log_since(0).splitlines() if phrase in line)


def _mined(settings: Settings, failpoints: str) -> Settings:
    return settings.model_copy(update={"failpoints": failpoints}) if failpoints else settings
