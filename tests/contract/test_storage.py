"""The contract of every storage, over every server that can be had here: a folder, moto, Ceph."""

from __future__ import annotations

import os
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NoReturn
from urllib.parse import parse_qsl, unquote, urlsplit

import botocore.auth
import pytest

from shared.errors import ObjectMissing, SettingsError, StorageMisconfigured, StorageUnavailable
from shared.settings import Settings, load_settings
from shared.storage import Storage, inline, open_storage, schemes
from shared.storage.file import FileStorage
from shared.storage.s3 import S3Storage, Timeouts
from tests.fakes.faulty_proxy import Fault, FaultyProxy
from tests.fakes.s3_server import BUCKET, S3Server, ceph_rgw, missing_ceph_programs, moto_server

#: where each scheme is tried; a new scheme needs a line here
PLACES = {"file": ["folder"], "s3": ["moto", "ceph"]}

PNG = bytes(range(256)) * 300


def missing(reason: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def settings_of(server: S3Server, **changes: object) -> Settings:
    """Settings for a prefix of its own on this server."""
    values: dict[str, object] = {
        "database_url": "postgresql://unused/unused",
        "redis_url": "redis://unused/0",
        "storage_url": f"s3://{BUCKET}/tests/{uuid.uuid4().hex}",
        "s3_endpoint_url": server.endpoint,
        "s3_access_key": server.access_key,
        "s3_secret_key": server.secret_key,
    }
    return load_settings(**(values | changes))


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    with moto_server() as server:
        yield server


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    if absent := missing_ceph_programs():
        missing(f"no Ceph here ({', '.join(absent)}): apt-get install ceph-mon ceph-osd ceph-common radosgw")
    with ceph_rgw(tmp_path_factory.mktemp("ceph")) as server:
        yield server


@pytest.fixture(params=[place for scheme in schemes() for place in PLACES.get(scheme, [scheme])])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """Settings of an empty storage."""
    if request.param == "folder":
        unused = S3Server("http://unused", "unused", "unused")
        return settings_of(unused, storage_url=(tmp_path / "with space #1").as_uri())
    return settings_of(request.getfixturevalue(request.param))


@pytest.fixture
def storage(settings: Settings) -> Storage:
    return open_storage(settings)


def follow(storage: Storage, link: str) -> tuple[int, str, str, bytes]:
    """Status, type, disposition and body, as a browser would get them; a link to the API is answered as there."""
    if link.startswith("/"):
        assert isinstance(storage, FileStorage)
        url = urlsplit(link)
        key = url.path.removeprefix("/files/")
        granted = storage.verify(key, dict(parse_qsl(url.query)))
        return 200, granted.content_type, inline(granted.filename), storage.get(key)
    try:
        with urllib.request.urlopen(link, timeout=10) as answer:
            return answer.status, answer.headers["Content-Type"], answer.headers["Content-Disposition"], answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, "", "", error.read()


def test_every_scheme_is_tried() -> None:
    assert sorted(PLACES) == schemes()


def test_what_is_put_is_what_is_read(storage: Storage) -> None:
    storage.put("t/1/a.png", PNG, content_type="image/png")
    storage.put("t/1/empty", b"", content_type="application/octet-stream")
    assert storage.get("t/1/a.png") == PNG
    assert storage.get("t/1/empty") == b""


def test_putting_again_replaces_the_whole_object(storage: Storage) -> None:
    storage.put("t/a", PNG, content_type="image/png")
    storage.put("t/a", b"short", content_type="text/plain")
    assert storage.get("t/a") == b"short"


def test_head_tells_size_and_time(storage: Storage) -> None:
    storage.put("t/a.png", PNG, content_type="image/png")
    info = storage.head("t/a.png")
    assert info is not None
    assert (info.key, info.size) == ("t/a.png", len(PNG))
    assert abs((datetime.now(UTC) - info.modified_at).total_seconds()) < 60


def test_what_is_not_there_is_missing(storage: Storage) -> None:
    storage.put("t/a.png", PNG, content_type="image/png")
    for key in ("t/b.png", "t", "t/a.png/c", "other/a"):
        assert storage.head(key) is None, key
        with pytest.raises(ObjectMissing):
            storage.get(key)


def test_delete_forgives_what_is_gone(storage: Storage) -> None:
    for key in ("t/1/a", "t/1/b", "t/2/c"):
        storage.put(key, b"x", content_type="text/plain")
    storage.delete(iter(["t/1/a", "t/2/c", "t/9/never", "t/1"]))
    assert [info.key for info in storage.list()] == ["t/1/b"]
    storage.delete(["t/1/a"])
    storage.delete([])


def test_delete_takes_more_keys_than_one_request_holds(storage: Storage) -> None:
    keys = [f"t/{i:04}" for i in range(1003)]
    for key in (keys[0], keys[1001], keys[1002]):
        storage.put(key, b"x", content_type="text/plain")
    storage.delete(keys[:-1])
    assert [info.key for info in storage.list()] == [keys[-1]]


def test_list_goes_in_order_of_key_and_by_prefix(storage: Storage) -> None:
    keys = ["a-b", "a.b", "a/1", "a/2/x", "a/2.x", "a0", "b/1"]
    for key in reversed(keys):
        storage.put(key, key.encode(), content_type="text/plain")
    assert [info.key for info in storage.list()] == sorted(keys)
    assert [info.key for info in storage.list("a/")] == ["a/1", "a/2.x", "a/2/x"]
    assert [info.key for info in storage.list("a/2")] == ["a/2.x", "a/2/x"]
    assert [(info.key, info.size) for info in storage.list("b/1")] == [("b/1", 3)]
    assert list(storage.list("nothing")) == []
    assert list(storage.list("../")) == []


def test_list_sees_its_own_prefix_only(storage: Storage, settings: Settings) -> None:
    neighbor = open_storage(settings.model_copy(update={"storage_url": settings.storage_url + "-2"}))
    neighbor.put("t/a", b"x", content_type="text/plain")
    assert list(storage.list()) == []
    assert storage.head("t/a") is None


@pytest.mark.parametrize(
    "key",
    ["", "/etc/passwd", "..", "../a", "a/../../b", "a/..", "a//b", "a/", "./a", "a/.hidden", "a\\b", "a\x00b", "a\n",
     "a b", "ä", "%2e%2e/a", "C:/a", "a" * 300, "a/" * 600 + "a"],
)  # fmt: skip
def test_keys_that_are_no_keys_are_refused(storage: Storage, key: str) -> None:
    for attempt in (
        lambda: storage.put(key, b"x", content_type="text/plain"),
        lambda: storage.get(key),
        lambda: storage.head(key),
        lambda: storage.delete([key]),
        lambda: storage.link(key, expires_in=60, content_type="text/plain", filename="a"),
    ):
        with pytest.raises(ValueError, match="not an object key"):
            attempt()


def test_link_reads_one_object_under_its_fixed_type_and_name(storage: Storage) -> None:
    storage.put("t/a.png", PNG, content_type="application/octet-stream")
    link = storage.link("t/a.png", expires_in=60, content_type="image/png", filename='of"fice\r\n 1.png')
    assert follow(storage, link) == (200, "image/png", 'inline; filename="of_fice__ 1.png"', PNG)


def test_list_leaves_out_what_others_keep_there(storage: Storage, settings: Settings) -> None:
    storage.put("t/a", b"x", content_type="text/plain")
    if isinstance(storage, FileStorage):
        folder = Path(unquote(urlsplit(settings.storage_url).path))
        (folder / "lost+found").mkdir()
        (folder / "lost+found" / "a").write_text("")
        (folder / "t" / ".nfs0001").write_text("")
    else:
        above = open_storage(settings.model_copy(update={"storage_url": f"s3://{BUCKET}"}))
        assert isinstance(above, S3Storage)
        prefix = urlsplit(settings.storage_url).path.strip("/")
        for foreign in (f"{prefix}/", f"{prefix}/t/", f"{prefix}/a b"):
            above._client.put_object(Bucket=BUCKET, Key=foreign, Body=b"")
    assert [info.key for info in storage.list()] == ["t/a"]


def test_check_passes_and_leaves_nothing(storage: Storage) -> None:
    storage.check()
    assert list(storage.list()) == []


@pytest.mark.parametrize(
    "url", ["s3:///prefix", "s3://bucket/../x", "s3://bucket/a?b=c", "file://relative/x", "file:///", "file:///a?b=c"]
)
def test_a_wrong_url_is_a_settings_error(url: str) -> None:
    with pytest.raises(SettingsError, match="STORAGE_URL"):
        open_storage(settings_of(S3Server("http://unused", "unused", "unused"), storage_url=url))


class TestRealS3:
    """What moto cannot prove: it believes every signature, every expiry and every checksum."""

    @pytest.fixture
    def link(self, ceph: S3Server) -> Callable[[int], str]:
        storage = open_storage(settings_of(ceph))
        for name in "ab":
            storage.put(f"t/{name}.png", PNG, content_type="image/png")
        return lambda seconds: storage.link("t/a.png", expires_in=seconds, content_type="image/png", filename="a.png")

    @pytest.mark.parametrize(
        ("part", "changed"),
        [
            ("a.png?", "b.png?"),
            ("X-Amz-Expires=60", "X-Amz-Expires=6000"),
            ("image%2Fpng", "text%2Fhtml"),
            ("filename%3D%22a", "filename%3D%22b"),
            ("X-Amz-Signature=", "X-Amz-Signature=0"),
        ],
    )
    def test_an_altered_link_is_refused(
        self, ceph: S3Server, link: Callable[[int], str], part: str, changed: str
    ) -> None:
        url = link(60)
        storage = open_storage(settings_of(ceph))
        assert follow(storage, url)[0] == 200
        assert part in url
        status, *_, body = follow(storage, url.replace(part, changed))
        assert status == 403
        assert PNG not in body

    def test_an_expired_link_is_refused(self, ceph: S3Server, link: Callable[[int], str]) -> None:
        storage, url = open_storage(settings_of(ceph)), link(1)
        until = time.monotonic() + 5
        while (status := follow(storage, url)[0]) == 200 and time.monotonic() < until:
            time.sleep(0.2)
        assert status == 403

    def test_a_link_is_signed_for_the_public_endpoint(self, ceph: S3Server) -> None:
        public = ceph.endpoint.replace("127.0.0.1", "localhost")
        storage = open_storage(settings_of(ceph, s3_public_endpoint_url=public))
        storage.put("t/a", PNG, content_type="image/png")
        link = storage.link("t/a", expires_in=60, content_type="image/png", filename="a.png")
        assert link.startswith(f"{public}/{BUCKET}/")
        assert follow(storage, link)[3] == PNG

    @pytest.mark.parametrize(
        ("change", "remedy"),
        [({"s3_secret_key": "wrong"}, "S3_SECRET_KEY"), ({"s3_access_key": "wrong"}, "S3_ACCESS_KEY")],
    )
    def test_wrong_keys_are_the_operators_matter(self, ceph: S3Server, change: dict[str, str], remedy: str) -> None:
        storage = open_storage(settings_of(ceph, **change))
        with pytest.raises(StorageMisconfigured, match=remedy):
            storage.check()
        with pytest.raises(StorageMisconfigured):
            storage.head("t/a")

    def test_a_missing_bucket_is_no_missing_object(self, ceph: S3Server) -> None:
        with pytest.raises(StorageMisconfigured, match="create the bucket"):
            open_storage(settings_of(ceph, storage_url="s3://no-such-bucket/x")).head("t/a")

    def test_a_wrong_clock_is_named(self, ceph: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        real = botocore.auth.get_current_datetime
        monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda *a, **k: real(*a, **k).replace(year=2020))
        with pytest.raises(StorageMisconfigured, match="clock"):
            open_storage(settings_of(ceph)).check()

    def test_a_body_changed_on_the_way_is_refused(self, ceph: S3Server) -> None:
        with FaultyProxy(ceph.endpoint) as proxy:
            settings = settings_of(ceph, s3_endpoint_url=proxy.endpoint)
            proxy.fault = "flip"
            with pytest.raises(StorageUnavailable, match="put t/a"):
                impatient(settings).put("t/a", PNG, content_type="image/png")
            proxy.fault = "none"
            assert impatient(settings).head("t/a") is None


def impatient(settings: Settings, read: float = 0.5, body: float = 10.0) -> S3Storage:
    prefix = urlsplit(settings.storage_url).path.strip("/")
    return S3Storage(settings, BUCKET, f"{prefix}/", Timeouts(connect=0.5, read=read, body=body))


class TestFaults:
    """What happens on the way to S3, and at its far end."""

    @pytest.fixture
    def proxy(self, moto: S3Server) -> Iterator[FaultyProxy]:
        with FaultyProxy(moto.endpoint) as proxy:
            yield proxy

    @pytest.fixture
    def direct(self, moto: S3Server) -> Storage:
        return open_storage(settings_of(moto, storage_url=f"s3://{BUCKET}/faults"))

    @pytest.fixture
    def behind(self, moto: S3Server, proxy: FaultyProxy) -> S3Storage:
        return impatient(settings_of(moto, storage_url=f"s3://{BUCKET}/faults", s3_endpoint_url=proxy.endpoint))

    @pytest.mark.parametrize("fault", ["cut", "hole", "busy", "broken"])
    def test_a_bad_way_is_unavailable_soon_and_stores_nothing(
        self, direct: Storage, behind: S3Storage, proxy: FaultyProxy, fault: Fault
    ) -> None:
        direct.delete(["t/a"])
        proxy.fault = fault
        started = time.monotonic()
        with pytest.raises(StorageUnavailable, match="S3 put t/a"):
            behind.put("t/a", PNG, content_type="image/png")
        assert time.monotonic() - started < 8
        assert 1 <= proxy.connections <= 3
        assert direct.head("t/a") is None
        proxy.fault = "none"
        behind.put("t/a", PNG, content_type="image/png")
        assert behind.get("t/a") == PNG

    def test_silence_ends_soon_for_every_call(self, behind: S3Storage, proxy: FaultyProxy) -> None:
        proxy.fault = "hole"
        for attempt in (lambda: behind.get("t/a"), lambda: list(behind.list())):
            started = time.monotonic()
            with pytest.raises(StorageUnavailable, match="timeout"):
                attempt()
            assert time.monotonic() - started < 6

    @pytest.mark.parametrize(
        ("fault", "attempt"),
        [
            ("trickle", lambda slow: slow.put("t/a", bytes(16_000_000), content_type="image/png")),
            ("drip", lambda slow: slow.get("t/large")),
        ],
    )
    def test_a_slow_way_ends_though_it_is_never_silent(
        self, moto: S3Server, direct: Storage, proxy: FaultyProxy, fault: Fault, attempt: Callable[[S3Storage], object]
    ) -> None:
        direct.put("t/large", bytes(16_000_000), content_type="image/png")
        settings = settings_of(moto, storage_url=f"s3://{BUCKET}/faults", s3_endpoint_url=proxy.endpoint)
        proxy.fault = fault
        started = time.monotonic()
        with pytest.raises(StorageUnavailable, match="too long"):
            attempt(impatient(settings, read=30.0, body=0.8))
        assert time.monotonic() - started < 8

    def test_an_answer_cut_short_is_no_object(self, direct: Storage, behind: S3Storage, proxy: FaultyProxy) -> None:
        direct.put("t/a", PNG, content_type="image/png")
        proxy.fault = "shorten"
        with pytest.raises(StorageUnavailable, match="S3 get t/a"):
            behind.get("t/a")

    def test_nobody_there(self, moto: S3Server) -> None:
        with pytest.raises(StorageUnavailable, match="S3_ENDPOINT_URL"):
            impatient(settings_of(moto, s3_endpoint_url="http://127.0.0.1:9")).check()

    def test_a_missing_bucket_is_the_operators_matter(self, moto: S3Server) -> None:
        storage = open_storage(settings_of(moto, storage_url="s3://no-such-bucket"))
        for attempt in (storage.check, lambda: storage.get("t/a"), lambda: list(storage.list())):
            with pytest.raises(StorageMisconfigured, match=r"no-such-bucket.*create the bucket"):
                attempt()

    def test_an_endpoint_that_is_not_s3_is_the_operators_matter(self, tmp_path: Path) -> None:
        class Page(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(404)
                self.end_headers()
                self.wfile.write(b"<html><body>nothing here</body>")

            def log_message(self, *_: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            unknown = S3Server(f"http://127.0.0.1:{server.server_port}", "a", "b")
            with pytest.raises(StorageMisconfigured):
                open_storage(settings_of(unknown)).check()
            server.shutdown()

    def test_no_keys_anywhere(self, moto: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        with pytest.raises(StorageMisconfigured, match="S3_ACCESS_KEY"):
            open_storage(settings_of(moto, s3_access_key=None, s3_secret_key=None)).check()
