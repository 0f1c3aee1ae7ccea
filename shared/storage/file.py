"""Objects as files below one folder: `file:///srv/imagefarm/objects`.

A file appears under its key whole or not at all: it is written aside, synced and renamed. Names that start with a dot
belong to this module (unfinished files, the secret of the links); no key can name them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import json
import os
import secrets
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote, urlencode, urlsplit

from shared.errors import (
    LinkExpired,
    LinkRefused,
    ObjectMissing,
    SettingsError,
    StorageMisconfigured,
    StorageUnavailable,
)
from shared.settings import Settings
from shared.storage import KEY, ObjectInfo, checked_key

UNFINISHED = ".unfinished"
SIGNING_FILE = ".link-key"
SECRET_BYTES = 32
#: an unfinished file this old (seconds) was left by a process that died
ABANDONED_AFTER = 3600.0

#: a folder may vanish between its making and its use this often
_TRIES = 10
_REMEMBERED_FOLDERS = 10_000

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.EEXIST}
NO_SUCH_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


@dataclass(frozen=True)
class SignedLink:
    """What a verified link fixes about its answer."""

    content_type: str
    filename: str


class FileStorage:
    """Storage in a folder of a local or shared file system. Safe among threads and processes."""

    def __init__(self, root: Path) -> None:
        """Make the folder where it is missing. Raises `StorageMisconfigured`."""
        with _mapped(root):
            root.mkdir(parents=True, exist_ok=True)
        self._root = root.resolve()
        self._unfinished_folder = f"{self._root}/{UNFINISHED}"
        #: folders that this process has made and put on disk
        self._folders: set[str] = set()

    def put(self, key: str, data: bytes, *, content_type: str) -> None:
        """Store `data` under `key`. A full disk raises `StorageUnavailable` and leaves nothing behind."""
        target = str(self._root / checked_key(key))
        folder = target.rpartition("/")[0]
        with _mapped(self._root), self._unfinished(data, mode=0o666) as unfinished:
            if folder not in self._folders:
                self._make_folder(key)
            try:
                os.replace(unfinished, target)
            except FileNotFoundError:
                # a `delete` beside us removed the folder, empty as it still was
                self._folders.discard(folder)
                self._move_patiently(unfinished, key)
            _sync_folder(folder)

    def _make_folder(self, key: str) -> None:
        """Make the folder of `key`, and put it on disk up to the root. Remembered: images come by the thousand."""
        folder = self._path(key).parent
        for tries_left in reversed(range(_TRIES)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                break
            except (FileNotFoundError, FileExistsError):  # mkdir, too, can be late to see a `delete`
                if not tries_left:
                    raise
        for above in folder.parents:
            _sync_folder(above)
            if above == self._root:
                break
        if len(self._folders) >= _REMEMBERED_FOLDERS:
            self._folders.clear()
        self._folders.add(str(folder))

    def _move_patiently(self, unfinished: str, key: str) -> None:
        for tries_left in reversed(range(_TRIES)):
            try:
                self._make_folder(key)
                os.replace(unfinished, self._root / key)
                return
            except FileNotFoundError:
                if not tries_left:
                    raise

    def get(self, key: str) -> bytes:
        """The bytes under `key`. Raises `ObjectMissing`."""
        path = self._path(key)
        with _mapped(self._root):
            try:
                with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                    return file.read()
            except NO_SUCH_FILE:
                raise ObjectMissing(f"{key}: there is no such file in {self._root}") from None

    def head(self, key: str) -> ObjectInfo | None:
        """Size and time of `key`, or None."""
        path = self._path(key)
        with _mapped(self._root):
            try:
                return _info(key, path.lstat())
            except NO_SUCH_FILE:
                return None

    def delete(self, keys: Iterable[str]) -> None:
        """Remove these files, and the folders that this leaves empty."""
        for key in keys:
            path = self._path(key)
            with _mapped(self._root):
                with contextlib.suppress(*NO_SUCH_FILE):
                    path.unlink()
                for folder in path.parents:
                    if folder == self._root:
                        break
                    with contextlib.suppress(OSError):  # not empty, or gone
                        folder.rmdir()

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key starts with `prefix`, in order of key."""
        return self._walk(self._root, "", prefix)

    def _walk(self, folder: Path, above: str, prefix: str) -> Iterator[ObjectInfo]:
        with _mapped(self._root):
            try:
                with os.scandir(folder) as entries:
                    ours = [entry for entry in entries if KEY.fullmatch(entry.name)]
            except FileNotFoundError:
                return
        # sorted with its slash, a folder stands where its keys stand among all keys
        named = {entry.name + "/" * entry.is_dir(follow_symlinks=False): entry for entry in ours}
        for name, entry in sorted(named.items()):
            key = above + name
            if name.endswith("/"):
                if key.startswith(prefix) or prefix.startswith(key):
                    yield from self._walk(folder / entry.name, key, prefix)
            elif key.startswith(prefix):
                try:
                    info = _info(key, entry.stat(follow_symlinks=False))
                except FileNotFoundError:
                    continue
                if info is not None:
                    yield info

    def link(self, key: str, *, expires_in: int, content_type: str, filename: str) -> str:
        """A path below `/files/` that the API serves to whoever holds it, for `expires_in` seconds."""
        expires = int(time.time()) + expires_in
        signature = self._signature(checked_key(key), str(expires), content_type, filename)
        query = {"expires": expires, "type": content_type, "filename": filename, "signature": signature}
        return f"/files/{key}?{urlencode(query)}"

    def verify(self, key: str, query: Mapping[str, str]) -> SignedLink:
        """What a link to `key` with this (decoded) query grants.

        Raises `LinkRefused` where any part was altered or is missing, `LinkExpired` where it is too old.
        """
        expires, content_type, filename = (query.get(name, "") for name in ("expires", "type", "filename"))
        right = self._signature(key, expires, content_type, filename)
        if not hmac.compare_digest(right.encode(), query.get("signature", "").encode("utf-8", "replace")):
            raise LinkRefused
        if time.time() >= int(expires):
            raise LinkExpired
        return SignedLink(content_type, filename)

    def _signature(self, *parts: str) -> str:
        return hmac.new(self._secret, json.dumps(parts).encode(), hashlib.sha256).hexdigest()

    @cached_property
    def _secret(self) -> bytes:
        """The farm's own secret: made by whichever process needs it first, then the same for all."""
        path = self._root / SIGNING_FILE
        with _mapped(self._root):
            if not path.exists():
                with self._unfinished(secrets.token_bytes(SECRET_BYTES), mode=0o600) as unfinished:
                    # unlike a rename, a hard link never replaces the secret of a process that was faster
                    with contextlib.suppress(FileExistsError):
                        path.hardlink_to(unfinished)
                    os.unlink(unfinished)
                    _sync_folder(self._root)
            secret = path.read_bytes()
        if len(secret) != SECRET_BYTES:
            raise StorageMisconfigured(f"{path} is damaged: delete it (links given out so far will stop working)")
        return secret

    def check(self, size: int = 32) -> None:
        """Write, read and delete a small file, and clear away what dead processes left unfinished."""
        key, data = f"_check/{secrets.token_hex(8)}", secrets.token_bytes(size)
        self.put(key, data, content_type="application/octet-stream")
        try:
            if self.get(key) != data:
                raise StorageUnavailable(f"{self._root} gives back other bytes than were written: check this disk")
        finally:
            self.delete([key])
        with _mapped(self._root):
            for left in (self._root / UNFINISHED).iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - left.stat().st_mtime > ABANDONED_AFTER:
                        left.unlink()

    def _path(self, key: str) -> Path:
        """Where `key` is stored. Raises `ValueError` for a key that names something else than an object."""
        path = self._root / checked_key(key)
        if not path.parent.resolve().is_relative_to(self._root):
            raise StorageMisconfigured(f"{path.parent} leads out of {self._root}: remove that symbolic link")
        return path

    @contextlib.contextmanager
    def _unfinished(self, data: bytes, *, mode: int) -> Iterator[str]:
        """`data` in a synced file of this file system. It is removed when the block fails; else the block moved it."""
        path = f"{self._unfinished_folder}/{secrets.token_hex(16)}"
        try:
            descriptor = self._create(path, mode)
            with open(descriptor, "wb", buffering=0) as file:
                rest = memoryview(data)
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(descriptor)
            yield path
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            raise

    def _create(self, path: str, mode: int) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            return os.open(path, flags, mode)
        except FileNotFoundError:
            os.makedirs(self._unfinished_folder, exist_ok=True)
            return os.open(path, flags, mode)


