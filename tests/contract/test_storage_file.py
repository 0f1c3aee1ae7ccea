"""What is particular to objects in a folder: its own links, its secret, full disks, and links that lead out."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest

from shared.errors import LinkExpired, LinkRefused, ObjectMissing, StorageMisconfigured, StorageUnavailable
from shared.storage.file import ABANDONED_AFTER, FileStorage, SignedLink

DATA = bytes(300_000)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "objects"


@pytest.fixture
def storage(root: Path) -> FileStorage:
    return FileStorage(root)


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


class TestLinks:
    @pytest.fixture
    def query(self, storage: FileStorage) -> dict[str, str]:
        link = storage.link("t/a.png", expires_in=60, content_type="image/png", filename="ä 1&2.png")
        assert urlsplit(link).path == "/files/t/a.png"
        return dict(parse_qsl(urlsplit(link).query))

    def test_a_link_grants_its_type_and_name(self, storage: FileStorage, query: dict[str, str]) -> None:
        assert storage.verify("t/a.png", query) == SignedLink("image/png", "ä 1&2.png")

    @pytest.mark.parametrize(
        "change",
        [
            {"expires": "99999999999"},
            {"expires": "soon"},
            {"type": "text/html"},
            {"filename": "b.png"},
            {"type": "image/pngä", "filename": " 1&2.png"},
            {"signature": ""},
            {"signature": "é"},
            {"signature": "\udce9"},
            {"signature": "0" * 64},
        ],
    )
    def test_an_altered_link_is_refused(
        self, storage: FileStorage, query: dict[str, str], change: dict[str, str]
    ) -> None:
        with pytest.raises(LinkRefused):
            storage.verify("t/a.png", query | change)

    @pytest.mark.parametrize("part", ["expires", "type", "filename", "signature"])
    def test_an_incomplete_link_is_refused(self, storage: FileStorage, query: dict[str, str], part: str) -> None:
        del query[part]
        with pytest.raises(LinkRefused):
            storage.verify("t/a.png", query)

    @pytest.mark.parametrize("key", ["t/b.png", "t/a", "../t/a.png", ""])
    def test_a_link_is_for_one_key(self, storage: FileStorage, query: dict[str, str], key: str) -> None:
        with pytest.raises(LinkRefused):
            storage.verify(key, query)

    def test_a_link_expires(self, storage: FileStorage) -> None:
        link = storage.link("t/a.png", expires_in=0, content_type="image/png", filename="a.png")
        with pytest.raises(LinkExpired):
            storage.verify("t/a.png", dict(parse_qsl(urlsplit(link).query)))

    def test_links_of_another_farm_are_refused(self, tmp_path: Path, query: dict[str, str]) -> None:
        with pytest.raises(LinkRefused):
            FileStorage(tmp_path / "another").verify("t/a.png", query)


class TestSecret:
    def test_it_is_private_lasting_and_no_object(self, storage: FileStorage, root: Path) -> None:
        link = storage.link("t/a", expires_in=60, content_type="text/plain", filename="a")
        (secret,) = files_below(root)
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        assert secret.stat().st_size == 32
        assert list(storage.list()) == []
        with pytest.raises(ValueError, match="not an object key"):
            storage.get(secret.name)
        FileStorage(root).verify("t/a", dict(parse_qsl(urlsplit(link).query)))

    def test_a_damaged_secret_is_the_operators_matter(self, storage: FileStorage, root: Path) -> None:
        storage.link("t/a", expires_in=60, content_type="text/plain", filename="a")
        (secret,) = files_below(root)
        secret.write_bytes(b"")
        with pytest.raises(StorageMisconfigured, match="delete it"):
            FileStorage(root).link("t/a", expires_in=60, content_type="text/plain", filename="a")

    def test_processes_that_start_together_agree_on_it(self, tmp_path: Path) -> None:
        roots = [str(tmp_path / str(i)) for i in range(60)]
        script = """
import multiprocessing, sys
from pathlib import Path
from shared.storage.file import FileStorage

def sign(barrier, roots, links):
    for root in roots:
        storage = FileStorage(Path(root))
        barrier.wait(20)
        links.put((root, storage.link("a", expires_in=600, content_type="b", filename="c")))

context = multiprocessing.get_context("fork")
links, barrier = context.Queue(), context.Barrier(4)
children = [context.Process(target=sign, args=(barrier, sys.argv[1:], links)) for _ in range(4)]
for child in children:
    child.start()
for _ in range(4 * len(sys.argv[1:])):
    print(*links.get(timeout=20))
