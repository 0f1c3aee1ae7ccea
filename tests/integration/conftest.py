"""A farm as `imagefarm up` starts it, which the tests of a file share."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from imagefarm import Batch, Farm
from imagefarm.cli import cli
from imagefarm.connection import read_client_file
from imagefarm.local_farm import LocalFarm, Wanted
from tests.farm import free_port

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def data() -> Iterator[Path]:
    """The data folder of a farm that runs while the tests of this file do."""
    # not below pytest's own folder: each session closes that to other users, and as root PostgreSQL is one
    with tempfile.TemporaryDirectory(prefix="imagefarm-") as folder:
        yield from _farm_in(Path(folder) / "farm-data")


def _farm_in(folder: Path) -> Iterator[Path]:
    wanted = Wanted(folder, f"127.0.0.1:{free_port()}", models=("fake",), self_contained=True)
    said: list[str] = []
    finished = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMAGEFARM_CANCEL_POLL_SECONDS", "0.1")
        patch.setenv("IMAGEFARM_KEEPER_SECONDS", "0.5")
        patch.setenv("IMAGEFARM_HEARTBEAT_SECONDS", "0.4")
        with LocalFarm(wanted, said.append) as local:
            tending = threading.Thread(target=local.tend_until, args=(finished,))
            tending.start()
            try:
                yield folder
            finally:
                finished.set()
                tending.join()
    assert said == [], "nothing died and nothing complained"


@pytest.fixture
def farm(data: Path) -> Iterator[Farm]:
    address = read_client_file(data)
    assert address is not None
    with Farm(address.url, address.api_key) as client:
        yield client


@pytest.fixture
def run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in an empty folder, with the farm named by its data folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IMAGEFARM_DATA", str(data))

    def call(*arguments: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(cli, list(arguments), input=stdin)

    return call


@pytest.fixture(scope="module")
def finished(data: Path) -> Batch:
    """A batch of twelve pictures, done."""
    address = read_client_file(data)
    assert address is not None
    with Farm(address.url, address.api_key) as client:
        return client.submit([f"Picture {n}!" for n in range(12)], model="fake", parameters={"seed": 5}).wait(30)
