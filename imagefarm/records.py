"""What a farm tells about batches, jobs, models and workers: small immutable records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.states import FINAL, State

if TYPE_CHECKING:
    from imagefarm.client import Farm
    from imagefarm.download import Downloaded

#: how a picture is named where nothing else is said
DEFAULT_TEMPLATE = "{index:06d}.{ext}"


def _time(value: str | None) -> datetime | None:
    return datetime.fromisoformat(value) if value else None


@dataclass(frozen=True)
class Batch:
    """A batch as it stood when it was asked for; `refresh()` asks again."""

    id: str
    name: str
    model: str
    priority: str
    #: queued, rendering, paused, canceling, canceled or finished
    state: str
    job_count: int
    #: jobs by state: scheduled, queued, held, rendering, succeeded, failed, canceled
    counts: Mapping[str, int]
    parameters: Mapping[str, Any]
    created_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    images_per_second: float | None
    eta_seconds: float | None
    #: rows and images are deleted so long after the end; None: never
    retention_seconds: int | None
    #: why its jobs wait, where none is being rendered
    state_reason: str | None
    _farm: Farm = field(repr=False, compare=False)

    @classmethod
    def of(cls, farm: Farm, body: Mapping[str, Any]) -> Batch:
        return cls(
            id=body["id"],
            name=body.get("name") or "",
            model=body["model"],
            priority=body["priority"],
            state=body["state"],
            job_count=body["job_count"],
            counts=body["counts"],
            parameters=body.get("parameters") or {},
            created_at=_time(body.get("created_at")),
            started_at=_time(body.get("started_at")),
            finished_at=_time(body.get("finished_at")),
            images_per_second=body.get("images_per_second"),
            eta_seconds=body.get("eta_seconds"),
            retention_seconds=body.get("retention_seconds"),
            state_reason=body.get("state_reason"),
            _farm=farm,
        )

    @property
    def succeeded(self) -> int:
        return self.counts.get(State.SUCCEEDED, 0)

    @property
    def failed(self) -> int:
        return self.counts.get(State.FAILED, 0)

    @property
    def canceled(self) -> int:
        return self.counts.get(State.CANCELED, 0)

    @property
    def ended(self) -> int:
        """Jobs that will not change any more."""
        return sum(self.counts.get(state, 0) for state in FINAL)

    @property
    def done(self) -> bool:
        """Whether no job is open any more."""
        return self.state in {"finished", "canceled"}

    def refresh(self) -> Batch:
        """The batch as it stands now."""
        return self._farm.batch(self.id)

    def wait(self, timeout: float | None = None, on_progress: Callable[[Batch], None] | None = None) -> Batch:
        """The batch once no job is open any more. Raises `TimeoutError` after `timeout` seconds."""
        return self._farm.wait(self, timeout, on_progress)

    def jobs(self, states: Iterable[str] = ()) -> Iterator[Job]:
        """Its jobs in order, optionally only those in `states`."""
        return self._farm.jobs(self, states)

    def download(self, folder: str | Path, template: str = DEFAULT_TEMPLATE, **options: Any) -> Downloaded:
        """Fetch its pictures into a folder; see `Farm.download`."""
        return self._farm.download(self, folder, template, **options)

    def cancel(self) -> None:
        """Call off what has not been rendered yet."""
        self._farm.cancel(self.id)

    def pause(self) -> Batch:
        """Set aside what waits; see `Farm.pause`."""
        return self._farm.pause(self)

    def resume(self) -> Batch:
        """Let it go on."""
        return self._farm.resume(self)

    def retry(self, error_classes: Iterable[str] = (), states: Iterable[str] = ("failed",)) -> int:
        """Render failed jobs again; see `Farm.retry`."""
        return self._farm.retry(self, error_classes, states)


@dataclass(frozen=True)
class Image:
    """A finished picture. `url` is a link that works without a key for a while."""

    url: str
    thumbnail_url: str | None
    sha256: str
    width: int | None
    height: int | None
    #: size of the file
    bytes: int | None
    content_type: str
    #: how many images shared its forward pass
    batch_size: int | None


@dataclass(frozen=True)
class JobError:
    """Why a job failed."""

    error_class: str
    detail: str

    def __str__(self) -> str:
        return f"{self.error_class}: {self.detail}"


@dataclass(frozen=True)
class Job:
    """One image to render, as it stood when it was asked for."""

    id: str
    batch_id: str
    #: position in its batch, from 0
    index: int
    model: str
    #: scheduled, queued, held, rendering, succeeded, failed or canceled
    state: str
    prompt: str
    seed: int | None
    parameters: Mapping[str, Any]
    attempt: int
    worker: str | None
    error: JobError | None
    image: Image | None
    finished_at: datetime | None
    #: why it waits; its place in the queue and an estimate, where it was asked for alone
    state_reason: str | None
    queue_position: int | None
    eta_seconds: float | None
    _farm: Farm = field(repr=False, compare=False)

    @classmethod
    def of(cls, farm: Farm, body: Mapping[str, Any]) -> Job:
        error, image = body.get("error"), body.get("image")
        return cls(
            id=body["id"],
            batch_id=body["batch_id"],
            index=body["index"],
            model=body["model"],
            state=body["state"],
            prompt=body.get("prompt") or "",
            seed=body.get("seed"),
            parameters=body.get("parameters") or {},
            attempt=body.get("attempt") or 0,
            worker=body.get("worker"),
            error=JobError(error.get("class") or "error", error.get("detail") or "") if error else None,
            image=Image(**{name: image.get(name) for name in Image.__dataclass_fields__}) if image else None,
            finished_at=_time(body.get("finished_at")),
            state_reason=body.get("state_reason"),
            queue_position=body.get("queue_position"),
            eta_seconds=body.get("eta_seconds"),
            _farm=farm,
        )

    @property
    def done(self) -> bool:
        """Whether it will not change any more."""
        return self.state in FINAL

    def refresh(self) -> Job:
        """The job as it stands now."""
        return self._farm.job(self.id)

    def wait(self, seconds: float = 3600.0) -> Job:
        """The job once it has ended, or as it stands after so many seconds."""
        return self._farm.job(self.id, wait=seconds)

    def read(self) -> bytes:
        """The picture's bytes, checked against its SHA-256."""
        return self._farm.image(self)


