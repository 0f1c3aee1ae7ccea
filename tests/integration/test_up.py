"""`imagefarm up` as people use it: a real process tree, stopped politely, rudely and by surprise."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from imagefarm import Batch, Farm
from imagefarm.connection import read_client_file
from shared.settings import PROJECT_ROOT
from tests.farm import free_port, wait_for

#: a killed worker is missed after this many seconds
LEASE_SECONDS = 2.0


class Up:
    """One `imagefarm up` in a subprocess, and what it says."""

    def __init__(self, data: Path, port: int, *extra: str) -> None:
        self.data = data
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OUTER_")}
        environment |= {
            "PYTHONPATH": str(PROJECT_ROOT),
            "IMAGEFARM_LEASE_SECONDS": str(LEASE_SECONDS),
            "IMAGEFARM_HEARTBEAT_SECONDS": str(LEASE_SECONDS / 4),
            "IMAGEFARM_KEEPER_SECONDS": "0.3",
            "IMAGEFARM_CANCEL_POLL_SECONDS": "0.1",
        }
        self._output = data.parent / "up.log"
        command = [sys.executable, "-P", "-m", "imagefarm", "up", "--data", str(data), "--models", "fake"]
        with self._output.open("wb") as output:
            self.popen = subprocess.Popen(
                [*command, "--listen", f"127.0.0.1:{port}", *extra],
                env=environment,
                cwd=data.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def says(self, text: str) -> bool:
        return text in self.text

    @property
    def text(self) -> str:
        return self._output.read_text(errors="replace")

    def ready(self) -> Farm:
        """The client, once the banner is there."""
        wait_for(lambda: self.says("imagefarm is up") or self.popen.poll() is not None, 60, "the banner")
        assert self.popen.poll() is None, self.text
        address = read_client_file(self.data)
        assert address is not None
        return Farm(address.url, address.api_key)

    def stop(self, number: int = signal.SIGINT) -> int:
        self.popen.send_signal(number)
        return self.popen.wait(40)


def processes_of(data: Path) -> dict[int, str]:
    """Every process of the farm in `data`, found by its command line, environment or working folder."""
    found = {}
    mark = data.parent.parent.name
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = " ".join(process.cmdline())
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if any(mark in place for place in (words, process.cwd(), *process.environ().values())):
                found[process.pid] = words
    return found


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def data() -> Iterator[Path]:
    """A data folder that the tests of this file use one after the other, as a machine's owner would.

    Its path holds what shells and URLs read as something else.
    """
    with tempfile.TemporaryDirectory(prefix="imagefarm-") as folder:
        data = Path(folder).resolve() / 'Zoë\'s "farm"; $HOME %20#?' / "farm-data"
        data.parent.mkdir()
        yield data
        for pid in processes_of(data):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def up(data: Path, port: int) -> Iterator[Callable[..., Up]]:
    """Starts farms in the shared data folder; ends them however the test ended."""
    started: list[Up] = []

    def start(*extra: str) -> Up:
        started.append(Up(data, port, *extra))
        return started[-1]

    yield start
    for one in started:
        if one.popen.poll() is None:
            one.popen.kill()
            one.popen.wait()
            print(one.text)
    wait_for(lambda: not processes_of(data), 30, "the end of every process")


def worker_pid(data: Path) -> int:
    """The main process of the one worker."""
    pids = {pid for pid, words in processes_of(data).items() if "worker.app" in words}
    return next(pid for pid in pids if psutil.Process(pid).ppid() not in pids)


def assert_whole(batch: Batch, folder: Path) -> None:
    """Every job is there once, done, with a picture of its own that arrives as it was stored."""
    jobs = list(batch.jobs())
    assert [job.index for job in jobs] == list(range(batch.job_count))
    assert {job.state for job in jobs} == {"succeeded"}
    assert batch.refresh().counts["succeeded"] == batch.job_count
    done = batch.download(folder)
    assert done.saved == batch.job_count
    found = {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert found == {job.image.sha256 for job in jobs if job.image}


def test_from_nothing_to_pictures_through_deaths_to_a_clean_end(
    up: Callable[..., Up], data: Path, port: int, tmp_path: Path
) -> None:
    farm_process = up()
    with farm_process.ready() as farm:
        for text in (f"http://127.0.0.1:{port}", "fake", str(data), "imagefarm submit", "Ctrl-C stops the farm"):
            assert farm_process.says(text)
        assert stat.S_IMODE((data / "client.json").stat().st_mode) == 0o600
        assert stat.S_IMODE((data / "farm.json").stat().st_mode) == 0o600
        batch = farm.submit([f"picture {n}" for n in range(6)], model="fake").wait(30)
        assert_whole(batch, tmp_path / "pictures")
        wait_for(lambda: farm_process.says("is ready for fake"), 20, "news of the worker")

        # the same folder and the same port are refused, with the remedy
        second = subprocess.run(
            [sys.executable, "-m", "imagefarm", "up", "--data", str(data), "--listen", f"127.0.0.1:{free_port()}"],
            capture_output=True, text=True, check=False, cwd=PROJECT_ROOT, timeout=30,
        )  # fmt: skip
        assert second.returncode == 1
        assert f"a farm already runs on {data} (process {farm_process.popen.pid})" in second.stderr
        assert "--data OTHER_FOLDER" in second.stderr
        third = subprocess.run(
            [sys.executable, "-m", "imagefarm", "up", "--data", str(tmp_path / "d"), "--listen", f"127.0.0.1:{port}"],
            capture_output=True, text=True, check=False, cwd=PROJECT_ROOT, timeout=30,
        )  # fmt: skip
        assert third.returncode == 1
        assert f"cannot listen on 127.0.0.1:{port}" in third.stderr

        # what dies is started again, and nothing is lost or done twice
        batch = farm.submit(["p"] * 60, model="fake", parameters={"step_image_seconds": 0.02})
        wait_for(lambda: batch.refresh().state == "rendering", what="the first pass")
        os.kill(worker_pid(data), signal.SIGKILL)
        os.kill(next(pid for pid, words in processes_of(data).items() if "redis-server" in words), signal.SIGKILL)
        assert_whole(batch.wait(30), tmp_path / "after deaths")
    assert farm_process.says("worker-1 was killed by SIGKILL; starting it again")
    assert farm_process.says("Redis has died; starting it again")

    assert len(processes_of(data)) > 5
    assert farm_process.stop() == 0
    assert "Traceback" not in farm_process.text
    assert processes_of(data) == {}
    assert not (data / "farm.json").exists()


def test_the_next_start_goes_on_after_a_kill_and_after_a_stop(
    up: Callable[..., Up], data: Path, tmp_path: Path
) -> None:
    first = up()
    with first.ready() as farm:
        key = (data / "client.json").read_text()
        batch = farm.submit(["p"] * 40, model="fake", parameters={"step_image_seconds": 0.05})
        wait_for(lambda: batch.refresh().state == "rendering", what="the first pass")
    first.popen.kill()
    first.popen.wait()

    second = up()  # waits for what is left of the first
    with second.ready() as farm:
        assert_whole(farm.batch(batch.id).wait(30), tmp_path / "after the kill")
        batch = farm.submit(["p"] * 40, model="fake", parameters={"step_image_seconds": 0.05})
        wait_for(lambda: batch.refresh().state == "rendering", what="the first pass")
    assert second.stop(signal.SIGTERM) == 0
    assert processes_of(data) == {}

    third = up()
    with third.ready() as farm:
        assert (data / "client.json").read_text() == key
        assert_whole(farm.batch(batch.id).wait(30), tmp_path / "after the stop")
        slow = farm.submit(["p"], model="fake", parameters={"step_seconds": 20})
        wait_for(lambda: slow.refresh().state == "rendering", what="the slow pass")
    # a second signal: what still runs is not waited for
    third.popen.send_signal(signal.SIGINT)
    wait_for(lambda: third.says("stopping"), what="the word of the end")
    began = time.monotonic()
    assert third.stop() == 0
    assert time.monotonic() - began < 15
    assert processes_of(data) == {}

    (data / "client.json").write_text('{"url":')
    fourth = up()
    with fourth.ready() as farm:
        assert farm.batch(batch.id).succeeded == 40
    assert fourth.stop() == 0
