"""What the native dialect takes and answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, SkipValidation

from api.answers import Answer, Time
from api.parameters import Parameters
from shared import ids
from shared.progress import AttemptView, BatchState, BatchView, JobView
from shared.specs import StorableText
from shared.states import Outcome, Priority, State

PREFIX = "/api/v1"

MAX_NAME = 200
MAX_IMAGES = 1000
MAX_PAGE = 1000
MAX_WAIT = 60


class BatchRequest(Parameters):
    """What to render: exactly one of `prompts` and `jobs`, each item giving `num_images` images."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["prompts"]}, {"required": ["jobs"]}]})

    model: str = Field(max_length=MAX_NAME, description="A name of GET /models.")
    name: StorableText = Field("", max_length=MAX_NAME, description="Yours to choose; need not be unique.")
    priority: Priority = Field(Priority.NORMAL, description="A higher class is rendered before a lower one.")
    retention_seconds: int | None = Field(
        None,
        strict=True,
        ge=1,
        le=10**10,
        description="Rows and images are deleted so long after the end; null: never.",
    )
    num_images: int = Field(1, strict=True, ge=1, le=MAX_IMAGES, description="Images of each prompt.")
    parameters: dict[str, Any] = Field({}, description="Parameters that all jobs share; see GET /models.")
    # items are checked by shared.plan, once: a hundred thousand of them take time
    prompts: list[SkipValidation[str]] | None = Field(None, min_length=1, description="One job (or more) for each.")
    jobs: list[SkipValidation[dict[str, Any]]] | None = Field(
        None, min_length=1, description="Objects with a `prompt` and any parameters of their own."
    )


class SubmitHeaders(Parameters):
    """Headers of a submission."""

    model_config = ConfigDict(extra="ignore")

    idempotency_key: str | None = Field(
        None,
        alias="Idempotency-Key",
        description="1 to 255 printable ASCII characters. The same key and body give the same batch, however often.",
    )


class BatchPath(Parameters):
    """Names a batch."""

    batch_id: str


class JobPath(Parameters):
    """Names a job."""

    job_id: str


class ModelPath(Parameters):
    """Names a model."""

    name: str


class BatchChange(Parameters):
    """What to change about a batch; what is left out stays."""

    paused: bool | None = Field(None, strict=True, description="Whether its waiting jobs are set aside.")
    priority: Priority | None = None


class RetryRequest(Parameters):
    """Which jobs of a batch to render again."""

    states: list[Literal["failed", "canceled"]] = Field(["failed"], min_length=1, max_length=2)
    error_classes: list[Annotated[StorableText, Field(max_length=MAX_NAME)]] = Field(
        [], max_length=100, description="Only jobs that failed so; all where none is given."
    )


class ListQuery(Parameters):
    """Which part of a list."""

    cursor: str | None = Field(None, max_length=100, description="`next_cursor` of the part before.")
    limit: int = Field(100, ge=1, le=MAX_PAGE, description="Most items of the answer.")


def _split(values: Any) -> Any:
    return [part for value in values for part in value.split(",")]


class JobsQuery(ListQuery):
    """Which jobs of a batch."""

    state: Annotated[list[State], BeforeValidator(_split)] = Field(
        [], description="Only jobs in these states; may be repeated, or be separated by commas."
    )


class WaitQuery(Parameters):
    """How long to wait."""

    wait: float = Field(
        0, ge=0, le=MAX_WAIT, allow_inf_nan=False, description="Seconds to wait for the job to end; may be cut short."
    )


class Counts(Answer):
    """How many jobs are in each state."""

    scheduled: int
    queued: int
    held: int
    rendering: int
    succeeded: int
    failed: int
    canceled: int


class BatchLinks(Answer):
    """Paths of what belongs to a batch."""

    itself: str = Field(alias="self")
    jobs: str


