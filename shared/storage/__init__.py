"""Object storage: the contract, and the lookup by URL scheme.

`s3://bucket/prefix` opens `shared/storage/s3.py`, `file:///folder` opens `shared/storage/file.py`; adding a kind of
storage is adding a file with `open_storage(settings) -> Storage`. Vendor errors stop at the adapter: callers see
`StorageUnavailable`, `StorageMisconfigured` and `ObjectMissing` only.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from urllib.parse import urlsplit

from shared.errors import SettingsError
from shared.settings import Settings

KEY = re.compile(r"(?=.{1,1000}\Z)[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}(/[A-Za-z0-9_-][A-Za-z0-9._-]{0,199})*")


def checked_key(key: str) -> str:
    """`key`, where every kind of storage can hold it; raises `ValueError` otherwise.

    Parts of ASCII letters, digits, `_`, `-` and `.` (not first) between single `/`: nothing that leaves a folder,
    needs quoting in a URL, or differs between file systems that fold Unicode.
    """
    if not KEY.fullmatch(key):
        raise ValueError(f"not an object key: {key[:200]!r}")
    return key


def inline(filename: str) -> str:
    """The `Content-Disposition` that shows an object in a browser under `filename`; odd characters become `_`."""
    return f'inline; filename="{re.sub(r"[^A-Za-z0-9._ -]", "_", filename)}"'


@dataclass(frozen=True)
class ObjectInfo:
    """What is known of a stored object without reading it."""

    key: str
    size: int
    modified_at: datetime


class Storage(Protocol):
    """A flat store of immutable objects. Keys are relative, made of ids only: `t/1/…/<sha256>.png` (`checked_key`)."""

    def put(self, key: str, data: bytes, *, content_type: str) -> None:
        """Store `data` whole or not at all; the transfer is protected by its SHA-256. Putting it again is harmless."""

    def get(self, key: str) -> bytes:
        """The bytes under `key`. Raises `ObjectMissing`."""

    def head(self, key: str) -> ObjectInfo | None:
        """Size and time of `key`, or None where there is no such object."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove these objects; those that are already gone are no error."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key starts with `prefix`, in order of key."""

    def link(self, key: str, *, expires_in: int, content_type: str, filename: str) -> str:
        """A URL that reads this one object without credentials for `expires_in` seconds.

        The answer carries exactly `content_type` and `inline; filename="…"`. A URL that starts with `/` is served
        by the API itself.
        """

    def check(self, size: int = 32) -> None:
        """Prove that `size` bytes can be written, read and deleted. Raises `StorageError` with the remedy."""


def schemes() -> list[str]:
    """The URL schemes that can be opened, from the files in this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def open_storage(settings: Settings) -> Storage:
    """The storage that `STORAGE_URL` names."""
    scheme = urlsplit(settings.storage_url).scheme
    if scheme not in schemes():
        raise SettingsError(f"STORAGE_URL: unknown scheme {scheme!r}; expected one of {', '.join(schemes())}")
    storage: Storage = importlib.import_module(f"shared.storage.{scheme}").open_storage(settings)
    return storage
