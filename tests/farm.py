"""Starts the real processes of a farm for tests: Celery workers and keepers, on the test's own settings."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from shared.queue import queue_name
from shared.settings import PROJECT_ROOT, Settings, environment_of

T = TypeVar("T")


def free_port() -> int:
    """A TCP port of this machine on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(look: Callable[[], T], seconds: float = 30.0, what: str = "the condition") -> T:
    """Look until the answer is true-ish; returns it. Fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (answer := look()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true within {seconds} s")
        time.sleep(0.05)
    return answer


class Process:
    """A child process in a session of its own, with its output in a file; ended with the block."""

    def __init__(
        self,
        arguments: list[str],
        settings: Settings,
        log: Path,
        cwd: Path | None = None,
        within: Sequence[str] = (),
        **extra: str,
    ) -> None:
        """`within` is a command that runs `arguments` somewhere else, such as in a network namespace."""
        self.log = log
        self._arguments = [*within, *arguments]
        self._cwd = cwd or PROJECT_ROOT
        keep = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
        self._environment = {name: os.environ[name] for name in keep if name in os.environ}
        self._environment |= {"PYTHONPATH": str(PROJECT_ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        self._environment |= {"OMP_WAIT_POLICY": "PASSIVE"}  # as `imagefarm worker` sets it
        self._environment |= environment_of(settings) | extra

    def __enter__(self) -> Process:
        with self.log.open("ab") as output:
            self.popen = subprocess.Popen(
                self._arguments,
                cwd=self._cwd,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return self

    @property
    def pid(self) -> int:
        return self.popen.pid

    def text(self) -> str:
        """What the process has said so far."""
        return self.log.read_text(errors="replace")

    def kill_group(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the process and all its children."""
        os.killpg(self.popen.pid, number)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.popen.poll() is None:
            self.popen.terminate()
            try:
                self.popen.wait(10)
            except subprocess.TimeoutExpired:
                self.kill_group()
                self.popen.wait()
        if error is not None:
            print(f"--- {self.log.name}\n{self.text()[-5000:]}")


def celery_worker(
    settings: Settings, log: Path, *models: str, cwd: Path | None = None, within: Sequence[str] = (), **extra: str
) -> Process:
    """A render worker for these models, as `imagefarm worker` starts it."""
    queues = ",".join(queue_name(model) for model in models)
    arguments = [
        *(sys.executable, "-m", "celery", "-A", "worker.app", "worker"),
        *("--without-gossip", "--without-mingle", "--without-heartbeat"),
        *("-Q", queues, "-n", f"{log.stem}@%h", "-l", "WARNING"),
    ]
    serving = {"IMAGEFARM_WORKER_MODELS": ",".join(models), "C_FORCE_ROOT": "1"}
    return Process(arguments, settings, log, cwd, within, **serving, **extra)


def keeper(settings: Settings, log: Path, within: Sequence[str] = (), **extra: str) -> Process:
    """A keeper process."""
    return Process([sys.executable, "-m", "worker.keeper"], settings, log, within=within, **extra)


def api_server(settings: Settings, log: Path, within: Sequence[str] = ()) -> Process:
    """An API process on the address that the settings name."""
    return Process([sys.executable, "-m", "api.serve"], settings, log, within=within)
