"""Fetching what a vendor links to: from a real server, and never from where the vendor must not send us."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shared.errors import Permanent, Transient
from tests.fakes.openai_server import Answer, ImagesServer
from worker import download
from worker.download import is_public

FILE = b"0123456789" * 1000


@pytest.fixture
def vendor(monkeypatch: pytest.MonkeyPatch) -> Iterator[ImagesServer]:
    monkeypatch.setattr(download, "SECONDS", 1.0)
    with ImagesServer() as server:
        yield server


@pytest.fixture
def fetch(vendor: ImagesServer) -> Callable[[str], bytes]:
    return lambda url: download.download(url, trusted=vendor.base_url, max_bytes=100_000)


def test_it_is_tried_again_since_the_image_is_paid_for(fetch: Callable[[str], bytes], vendor: ImagesServer) -> None:
    url = vendor.serve("a", Answer(503, "busy"), Answer(body=FILE, cut=20), Answer(body=FILE))
    assert fetch(url) == FILE
    assert len(vendor.fetched) == 3


@pytest.mark.parametrize(
    "fault", [Answer(404, "gone"), Answer(body=FILE, cut=20), Answer(delay=5.0), Answer(body=FILE, drip=0.05)]
)
def test_it_is_given_up_in_time(fetch: Callable[[str], bytes], vendor: ImagesServer, fault: Answer) -> None:
    started = time.monotonic()
    with pytest.raises(Transient, match="was made but could not be fetched"):
        fetch(vendor.serve("a", fault))
    assert time.monotonic() - started < 3


def test_nobody_there() -> None:
    with pytest.raises(Transient, match="could not be fetched"):
        download.download("http://127.0.0.1:9/a", trusted="http://127.0.0.1:9/v1", max_bytes=1)


def test_an_oversized_file_is_refused(fetch: Callable[[str], bytes], vendor: ImagesServer) -> None:
    with pytest.raises(Permanent, match="max_bytes"):
        fetch(vendor.serve("a", Answer(body=b" " * 100_001)))
    assert len(fetch(vendor.serve("a", Answer(body=b" " * 100_000)))) == 100_000


def test_redirects_are_not_followed(fetch: Callable[[str], bytes], vendor: ImagesServer) -> None:
    there = vendor.serve("b", Answer(body=FILE))
    with pytest.raises(Permanent, match="redirects"):
        fetch(vendor.serve("a", Answer(302, b"", {"Location": there})))
    assert vendor.fetched == ["a"]


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/",
        "https://169.254.169.254/latest/meta-data/",
        "https://127.0.0.1/a.png",
        "https://[::1]/a.png",
        "https://[::ffff:127.0.0.1]/a.png",
        "https://0x7f.1/a.png",
        "https://localhost/a.png",
        "https://10.0.0.1/a.png",
        "http://93.184.216.34/a.png",
        "file:///etc/passwd",
        "gopher://127.0.0.1/",
        "ftp://127.0.0.1/a.png",
        "https://user:password@93.184.216.34/a.png",
        "https://93.184.216.34:99999/a.png",
        "https://[::1/a.png",
        "https:///a.png",
        "//93.184.216.34/a.png",
        "https://93.184.216.34/a b",
        "https://exämple.com/a",
        "",
    ],
)
def test_urls_that_lead_elsewhere_are_refused(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    reached: list[Any] = []
    monkeypatch.setattr(socket, "create_connection", lambda address, **_: reached.append(address))
    with pytest.raises(Permanent, match="URL") as raised:
        download.download(url, trusted="http://127.0.0.1:8000/v1", max_bytes=1000)
    assert raised.value.reason == "invalid_answer"
    assert reached == []


def test_every_address_of_a_name_must_be_public(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 443)) for ip in ("93.184.216.34", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(Permanent, match="private network"):
        download.download("https://images.example/a", trusted="http://127.0.0.1:8000/v1", max_bytes=1000)


def test_the_checked_address_is_the_one_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that answers otherwise the second time leads nowhere else."""
    answers = iter(["93.184.216.34", "127.0.0.1", "127.0.0.1", "127.0.0.1"])
    reached: list[Any] = []

    def resolve(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), 443))]

    def connect(address: Any, **_: Any) -> socket.socket:
        reached.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(Permanent, match="private network"):
        download.download("https://images.example/a", trusted="http://127.0.0.1:8000/v1", max_bytes=1000)
    assert reached == [("93.184.216.34", 443)]


def test_trust_ends_at_the_origin(fetch: Callable[[str], bytes], vendor: ImagesServer) -> None:
    """Another port of the vendor's own host, or another name for it, is not the vendor."""
    with ImagesServer() as other:
        url = other.serve("a", Answer(body=FILE))
        with pytest.raises(Permanent, match="not https"):
            fetch(url)
        with pytest.raises(Permanent, match="private network"):
            fetch(url.replace("http://", "https://"))
        with pytest.raises(Permanent, match="not https"):
            fetch(vendor.serve("a", Answer(body=FILE)).replace("127.0.0.1", "localhost"))
    assert other.fetched == vendor.fetched == []


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("64:ff9b::5db8:d822", True),
        ("::ffff:93.184.216.34", True),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:169.254.169.254", False),
        ("2002:a9fe:a9fe::1", False),
        ("64:ff9b::a9fe:a9fe", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public
