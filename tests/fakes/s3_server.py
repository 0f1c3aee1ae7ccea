"""Real S3 servers on loopback for the tests, and a TCP proxy that damages what passes through it."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from boto3.session import Session

CEPH_PROGRAMS = ("ceph-mon", "ceph-osd", "ceph", "monmaptool", "radosgw", "radosgw-admin")
BUCKET = "imagefarm-tests"


@dataclass(frozen=True)
class S3Server:
    """Where a server is, and keys that may do everything there. `BUCKET` exists."""

    endpoint: str
    access_key: str
    secret_key: str


def _with_bucket(server: S3Server) -> S3Server:
    keys = {"aws_access_key_id": server.access_key, "aws_secret_access_key": server.secret_key}
    client = Session().client("s3", endpoint_url=server.endpoint, region_name="us-east-1", **keys)
    client.create_bucket(Bucket=BUCKET)
    client.close()
    return server


@contextlib.contextmanager
def moto_server(host: str = "127.0.0.1") -> Iterator[S3Server]:
    """Moto: starts in a second, but believes every signature and every expiry."""
    command = [sys.executable, "-m", "moto.server", "-H", host, "-p", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            address = re.compile(rf"http://{re.escape(host)}:\d+")
            found = next(filter(None, map(address.search, process.stdout)), None)
            assert found, "moto did not start"
            drain = threading.Thread(target=process.stdout.read)  # a full pipe would stop it
            drain.start()
            try:
                yield _with_bucket(S3Server(found[0], "AKmoto", "SKmoto"))
            finally:
                process.kill()
                drain.join()
        finally:
            process.kill()


def missing_ceph_programs() -> list[str]:
    """What `ceph_rgw` needs and is not installed."""
    return [name for name in CEPH_PROGRAMS if shutil.which(name) is None]


@contextlib.contextmanager
def ceph_rgw(folder: Path) -> Iterator[S3Server]:
    """Ceph's S3 gateway: refuses wrong signatures, expired links and damaged bodies, as AWS does."""
    s3_port, monitor_port = _free_ports()
    script = Path(__file__).with_name("start_ceph_rgw.sh")
    command = ["bash", str(script), str(folder), str(s3_port), str(monitor_port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            ready = process.stdout.readline()
            assert ready == "ready\n", f"Ceph did not start:\n{(folder / 'log' / 'start.log').read_text()[-2000:]}"
            yield _with_bucket(S3Server(f"http://127.0.0.1:{s3_port}", "AKtests", "SKtests"))
        finally:
            process.stdin.close()


def _free_ports() -> tuple[int, int]:
    """A port for S3, and one below the range of ephemeral ports with forty free ones after it."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        s3_port = found.getsockname()[1]
    for first in range(10_000 + s3_port % 200 * 100, 32_000, 100):
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for port in (first, *range(first + 10, first + 15)):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return s3_port, first
    raise AssertionError("no free ports")


#: damage to what the client sends: change a byte, end within the body, at most 1.3 MB/s; the last two to what it
#: receives; `hole` never answers, `busy` answers 503 by itself
Fault = Literal["none", "flip", "cut", "trickle", "hole", "busy", "shorten", "drip"]
_DAMAGE_TO_ANSWER: dict[Fault, Fault] = {"shorten": "cut", "drip": "trickle"}
_DAMAGE_AT = 50_000
_BUSY_BODY = b"<Error><Code>ServiceUnavailable</Code><Message>Please come back later</Message></Error>"
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (
    len(_BUSY_BODY),
    _BUSY_BODY,
)


class FaultyProxy:
    """Stands before a server; set `fault` to choose what happens to connections that follow."""

    def __init__(self, target: str) -> None:
        self._target = (str(urlsplit(target).hostname), urlsplit(target).port or 80)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._closed = threading.Event()
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.fault: Fault = "none"
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        for each in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            # inherited by the connections: what is not read soon stands still at the sender
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
            while True:
                client, _ = self._listener.accept()
                self._open.append(client)
                self.connections += 1
                threading.Thread(target=self._serve, args=(client, self.fault), daemon=True).start()

    def _serve(self, client: socket.socket, fault: Fault) -> None:
        if fault == "hole":
            return
        with contextlib.suppress(OSError):
            if fault == "busy":
                client.recv(65_536)
                client.sendall(_BUSY)
                client.shutdown(socket.SHUT_RDWR)
                return
            server = socket.create_connection(self._target)
            self._open.append(server)
            answer = _DAMAGE_TO_ANSWER.get(fault, "none")
            threading.Thread(target=self._pump, args=(server, client, answer), daemon=True).start()
            self._pump(client, server, fault)

    def _pump(self, source: socket.socket, sink: socket.socket, fault: Fault) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                within = passed <= _DAMAGE_AT < passed + len(data)
                if within and fault == "flip":
                    at = _DAMAGE_AT - passed
                    data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
                if within and fault == "cut":
                    sink.sendall(data[: _DAMAGE_AT - passed])
                    break
                sink.sendall(data)
                passed += len(data)
                if fault == "trickle" and self._closed.wait(0.05):
                    break
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
