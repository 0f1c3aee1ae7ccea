"""Real S3 servers on loopback for the tests."""

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
