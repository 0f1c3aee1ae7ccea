"""The API as it is deployed: gunicorn with our worker, over real connections."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from shared import tenants
from shared.database import transaction
from shared.services import Services
from shared.settings import PROJECT_ROOT
from tests.farm import Process, wait_for

#: what nobody may have to wait for
SOON = 1.0


@dataclass(frozen=True)
class Server:
    """A running server and a key for it."""

    process: Process
    port: int
    key: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url(path), headers=self.headers, timeout=20)

    def post(self, path: str, data: object, **headers: str) -> requests.Response:
        return requests.post(self.url(path), data=data, headers={**self.headers, **headers}, timeout=20)  # type: ignore[arg-type]

    def submit(self, *prompts: str) -> str:
        """The id of the first job."""
        answer = self.post("/api/v1/batches", json.dumps({"model": "fake", "prompts": prompts}))
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"]).replace("batch", "job") + "_0"

    def raw(self, data: bytes) -> bytes:
        """The beginning of the answer to these bytes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as client:
            client.sendall(data)
            return client.recv(400)

    def seconds_of(self, path: str) -> float:
        """How long a short request takes."""
        began = time.monotonic()
        assert self.get(path).status_code == 200
        return time.monotonic() - began


@pytest.fixture
def server(services: Services, api_key: str, tmp_path: Path) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    own = {"listen": f"127.0.0.1:{port}", "max_body_bytes": 20_000_000, "api_threads": 32}
    settings = services.settings.model_copy(update=own)
    with Process([sys.executable, "-m", "api.serve"], settings, tmp_path / "api.log", HOME=str(tmp_path)) as process:
        running = Server(process, port, api_key)

        def ready() -> bool:
            assert process.popen.poll() is None, process.text()
            try:
                return requests.get(running.url("/readyz"), timeout=5).status_code == 200
            except requests.ConnectionError:
                return False

        wait_for(ready, what="readiness")
        yield running


def test_held_polls_hold_nobody_up_and_end_with_the_server(server: Server, tmp_path: Path) -> None:
    job = server.submit("a")
    answers: list[requests.Response] = []
    polls = [
        threading.Thread(target=lambda: answers.append(server.get(f"/api/v1/jobs/{job}?wait=60"))) for _ in range(20)
    ]
    for poll in polls:
        poll.start()
    time.sleep(0.3)
    assert max(server.seconds_of(f"/api/v1/jobs/{job}") for _ in range(5)) < SOON
    assert max(server.seconds_of("/healthz") for _ in range(5)) < SOON
    assert sum(poll.is_alive() for poll in polls) >= 12, "one tenant holds 12 of 32 threads in each process at most"

    began = time.monotonic()
    server.process.popen.send_signal(signal.SIGTERM)
    assert server.process.popen.wait(20) == 0
    assert time.monotonic() - began < 8
    for poll in polls:
        poll.join()
    assert [(answer.status_code, answer.json()["state"]) for answer in answers] == [(200, "queued")] * 20
    said = server.process.text()
    assert not {"Traceback", "ERROR", "CRITICAL"} & set(said.replace("[", " ").replace("]", " ").split()), said
    assert not list(tmp_path.glob("**/gunicorn.ctl"))


def test_slow_and_malformed_clients_hold_nobody_up(server: Server, services: Services) -> None:
    with transaction(services.engine) as connection:
        other = tenants.create_key(connection, tenants.ensure_tenant(connection, "other"), "theirs")
    neighbor = Server(server.process, server.port, other)
    head = "POST /api/v1/batches HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"
    chunked = head.replace("Content-Length: 1000", "Transfer-Encoding: chunked")
    openings = [
        b"",
        b"GET /healthz HTTP/1.1\r\nHos",
        f"{head}\r\n{{".encode(),
        f"{head}Authorization: Bearer {server.key}\r\n\r\n{{".encode(),
        f"{chunked}\r\n5\r\n{{".encode(),
    ]
    with ExitStack() as held:
        for index in range(250):
            slow = held.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            slow.sendall(openings[index % len(openings)])
        time.sleep(0.2)
        for _ in range(4):
            began = time.monotonic()
            job = neighbor.submit("a")
            assert time.monotonic() - began < SOON
            assert neighbor.seconds_of(f"/api/v1/jobs/{job}") < SOON

    for data, status in (
        (b"GET /" + b"a" * 9_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 9_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 100 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: aaaaaaa\r\n" * 20_000, 431),
        (f"{head}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode(), 400),
        (f"{head}Content-Length: 4\r\n\r\n".encode(), 400),
        (f"{chunked}Authorization: Bearer {server.key}\r\n\r\nzz\r\n".encode(), 400),
        (b"GET /\x1b[31m HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 tls \r\n\r\n", 400),
    ):  # fmt: skip
        assert server.raw(data).startswith(f"HTTP/1.1 {status} ".encode()), data[:60]
    assert "\x1b" not in server.process.text()
    assert "Traceback" not in server.process.text()
    # two requests at once, in pieces: the second one waits for the first
    one = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        client.sendall(one + one[:20])
        time.sleep(0.1)
        client.sendall(one[20:])
        received = b""
        while received.count(b'{"status":"ok"}') < 2:
            part = client.recv(4000)
            assert part, received
            received += part


def test_large_bodies(server: Server) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b" " * 100_000

    for data in (endless(), b" " * 20_000_001):
        answer = server.post("/api/v1/batches", data)
        assert (answer.status_code, answer.json()["type"]) == (413, "urn:imagefarm:problem:body-too-large")

    prompts = [f"a picture of a fox, number {i}, " + "x" * 70 for i in range(100_000)]
    body = json.dumps({"model": "fake", "prompts": prompts}).encode()
    pieces = (body[start : start + 50_000] for start in range(0, len(body), 50_000))
    answer = server.post("/api/v1/batches", pieces)
    assert (answer.status_code, answer.json()["job_count"]) == (202, 100_000)
    peaks = [peak_megabytes(pid) for pid in server_processes(server.process.pid)]
    assert peaks
    assert max(peaks) < 400, peaks


def server_processes(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def peak_megabytes(pid: int) -> float:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def test_the_api_loads_no_engine_and_opens_nothing_at_import() -> None:
    code = (
        "import sys, api.serve, api.wsgi, api.dialects; list(api.dialects.found()); "
        "print({'torch', 'diffusers', 'transformers', 'celery'} & {*sys.modules}, api.wsgi._api.cache_info().currsize)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True, env={}
    )
    assert told.stdout.strip() == "set() 0"


def test_wrong_settings_are_told_in_one_line() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "api.serve"], cwd=PROJECT_ROOT, capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", "REDIS_URL": "redis://h", "STORAGE_URL": "file:///x"},
    )  # fmt: skip
    assert told.returncode == 2
    assert told.stderr.startswith("DATABASE_URL: is not set")
    assert len(told.stderr.splitlines()) == 1