def _info(key: str, status: os.stat_result) -> ObjectInfo | None:
    if not stat.S_ISREG(status.st_mode):
        return None
    return ObjectInfo(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))


def _sync_folder(folder: Path | str) -> None:
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _mapped(root: Path) -> Iterator[None]:
    """Turn errors of the file system into ours, with the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            remedy = f"{root}: {error.strerror}: free some space, or set STORAGE_URL to a larger disk"
            raise StorageUnavailable(remedy) from error
        if error.errno in REFUSED or isinstance(error, NO_SUCH_FILE):
            remedy = f"STORAGE_URL: {error}: {root} must be a folder that the user of this process can read and write"
            raise StorageMisconfigured(remedy) from error
        raise StorageUnavailable(f"{root}: {error}: check this disk or mount") from error


def open_storage(settings: Settings) -> FileStorage:
    """The folder that `STORAGE_URL` names. Raises `SettingsError` or `StorageMisconfigured`."""
    url = urlsplit(settings.storage_url)
    folder = Path(unquote(url.path))
    if url.netloc not in ("", "localhost") or url.query or url.fragment or not folder.is_absolute() or not folder.name:
        raise SettingsError("STORAGE_URL: expected an absolute folder, such as file:///srv/imagefarm/objects")
    return FileStorage(folder)
