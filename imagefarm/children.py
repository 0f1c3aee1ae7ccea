"""The processes of a local farm: how they are started, watched, restarted and ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from imagefarm import guardian
from shared.settings import PROJECT_ROOT, variable

_LOG_BYTES = 10 * 1024 * 1024
_TAIL_LINES = 12
#: waits before a child that died is started again, and the age at which earlier deaths are forgotten
_BACKOFF = (0.5, 1.0, 2.0, 5.0, 15.0, 30.0)
_FORGIVEN_SECONDS = 60.0
_LOUD = re.compile(r"\b(ERROR|CRITICAL)\b")


def python_command(*arguments: str) -> list[str]:
    """A command that runs a module of ours, whatever lies in the present folder."""
    return [sys.executable, "-P", *arguments]


def python_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment for `python_command`: ours, plus `extra`, able to import the project from where it is."""
    environment = {**os.environ, **extra, "PYTHONUNBUFFERED": "1"}
    if Path(sysconfig.get_path("purelib")) != PROJECT_ROOT:
        paths = [str(PROJECT_ROOT), *filter(None, [variable("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


class Guardian:
    """A small process that ends the wards if this process is killed; it inherits and so keeps `lock`."""

    def __init__(self, lock: int, grace_seconds: float) -> None:
        self._lock = lock
        self._grace = grace_seconds
        self._wards: dict[int, str] = {}
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", guardian.__file__, str(self._grace)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[self._lock],
            start_new_session=True,
            text=True,
            cwd="/",
        )

    def add(self, pid: int, stage: int, ending: signal.Signals = signal.SIGTERM) -> None:
        """From now on `pid` ends with us; lower stages end first."""
        self._wards[pid] = f"+ {pid} {stage} {int(ending)}\n"
        self._tell(self._wards[pid])

    def drop(self, pid: int) -> None:
        """This process has ended."""
        if self._wards.pop(pid, None):
            self._tell(f"- {pid}\n")

    def _tell(self, line: str) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        try:
            pipe.write(line)
            pipe.flush()
        except BrokenPipeError:
            self.check()

    def check(self) -> None:
        """Put a new guardian in the place of one that was killed."""
        if self._process.poll() is not None:
            self._start()
            for line in list(self._wards.values()):
                self._tell(line)

    def close(self) -> None:
        """All wards have ended; wait until the guardian has, too."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


@dataclass
class Child:
    """One process of the farm, with its own log file."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    stage: int
    #: seconds it may take to end
    patience: float
    _process: subprocess.Popen[bytes] | None = None
    _deaths: int = 0
    _started_at: float = 0.0
    _start_again_at: float | None = None
    _read_to: int = field(default=0, repr=False)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, guardian: Guardian) -> None:
        """Start it in a session of its own, so that a Ctrl-C reaches the farm only, which then ends it in order."""
        if self.log.exists() and self.log.stat().st_size > _LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        with self.log.open("ab") as log:
            self._read_to = log.tell()
            self._process = subprocess.Popen(
                self.command,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        guardian.add(self._process.pid, self.stage)
        self._started_at = time.monotonic()
        self._start_again_at = None

    def tend(self, guardian: Guardian, say: Callable[[str], None]) -> None:
        """Show what it complains of; start it again, after a growing pause, if it has died."""
        for line in self._new_lines():
            if _LOUD.search(line):
                say(f"{self.name}: {line}")
        if self.running or self._process is None:
            return
        now = time.monotonic()
        if self._start_again_at is None:
            self._bury(guardian)
            self._deaths = 0 if now - self._started_at > _FORGIVEN_SECONDS else self._deaths
            pause = _BACKOFF[min(self._deaths, len(_BACKOFF) - 1)]
            self._deaths += 1
            self._start_again_at = now + pause
            say(f"{self.name} {self.obituary()}; starting it again in {pause:g} s (log: {self.log})")
        elif now >= self._start_again_at:
            self.start(guardian)

    def _new_lines(self) -> list[str]:
        with suppress(FileNotFoundError), self.log.open("rb") as log:
            log.seek(self._read_to)
            whole, newline, _ = log.read().rpartition(b"\n")
            self._read_to += len(whole) + len(newline)
            return whole.decode(errors="replace").splitlines()
        return []

    def obituary(self) -> str:
        """How it ended."""
        code = self._process.returncode if self._process else None
        if code is not None and code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with status {code}"

    def tail(self) -> str:
        """The last lines of its log."""
        with suppress(FileNotFoundError):
            lines = self.log.read_text(errors="replace").splitlines()
            return "\n".join(lines[-_TAIL_LINES:])
        return ""

    def ask_to_end(self) -> None:
        """Send SIGTERM."""
        if self.running:
            assert self._process is not None
            self._process.terminate()

    def end(self, guardian: Guardian, hurry: Callable[[], bool]) -> None:
        """Wait until it has ended; kill it when its time is up or `hurry` says so."""
        if self._process is None:
            return
        deadline = time.monotonic() + self.patience
        while self.running and time.monotonic() < deadline and not hurry():
            time.sleep(0.02)
        self._bury(guardian)
        self._process = None

    def _bury(self, guardian: Guardian) -> None:
        """Kill what is left of it (a pool process outlives a killed parent) and collect it."""
        assert self._process is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        guardian.drop(self._process.pid)