class Batch(Answer):
    """A batch as it stands now."""

    id: str
    object: Literal["batch"] = "batch"
    name: str
    model: str
    priority: Priority
    state: BatchState
    job_count: int
    counts: Counts
    parameters: dict[str, Any]
    created_at: Time
    started_at: Time | None
    finished_at: Time | None
    images_per_second: float | None
    eta_seconds: float | None
    retention_seconds: int | None
    state_reason: str | None = Field(None, description="Why its jobs wait; only where one batch is asked for.")
    links: BatchLinks

    @classmethod
    def of(cls, view: BatchView, state_reason: str | None = None) -> Self:
        name = ids.batch_id(view.public_id)
        path = batch_path(name)
        return cls(
            id=name,
            name=view.name,
            model=view.model,
            priority=view.priority,
            state=view.state,
            job_count=view.job_count,
            counts=Counts(**view.counts),
            parameters=view.parameters,
            created_at=view.created_at,
            started_at=view.started_at,
            finished_at=view.finished_at,
            images_per_second=view.images_per_second,
            eta_seconds=view.eta_seconds,
            retention_seconds=view.retention_seconds,
            state_reason=state_reason,
            links=BatchLinks(self=path, jobs=f"{path}/jobs"),
        )


class Retried(Answer):
    """How many jobs were queued again, and their batch."""

    retried: int
    batch: Batch


class BatchList(Answer):
    """Part of the batches, newest first."""

    data: list[Batch]
    next_cursor: str | None


class RenderError(Answer):
    """Why an attempt or a job failed."""

    error_class: str = Field(alias="class")
    detail: str

    @classmethod
    def of(cls, view: JobView | AttemptView) -> Self | None:
        if view.error_class is None:
            return None
        return cls.model_validate({"class": view.error_class, "detail": view.error_detail or ""})


class Image(Answer):
    """A stored image, with all that its worker noted of it."""

    model_config = ConfigDict(extra="allow")

    url: str = Field(description="Reads the image without a key, for a while; may be a path of this server.")
    thumbnail_url: str
    sha256: str
    width: int | None = None
    height: int | None = None
    bytes: int | None = None
    content_type: str | None = None


class JobLinks(Answer):
    """Paths of what belongs to a job."""

    itself: str = Field(alias="self")
    batch: str


class Job(Answer):
    """A job as it stands now. `parameters` are the effective ones."""

    id: str
    object: Literal["job"] = "job"
    batch_id: str
    index: int
    model: str
    state: State
    prompt: str
    seed: int
    parameters: dict[str, Any]
    attempt: int
    cancel_requested: bool
    run_at: Time | None
    worker: str | None
    error: RenderError | None
    image: Image | None
    finished_at: Time | None
    state_reason: str | None = Field(None, description="Why it waits.")
    queue_position: int | None = Field(None, description="Jobs before it; only where one job is asked for.")
    eta_seconds: float | None = Field(None, description="Estimated from measured rates; likewise.")
    links: JobLinks

    @classmethod
    def of(cls, view: JobView, image: Image | None, **more: Any) -> Self:
        name, batch = ids.job_id(view.batch_public_id, view.idx), ids.batch_id(view.batch_public_id)
        return cls(
            id=name,
            batch_id=batch,
            index=view.idx,
            model=view.model,
            state=view.state,
            prompt=view.prompt,
            seed=view.seed,
            parameters=view.parameters,
            attempt=view.attempt,
            cancel_requested=view.cancel_requested,
            run_at=view.run_at,
            worker=view.worker,
            error=RenderError.of(view),
            image=image,
            finished_at=view.finished_at,
            links=JobLinks(self=f"{PREFIX}/jobs/{name}", batch=batch_path(batch)),
            **more,
        )


class JobList(Answer):
    """Part of the jobs of a batch, in order."""

    data: list[Job]
    next_cursor: str | None


class Attempt(Answer):
    """One ended attempt of a job."""

    attempt: int
    worker: str
    started_at: Time
    finished_at: Time
    outcome: Outcome
    error: RenderError | None
    gpu_seconds: float | None

    @classmethod
    def of(cls, view: AttemptView) -> Self:
        return cls(
            attempt=view.attempt,
            worker=view.worker_id,
            started_at=view.started_at,
            finished_at=view.finished_at,
            outcome=Outcome(view.outcome),
            error=RenderError.of(view),
            gpu_seconds=view.gpu_seconds,
        )


class JobDetail(Job):
    """A job as it stands now, with its ended attempts."""

    attempts: list[Attempt]


def batch_path(name: str) -> str:
    """The path of a batch."""
    return f"{PREFIX}/batches/{name}"