"""
        command = [sys.executable, "-c", script, *roots]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert len(lines) == 4 * len(roots)
        for root, link in map(str.split, lines):
            FileStorage(Path(root)).verify("a", dict(parse_qsl(urlsplit(link).query)))


class TestOutOfBounds:
    def test_a_symbolic_link_leads_nowhere(self, storage: FileStorage, root: Path, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "file").write_text("private")
        (root / "out").symlink_to(outside)
        (root / "file").symlink_to(outside / "file")
        for attempt in (
            lambda: storage.get("out/file"),
            lambda: storage.head("out/file"),
            lambda: storage.put("out/new", b"x", content_type="text/plain"),
            lambda: storage.delete(["out/file"]),
            lambda: storage.get("file"),
        ):
            with pytest.raises(StorageMisconfigured):
                attempt()
        assert storage.head("file") is None
        assert list(storage.list()) == []
        storage.put("file", b"mine", content_type="text/plain")
        assert {path.name: path.read_text() for path in outside.iterdir()} == {"file": "private"}

    def test_a_file_for_a_root_is_the_operators_matter(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageMisconfigured, match="must be a folder"):
            FileStorage(tmp_path / "file")

    def test_a_key_below_an_object_is_the_operators_matter(self, storage: FileStorage) -> None:
        storage.put("a", b"x", content_type="text/plain")
        with pytest.raises(StorageMisconfigured):
            storage.put("a/b", b"x", content_type="text/plain")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small disk; the file size limit is tried instead")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


class TestFullDisk:
    def test_no_space(self, small_disk: Path) -> None:
        self._is_full_then_works(FileStorage(small_disk), small_disk)

    def test_file_too_large(self, storage: FileStorage, root: Path) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
        try:
            self._is_full_then_works(storage, root)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    @staticmethod
    def _is_full_then_works(storage: FileStorage, root: Path) -> None:
        storage.put("t/old", b"old", content_type="text/plain")
        for key in ("t/new", "t/old"):
            with pytest.raises(StorageUnavailable, match="free some space"):
                storage.put(key, bytes(600_000), content_type="image/png")
        assert [path.name for path in files_below(root)] == ["old"]
        assert storage.get("t/old") == b"old"
        storage.put("t/new", DATA, content_type="image/png")
        assert storage.get("t/new") == DATA


def test_readers_never_see_a_part(storage: FileStorage) -> None:
    """While one thread replaces an object again and again, every read gives one of the two versions whole."""
    versions = (b"a" * 2_000_000, b"b" * 1_000_000)
    storage.put("t/a", versions[0], content_type="image/png")
    seen: set[bytes] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(storage.get("t/a"))

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(30):
        storage.put("t/a", versions[i % 2], content_type="image/png")
    done.set()
    reader.join()
    assert seen <= set(versions)


def test_delete_leaves_no_empty_folders(storage: FileStorage, root: Path) -> None:
    storage.put("t/1/2/a", b"x", content_type="text/plain")
    storage.put("t/b", b"x", content_type="text/plain")
    storage.delete(["t/1/2/a"])
    assert not (root / "t/1").exists()
    storage.delete(["t/b"])
    assert not (root / "t").exists()
    assert root.exists()


def test_put_and_delete_of_neighbors_do_not_disturb_each_other(storage: FileStorage) -> None:
    """`delete` removes folders that are empty just when `put` is about to use them."""
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            storage.put("t/1/other", b"x", content_type="text/plain")
            storage.delete(["t/1/other"])

    threads = [threading.Thread(target=churn) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for i in range(150):
            storage.put(f"t/1/{i}", b"x", content_type="text/plain")
            assert storage.get(f"t/1/{i}") == b"x"
            storage.delete([f"t/1/{i}"])
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    with pytest.raises(ObjectMissing):
        storage.get("t/1/0")


def test_check_clears_what_the_dead_left(storage: FileStorage, root: Path) -> None:
    storage.check()
    folder = root / ".unfinished"
    for name, age in (("old", ABANDONED_AFTER + 60), ("new", 0.0)):
        (folder / name).write_text("part")
        os.utime(folder / name, (time.time() - age, time.time() - age))
    storage.check()
    assert [path.name for path in folder.iterdir()] == ["new"]


def test_a_disk_that_may_only_be_read_is_the_operators_matter(small_disk: Path) -> None:
    storage = FileStorage(small_disk)
    storage.put("t/a", DATA, content_type="image/png")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert storage.get("t/a") == DATA
    for attempt in (storage.check, lambda: storage.delete(["t/a"])):
        with pytest.raises(StorageMisconfigured, match="read and write"):
            attempt()
