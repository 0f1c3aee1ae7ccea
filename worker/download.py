"""Fetches a picture from a URL that a vendor gave us, without letting the vendor choose where we reach."""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import time
from urllib.parse import SplitResult, urlsplit

import httpx2

from shared.errors import Permanent, Transient

TRIES = 3
#: for all tries together
SECONDS = 60.0


class _Failed(Exception):
    """May work the next time."""


def download(url: str, *, trusted: str, max_bytes: int) -> bytes:
    """The bytes behind `url`, at most `max_bytes`.

    Https to public addresses only, and no redirects. The origin of the URL `trusted`, which the operator chose, may
    also be plain http or in a private network. Raises `Permanent` (reason `invalid_answer`) for a URL or an answer that
    is not accepted, and `Transient` after a few tries: they cost nothing, while the picture is paid for.
    """
    deadline = time.monotonic() + SECONDS
    for attempt in range(TRIES):
        try:
            return _fetch(url, urlsplit(trusted), max_bytes, deadline, attempt)
        except (_Failed, OSError, http.client.HTTPException) as error:
            if attempt == TRIES - 1 or time.monotonic() > deadline:
                reason = str(error)[:200] or type(error).__name__
                raise Transient(f"the image was made but could not be fetched: {reason}") from None
            time.sleep(0.2 * 2**attempt)
    raise AssertionError


def _fetch(url: str, trusted: SplitResult, max_bytes: int, deadline: float, attempt: int) -> bytes:
    """One GET. The checked address itself is connected to, so a second answer of the name server changes nothing."""
    try:
        parts = urlsplit(url)
        scheme, host, port = _origin(parts)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not (host.isascii() and re.fullmatch(r"[!-~]+", host + target)) or parts.username is not None:
            raise ValueError
    except ValueError:
        raise _refused("is malformed") from None
    ours = (scheme, host, port) == _origin(trusted)
    if not ours and scheme != "https":
        raise _refused("is not https")
    addresses = [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not ours and not all(map(is_public, addresses)):
        raise _refused(f"leads into a private network ({host})")
    with socket.create_connection((addresses[attempt % len(addresses)], port), timeout=_left(deadline)) as plain:
        connection: http.client.HTTPConnection
        if scheme == "https":
            connection = http.client.HTTPSConnection(host, port)
            link: socket.socket = httpx2.create_ssl_context().wrap_socket(plain, server_hostname=host)
        else:
            connection, link = http.client.HTTPConnection(host, port), plain
        with link:
            connection.sock = link
            connection.request("GET", target, headers={"Connection": "close"})
            with connection.getresponse() as answer:
                return _body(answer, link, max_bytes, deadline)


def _body(answer: http.client.HTTPResponse, link: socket.socket, max_bytes: int, deadline: float) -> bytes:
    if 300 <= answer.status < 400:
        raise _refused("redirects, which is not followed")
    if answer.status != 200:
        raise _Failed(f"status {answer.status}")
    data = bytearray()
    while True:
        link.settimeout(_left(deadline))
        chunk = answer.read1(64 * 1024)
        if not chunk:
            break
        data += chunk
        if len(data) > max_bytes:
            raise _refused("gives more than `max_bytes` of this model")
    if answer.length:
        raise _Failed("the connection ended within the image")
    return bytes(data)


def _origin(parts: SplitResult) -> tuple[str, str, int]:
    """Scheme, host and port. Raises `ValueError` where one is missing or unknown."""
    port = parts.port or {"https": 443, "http": 80}.get(parts.scheme)
    if not parts.hostname or port is None or parts.scheme not in ("http", "https"):
        raise ValueError
    return parts.scheme, parts.hostname, port


def _refused(why: str) -> Permanent:
    return Permanent(f"the image's URL {why}", "invalid_answer")


def _left(deadline: float) -> float:
    if (left := deadline - time.monotonic()) <= 0:
        raise _Failed("it takes too long")
    return left


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet; one that carries an IPv4 address is judged by that."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(found) & 0xFFFF_FFFF)
        found = inner or found
    return found.is_global and not found.is_multicast
