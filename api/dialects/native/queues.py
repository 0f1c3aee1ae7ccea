"""What each model has waiting, and how many workers that calls for; autoscalers read it."""

from __future__ import annotations

from collections.abc import Sequence

from flask import Response
from flask_openapi3.models.tag import Tag
from pydantic import ConfigDict, Field

from api.answers import Answer
from api.auth import guarded_blueprint
from api.context import context
from api.dialects.native import schemas
from api.parameters import NoQuery
from api.problems import documented
from shared import waiting
from shared.database import transaction
from shared.errors import NotFound

blueprint = guarded_blueprint(
    "queues", __name__, url_prefix=schemas.PREFIX, tag=Tag(name="queues", description="What waits, by model")
)


class Queue(Answer):
    """The queue of one model."""

    model_config = ConfigDict(from_attributes=True)

    model: str
    queued: int
    scheduled: int
    held: int
    rendering: int
    oldest_wait_seconds: float | None = Field(description="Since the oldest batch with queued jobs was submitted.")
    images_per_second: float | None = Field(description="Of all living workers together, where they have measured it.")
    pending_seconds: float | None = Field(description="Estimated time of one worker for what is queued or rendered.")
    live_workers: int = Field(description="Living workers that serve the model and are not draining.")
    wanted_workers: int = Field(description="Workers that would do the pending work within IMAGEFARM_SCALE_SECONDS.")


class QueueList(Answer):
    """The queues of all models of the catalogue."""

    data: list[Queue]


@blueprint.get("/queues", operation_id="list_queues", responses={200: QueueList})
def list_queues(query: NoQuery) -> Response:
    """See what waits, by model."""
    return QueueList(data=_queues(list(context().services.catalogue))).response()


@blueprint.get("/queues/<name>", operation_id="get_queue", responses={200: Queue, **documented("not-found")})
def get_queue(path: schemas.ModelPath, query: NoQuery) -> Response:
    """See what waits for one model."""
    if path.name not in context().services.catalogue:
        raise NotFound("There is no such model.")
    return _queues([path.name])[0].response()


def _queues(models: Sequence[str]) -> list[Queue]:
    services = context().services
    with transaction(services.engine) as connection:
        views = waiting.queues(
            connection,
            models,
            lease_seconds=services.settings.lease_seconds,
            scale_seconds=services.settings.scale_seconds,
        )
    return [Queue.model_validate(view) for view in views]
