"""Submit batches, look at them, call them off."""

from __future__ import annotations

import re
import uuid
from http import HTTPStatus
from typing import cast

from flask import Response, request
from flask_openapi3.models.tag import Tag

from api.auth import guarded_blueprint, tenant
from api.bodies import StrictRequest
from api.context import context
from api.dialects.native import schemas
from api.dialects.native.images import image_answer
from api.dialects.native.schemas import Batch, BatchPath, Job
from api.parameters import NoQuery
from api.problems import documented
from shared import control, ids, progress, waiting
from shared.database import transaction
from shared.errors import Fault, InvalidInput
from shared.plan import plan
from shared.states import State
from shared.submit import Idempotency, submit

blueprint = guarded_blueprint(
    "batches", __name__, url_prefix=schemas.PREFIX, tag=Tag(name="batches", description="Many images at once")
)

_KEY = re.compile(r"[\x20-\x7e]{1,255}")
_BODY_ERRORS = (
    "malformed-json", "malformed-body", "duplicate-key", "json-too-deep", "invalid-idempotency-key",
    "idempotency-in-progress", "body-too-large", "too-many", "unsupported-media-type", "unknown-model",
    "idempotency-key-reused", "invalid", "too-many-requests",
)  # fmt: skip


@blueprint.post(
    "/batches",
    operation_id="submit_batch",
    description="The whole batch is checked and stored, or nothing of it. The answer comes before any image.",
    responses={HTTPStatus.ACCEPTED: Batch, **documented(*_BODY_ERRORS)},
)
def submit_batch(header: schemas.SubmitHeaders, query: NoQuery, body: schemas.BatchRequest) -> Response:
    """Submit prompts."""
    if (body.prompts is None) == (body.jobs is None):
        raise InvalidInput([Fault("/prompts", "exactly-one", "give exactly one of prompts and jobs")])
    services = context().services
    idempotency = _idempotency(header.idempotency_key)
    planned = plan(
        services.catalogue.find(body.model),
        body.parameters,
        prompts=body.prompts,
        jobs=body.jobs,
        num_images=body.num_images,
        max_jobs=services.settings.max_batch_jobs,
    )
    submitted = submit(
        services,
        tenant(),
        planned,
        name=body.name,
        priority=body.priority,
        idempotency=idempotency,
        retention_seconds=body.retention_seconds,
    )
    with transaction(services.engine) as connection:
        answer = Batch.of(progress.batch(connection, tenant().id, submitted.public_id))
    replayed = {"Idempotency_Replayed": "true"} if submitted.replayed else {}
    return answer.response(HTTPStatus.ACCEPTED, Location=answer.links.itself, **replayed)


@blueprint.get(
    "/batches", operation_id="list_batches", responses={200: schemas.BatchList, **documented("invalid-cursor")}
)
def list_batches(query: schemas.ListQuery) -> Response:
    """List batches, newest first."""
    with transaction(context().services.engine) as connection:
        page = progress.batches(connection, tenant().id, cursor=query.cursor, limit=query.limit)
    return schemas.BatchList(data=[Batch.of(v) for v in page.items], next_cursor=page.next_cursor).response()


@blueprint.get(
    "/batches/<batch_id>",
    operation_id="get_batch",
    responses={200: Batch, **documented("not-found")},
)
def get_batch(path: BatchPath, query: NoQuery) -> Response:
    """See how a batch stands."""
    return _answer(ids.parse_batch_id(path.batch_id)).response()


@blueprint.patch(
    "/batches/<batch_id>",
    operation_id="change_batch",
    responses={200: Batch, **documented("not-found")},
)
def change_batch(path: BatchPath, query: NoQuery, body: schemas.BatchChange) -> Response:
    """Pause a batch or let it go on, or put it into another priority class."""
    services, public_id = context().services, ids.parse_batch_id(path.batch_id)
    if body.priority is not None:
        control.set_priority(services, tenant().id, public_id, body.priority)
    if body.paused is not None:
        (control.pause_batch if body.paused else control.resume_batch)(services, tenant().id, public_id)
    return _answer(public_id).response()


@blueprint.post(
    "/batches/<batch_id>/retry",
    operation_id="retry_batch",
    responses={HTTPStatus.ACCEPTED: schemas.Retried, **documented("not-found", "conflict")},
)
def retry_batch(path: BatchPath, query: NoQuery, body: schemas.RetryRequest) -> Response:
    """Render failed jobs again, with a clean record; narrowed by error class."""
    public_id = ids.parse_batch_id(path.batch_id)
    retried = control.retry_batch(
        context().services,
        tenant().id,
        public_id,
        states=[State(state) for state in body.states],
        error_classes=body.error_classes,
    )
    return schemas.Retried(retried=retried, batch=_answer(public_id)).response(HTTPStatus.ACCEPTED)


@blueprint.delete(
    "/batches/<batch_id>",
    operation_id="cancel_batch",
    responses={HTTPStatus.ACCEPTED: Batch, **documented("not-found")},
)
def cancel_batch(path: BatchPath, query: NoQuery) -> Response:
    """Call a batch off. Images that are done stay."""
    services, public_id = context().services, ids.parse_batch_id(path.batch_id)
    control.cancel_batch(services, tenant().id, public_id)
    with transaction(services.engine) as connection:
        answer = Batch.of(progress.batch(connection, tenant().id, public_id))
    return answer.response(HTTPStatus.ACCEPTED)


@blueprint.get(
    "/batches/<batch_id>/jobs",
    operation_id="list_jobs",
    responses={200: schemas.JobList, **documented("invalid-cursor", "not-found")},
)
def list_jobs(path: BatchPath, query: schemas.JobsQuery) -> Response:
    """List the jobs of a batch, in order."""
    services, public_id = context().services, ids.parse_batch_id(path.batch_id)
    with transaction(services.engine) as connection:
        batch_id = progress.internal_batch_id(connection, tenant().id, public_id)
        page = progress.jobs(
            connection, tenant().id, public_id, states=query.state, cursor=query.cursor, limit=query.limit
        )
        found = waiting.circumstances(connection, batch_id, lease_seconds=services.settings.lease_seconds)
    data = [
        Job.of(view, image_answer(services, view), state_reason=found.reason(view.state, view.run_at))
        for view in page.items
    ]
    return schemas.JobList(data=data, next_cursor=page.next_cursor).response()


def _answer(public_id: uuid.UUID) -> Batch:
    services = context().services
    with transaction(services.engine) as connection:
        view = progress.batch(connection, tenant().id, public_id)
        lease_seconds = services.settings.lease_seconds
        reason = waiting.of_batch(connection, view, lease_seconds=lease_seconds) if view.open else None
    return Batch.of(view, reason)


def _idempotency(key: str | None) -> Idempotency | None:
    if key is None:
        return None
    if not _KEY.fullmatch(key):
        detail = "must have 1 to 255 printable ASCII characters"
        raise InvalidInput([Fault("/Idempotency-Key", "invalid-idempotency-key", detail)])
    return Idempotency(key, cast(StrictRequest, request).body_sha256)
