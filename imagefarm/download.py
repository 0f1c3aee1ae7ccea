"""Fetches pictures into a folder: in parallel, resumable, whole or not at all."""

from __future__ import annotations

import os
import re
import string
import threading
import unicodedata
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from imagefarm.connection import FarmUnreachable
from imagefarm.records import Job
from shared.errors import FarmError

#: called with (pictures done, pictures in all)
Progress = Callable[[int, int], None]

_EXTENSIONS = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}
_SLUG_BYTES = 100
_TRIES = 3
_MAX_LISTED = 5


@dataclass(frozen=True)
class Downloaded:
    """What a download did."""

    folder: Path
    #: pictures fetched now
    saved: int
    #: pictures that were there already
    present: int
    #: size of what was fetched
    bytes: int


class FileClash(FarmError):
    """A file is in the way. Ends a download at once: more would follow."""

    code = "file-clash"


def slug(prompt: str) -> str:
    """A prompt as part of a file name: `A red circle!` becomes `a-red-circle`."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", prompt).lower())
    text = "-".join(words).encode()[:_SLUG_BYTES].decode(errors="ignore").strip("-")
    return text or "untitled"


class FileNames:
    """Gives each job of a download its path. Refuses templates that leave the folder or name two jobs alike."""

    def __init__(self, folder: Path, template: str) -> None:
        self._folder = folder
        self._root = folder.resolve()
        self._template = template
        self._taken: dict[str, str] = {}
        self._check()

    def _check(self) -> None:
        fields = set(_values_of_sample())
        try:
            parts = list(string.Formatter().parse(self._template))
            for _, name, _, _ in parts:
                if name is not None and name not in fields:
                    raise FarmError(f"template: {{{name}}} is not known; the fields are {', '.join(sorted(fields))}")
            self._template.format(**_values_of_sample())
        except (ValueError, IndexError, KeyError, AttributeError) as error:
            raise FarmError(f"template {self._template!r} is not right: {error}") from None

    def path(self, job: Job) -> Path:
        """Where the picture of `job` belongs. Raises `FarmError`."""
        name = self._template.format(**_values(job))
        relative = PurePosixPath(name)
        if not name or name.endswith("/") or relative.is_absolute() or ".." in relative.parts or "\\" in name:
            raise FarmError(f"template: {name!r} is not a file inside the folder")
        path = self._folder / relative
        # catches what the text cannot show: a link inside the folder that points out of it
        if not path.resolve().is_relative_to(self._root):
            raise FarmError(f"template: {name!r} would leave the folder {self._folder}")
        key = name.casefold()
        if other := self._taken.get(key):
            raise FileClash(
                f"template: {other} and {job.id} would both become {name!r}; add {{index}} or {{job}} to the template"
            )
        self._taken[key] = job.id
        return path


def _values(job: Job) -> dict[str, Any]:
    content_type = job.image.content_type if job.image else ""
    return {
        "index": job.index,
        "seed": job.seed if job.seed is not None else 0,
        "prompt": slug(job.prompt),
        "job": job.id,
        "batch": job.batch_id,
        "model": job.model,
        "ext": _EXTENSIONS.get(content_type, "bin"),
    }


def _values_of_sample() -> dict[str, Any]:
    return {"index": 0, "seed": 0, "prompt": "p", "job": "j", "batch": "b", "model": "m", "ext": "png"}


class _Fetcher:
    """Brings single pictures into place; counts what happened."""

    def __init__(self, image: Callable[[Job], bytes], overwrite: bool) -> None:
        self._image = image
        self._overwrite = overwrite
        self._lock = threading.Lock()
        self.saved = 0
        self.present = 0
        self.bytes = 0

    def bring(self, job: Job, path: Path) -> None:
        assert job.image is not None
        there = path.exists()
        if there and _is_complete(path, job):
            with self._lock:
                self.present += 1
            return
        data = self._fetch(job)
        if there and not self._overwrite and not _is_beginning(path, data):
            raise FileClash(
                f"{path} exists and is not the picture of {job.id}: "
                "choose another folder or template, or overwrite what is there"
            )
        _put(path, data)
        with self._lock:
            self.saved += 1
            self.bytes += len(data)

    def _fetch(self, job: Job) -> bytes:
        for tries_left in reversed(range(_TRIES)):
            try:
                return self._image(job)
            except FarmUnreachable:
                raise
            except FarmError:
                if not tries_left:
                    raise
        raise AssertionError("unreachable")


def _is_complete(path: Path, job: Job) -> bool:
    assert job.image is not None
    if job.image.bytes is not None and path.stat().st_size != job.image.bytes:
        return False
    return sha256(path.read_bytes()).hexdigest() == job.image.sha256


def _is_beginning(path: Path, data: bytes) -> bool:
    """Whether the file is a picture that was cut off: replacing it loses nothing."""
    size = path.stat().st_size
    return size < len(data) and path.read_bytes() == data[:size]


def _put(path: Path, data: bytes) -> None:
    partial = path.parent / f".{uuid.uuid4().hex}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, path)  # noqa: PTH105 - the atomic step, meant as such
    except OSError as error:
        raise FarmError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def download(
    jobs: Iterable[Job],
    image: Callable[[Job], bytes],
    folder: Path,
    template: str,
    *,
    total: int,
    parallel: int,
    overwrite: bool,
    on_progress: Progress | None,
) -> Downloaded:
    """Bring the pictures of `jobs` into `folder`. Goes on past single failures and tells of them at the end."""
    names = FileNames(folder, template)
    fetcher = _Fetcher(image, overwrite)
    failures: list[str] = []
    done = 0

    def settle(oldest: Future[None]) -> None:
        nonlocal done
        try:
            oldest.result()
        except (FarmUnreachable, FileClash):
            raise
        except FarmError as error:
            failures.append(error.detail)
        done += 1
        if on_progress:
            on_progress(done, max(total, done))

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max(1, parallel), thread_name_prefix="download") as pool:
        waiting: deque[Future[None]] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(fetcher.bring, job, names.path(job)))
                # a short queue: a million jobs must not be listed ahead of what the threads can take
                if len(waiting) > parallel * 4:
                    settle(waiting.popleft())
            while waiting:
                settle(waiting.popleft())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failures:
        listed = "\n".join(f"  {text}" for text in failures[:_MAX_LISTED])
        more = f"\n  … and {len(failures) - _MAX_LISTED} more" if len(failures) > _MAX_LISTED else ""
        raise FarmError(f"{len(failures)} of {done} pictures were not downloaded:\n{listed}{more}")
    return Downloaded(folder, fetcher.saved, fetcher.present, fetcher.bytes)