@dataclass(frozen=True)
class Model:
    """A model that the farm knows. `parameters` holds the JSON schema of each parameter that its jobs accept."""

    name: str
    backend: str
    description: str
    defaults: Mapping[str, Any]
    limits: Mapping[str, Any]
    max_batch: int
    parameters: Mapping[str, Mapping[str, Any]]
    #: whether a living worker renders it
    served: bool

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Model:
        return cls(**{name: body[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Worker:
    """A worker of the farm. `alive` while its heartbeat is fresh."""

    id: str
    host: str
    pid: int
    models: list[str]
    #: jobs that it holds now
    rendering: int
    #: models that are loaded
    resident: list[str]
    device: Mapping[str, Any]
    images: int
    #: by model: images_per_second and seconds_per_work, as measured lately
    rates: Mapping[str, Mapping[str, float]]
    #: models that it leaves alone for a while after failures
    resting: Mapping[str, Mapping[str, Any]]
    last_error: str | None
    started_at: datetime | None
    heartbeat_at: datetime | None
    draining_at: datetime | None
    #: alive, resting, draining or silent
    state: str
    alive: bool

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Worker:
        values = {name: body.get(name) for name in cls.__dataclass_fields__}
        times = {name: _time(body.get(name)) for name in ("started_at", "heartbeat_at", "draining_at")}
        return cls(**{**values, **times})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Queue:
    """What one model has waiting, and who renders it. `pending_seconds` is the time that one worker would need."""

    model: str
    queued: int
    scheduled: int
    held: int
    rendering: int
    oldest_wait_seconds: float | None
    images_per_second: float | None
    pending_seconds: float | None
    live_workers: int
    wanted_workers: int

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Queue:
        return cls(**{name: body[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Tenant:
    """A tenant, as operators see it. `max_in_flight` caps its jobs that are queued or rendered at a time."""

    name: str
    weight: float
    paused: bool
    max_in_flight: int | None

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Tenant:
        return cls(**{name: body[name] for name in cls.__dataclass_fields__})
