"""From rendered pictures to recorded results, beside the next forward pass: encode, upload, record the whole pass.

Bounded: at most `MAX_PASSES` rendered passes wait here; then rendering waits (back-pressure).
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import tenacity

from shared import failpoints
from shared.catalogue import ModelEntry
from shared.errors import Canceled, Interrupted, StorageError
from shared.keys import image_key, thumbnail_key
from shared.lifecycle import Failure, Lease, Result
from shared.services import Services
from worker.backends import Rendered
from worker.batching import Task
from worker.breaker import Breaker
from worker.encode import encode
from worker.leases import Leases
from worker.report import Reporter, failure_of

logger = logging.getLogger(__name__)

#: rendered passes that may wait for encoding and upload
MAX_PASSES = 2
#: an image that cannot be stored for so long is tried against the storage's own check: is it the image or the storage?
_DOUBT_SECONDS = 60.0
#: work for which another thread pays
_WORTH_A_THREAD_SECONDS = 0.05


@dataclass(frozen=True)
class RenderedPass:
    """One pass as it left the engine. `seconds` is the time of the whole pass."""

    token: uuid.UUID
    entry: ModelEntry
    tasks: Sequence[Task]
    pictures: Sequence[Rendered]
    seconds: float


@dataclass(frozen=True)
class _Stored:
    """What became of one image of a pass; no result and no error: nobody waited for it any more."""

    index: int
    result: Result | None
    error: Exception | None = None


class Delivery:
    """Threads that encode and upload images, and one that records whole passes in the order they were rendered."""

    def __init__(
        self, services: Services, leases: Leases, reporter: Reporter, breaker: Breaker, stopping: threading.Event
    ) -> None:
        self._storage = services.storage
        self._leases = leases
        self._reporter = reporter
        self._breaker = breaker
        self._stopping = stopping
        self._threads = services.settings.upload_threads
        #: what an image adds to the delivery of a pass, by the latest one
        self._seconds_per_image = 0.0
        self._senders = ThreadPoolExecutor(self._threads, thread_name_prefix="delivery")
        self._recorder = ThreadPoolExecutor(1, thread_name_prefix="recorder")
        self._room = threading.BoundedSemaphore(MAX_PASSES)

    def send(self, rendered: RenderedPass) -> None:
        """Take over a pass; waits while too many are here already."""
        self._room.acquire()
        count = len(rendered.tasks)
        threads = self._worthwhile_threads(count)
        shares = [range(first, count, threads) for first in range(threads)]
        uploads = [self._senders.submit(self._store_share, rendered, share) for share in shares]
        self._recorder.submit(self._record, rendered, uploads)

    def _worthwhile_threads(self, count: int) -> int:
        """As many threads as these images can keep busy, judging by the latest ones.

        Threads that handle images of microseconds only fight for the interpreter; uploads that wait want all of them.
        """
        wanted = count * self._seconds_per_image / _WORTH_A_THREAD_SECONDS
        return math.ceil(min(max(wanted, 1), count, self._threads))

    def flush(self) -> None:
        """Wait until everything sent so far is recorded."""
        self._recorder.submit(lambda: None).result()

    def close(self) -> None:
        """Finish what is here and end the threads."""
        self._recorder.shutdown()
        self._senders.shutdown()

    def _store_share(self, rendered: RenderedPass, share: Iterable[int]) -> list[_Stored]:
        """Encode and upload some images of a pass; what goes wrong with one does not touch the others."""
        stored: list[_Stored] = []
        started = time.monotonic()
        for index in share:
            try:
                stored.append(_Stored(index, self._store(rendered, index)))
            except Exception as error:
                stored.append(_Stored(index, None, error))
        self._seconds_per_image = (time.monotonic() - started) / len(rendered.tasks)
        return stored

    def _store(self, rendered: RenderedPass, index: int) -> Result | None:
        """Encode and upload one image. None where nobody waits for it any more."""
        job, spec = rendered.tasks[index].job, rendered.tasks[index].spec
        if not self._leases.is_wanted(rendered.token, job.id):
            return None
        picture = rendered.pictures[index]
        encoded = encode(picture.image, spec, model=rendered.entry.name, revision=rendered.entry.revision)
        key = image_key(job.tenant_id, job.batch_id, job.idx, encoded.sha256.hex(), encoded.extension)
        lease = Lease(job.id, rendered.token)
        if encoded.thumbnail is not None:
            self._put(lease, thumbnail_key(key), encoded.thumbnail, "image/webp")
        self._put(lease, key, encoded.data, encoded.content_type)
        failpoints.hit("after_upload")
        size = len(rendered.tasks)
        facts = {
            "width": picture.image.width,
            "height": picture.image.height,
            "bytes": len(encoded.data),
            "content_type": encoded.content_type,
            "thumbnail": encoded.thumbnail is not None,
            "batch_size": size,
            **picture.notes,
        }
        return Result(job.id, key, encoded.sha256, rendered.seconds / size, facts)

    def _put(self, lease: Lease, key: str, data: bytes, content_type: str) -> None:
        """Upload, again and again while the storage is in trouble: the image has cost too much to be thrown away.

        Meanwhile the lease is kept, and rendering waits as soon as `MAX_PASSES` are here: trouble with the storage
        burns no job. Raises `Canceled` when nobody waits for the image any more, `Interrupted` when the worker must
        stop, and the `StorageError` itself where only this image is refused.
        """
        with contextlib.suppress(StorageError):
            return self._storage.put(key, data, content_type=content_type)
        patiently = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(StorageError),
            wait=tenacity.wait_exponential_jitter(multiplier=0.2, max=10.0, jitter=0.2),
            stop=lambda state: self._gives_up(lease, len(data), state),
            before_sleep=self._complain,
            sleep=self._nap,
            reraise=True,
        )
        patiently(self._storage.put, key, data, content_type=content_type)
        return None

    def _nap(self, seconds: float) -> None:
        self._stopping.wait(seconds)

    def _gives_up(self, lease: Lease, size: int, state: tenacity.RetryCallState) -> bool:
        if self._stopping.is_set():
            raise Interrupted
        if not self._leases.is_wanted(lease.token, lease.job_id):
            raise Canceled
        if (state.seconds_since_start or 0.0) < _DOUBT_SECONDS:
            return False
        with contextlib.suppress(StorageError):
            # of the same size: a full disk still takes a small object
            self._storage.check(size)
            return True
        return False

    def _complain(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        # the first failure is for people, who otherwise would see a batch that stands still
        level = logging.ERROR if state.attempt_number == 1 else logging.WARNING
        logger.log(level, "upload failed, trying again: %s", error)
        self._leases.report_error(f"storage: {error}")

    def _record(self, rendered: RenderedPass, uploads: Sequence[Future[list[_Stored]]]) -> None:
        try:
            results: list[Result] = []
            unwanted: list[int] = []
            interrupted: list[int] = []
            failures: list[tuple[Failure, int, float | None]] = []
            for stored in chain.from_iterable(upload.result() for upload in uploads):
                job = rendered.tasks[stored.index].job
                if isinstance(stored.error, Interrupted):
                    interrupted.append(job.id)
                elif stored.error is not None and not isinstance(stored.error, Canceled):
                    failure, wait = failure_of(job.id, stored.error)
                    failures.append((failure, job.own_attempt, wait))
                elif stored.result is None:
                    unwanted.append(job.id)
                else:
                    results.append(stored.result)
            if results:
                self._reporter.succeed(rendered.token, results)
                self._breaker.succeeded(rendered.entry.name)
            if failures:
                self._reporter.give_up(rendered.token, failures)
                for failure, _, _ in failures:
                    self._breaker.failed(rendered.entry.name, failure.outcome, failure.error_class)
            self._reporter.drop(rendered.token, unwanted)
            self._reporter.release(rendered.token, interrupted, "the worker stopped before it could store the image")
            self._reporter.admit({(task.job.tenant_id, task.job.model) for task in rendered.tasks if task.job.capped})
        except Exception:
            # the leases of these jobs run out and they are rendered again; the worker itself goes on
            logger.exception("recording a pass failed")
            self._leases.let_go(rendered.token, [task.job.id for task in rendered.tasks])
        finally:
            self._room.release()
