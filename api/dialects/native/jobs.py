"""Look at one job, wait for it, fetch its image, call it off."""

from __future__ import annotations

import time
from http import HTTPStatus

from flask import Response, redirect
from flask_openapi3.models.tag import Tag

from api.auth import guarded_blueprint, tenant
from api.context import context
from api.dialects.native import schemas
from api.dialects.native.images import image_answer, image_link
from api.dialects.native.schemas import Job, JobDetail, JobPath
from api.parameters import NoQuery
from api.problems import documented
from shared import control, ids, progress, waiting
from shared.database import transaction
from shared.errors import Conflict
from shared.progress import JobView
from shared.states import FINAL

blueprint = guarded_blueprint(
    "jobs", __name__, url_prefix=schemas.PREFIX, tag=Tag(name="jobs", description="One image each")
)

#: seconds between two looks at a job that somebody waits for
_LOOK_SECONDS = 0.25

_LINK = {"description": "A link that reads it without a key, for a while, is in the Location header."}


@blueprint.get(
    "/jobs/<job_id>",
    operation_id="get_job",
    description="With `wait` the answer comes as soon as the job has ended, and at the latest after so many seconds. "
    "A busy or stopping server answers earlier.",
    responses={200: JobDetail, **documented("not-found")},
)
def get_job(path: JobPath, query: schemas.WaitQuery) -> Response:
    """See how a job stands, or wait for it to end."""
    services = context().services
    view = _wait(path.job_id, query.wait) if query.wait else _look(path.job_id)
    with transaction(services.engine) as connection:
        attempts = progress.attempts(connection, view.batch_id, view.idx)
        waits = waiting.of_job(connection, view, lease_seconds=services.settings.lease_seconds)
    answers = [schemas.Attempt.of(attempt) for attempt in attempts]
    return JobDetail.of(
        view,
        image_answer(services, view),
        attempts=answers,
        state_reason=waits.reason,
        queue_position=waits.ahead,
        eta_seconds=waits.eta_seconds,
    ).response()


@blueprint.get(
    "/jobs/<job_id>/image",
    operation_id="get_image",
    responses={HTTPStatus.FOUND: _LINK, **documented("not-found", "not-ready")},
)
def get_image(path: JobPath, query: NoQuery) -> Response:
    """Fetch the image of a job."""
    return _redirect(image_link(context().services, _look(path.job_id)))


@blueprint.get(
    "/jobs/<job_id>/thumbnail",
    operation_id="get_thumbnail",
    responses={HTTPStatus.FOUND: _LINK, **documented("not-found", "not-ready")},
)
def get_thumbnail(path: JobPath, query: NoQuery) -> Response:
    """Fetch the image of a job, at most 256 pixels wide and high."""
    return _redirect(image_link(context().services, _look(path.job_id), thumbnail=True))


@blueprint.delete(
    "/jobs/<job_id>",
    operation_id="cancel_job",
    responses={HTTPStatus.ACCEPTED: Job, **documented("not-found")},
)
def cancel_job(path: JobPath, query: NoQuery) -> Response:
    """Call a job off: at once where it waits, within a moment where it is being rendered."""
    services = context().services
    control.cancel_job(services, tenant().id, *ids.parse_job_id(path.job_id))
    view = _look(path.job_id)
    return Job.of(view, image_answer(services, view)).response(HTTPStatus.ACCEPTED)


@blueprint.post(
    "/jobs/<job_id>/retry",
    operation_id="retry_job",
    responses={HTTPStatus.ACCEPTED: Job, **documented("not-found", "conflict")},
)
def retry_job(path: JobPath, query: NoQuery) -> Response:
    """Render a failed or canceled job again, with a clean record."""
    services = context().services
    if not control.retry_job(services, tenant().id, *ids.parse_job_id(path.job_id)):
        raise Conflict(f"Only failed and canceled jobs can be retried; this one is {_look(path.job_id).state}.")
    view = _look(path.job_id)
    return Job.of(view, image_answer(services, view)).response(HTTPStatus.ACCEPTED)


def _look(name: str) -> JobView:
    public_id, idx = ids.parse_job_id(name)
    with transaction(context().services.engine) as connection:
        return progress.job(connection, tenant().id, public_id, idx)


def _wait(name: str, seconds: float) -> JobView:
    """The job once it has ended, or as it stands after `seconds`. No connection is held between two looks."""
    deadline = time.monotonic() + seconds
    closing = context().closing
    with context().polls.hold(tenant().id) as free:
        while True:
            view = _look(name)
            left = deadline - time.monotonic()
            if view.state in FINAL or left <= 0 or not free or closing.wait(min(_LOOK_SECONDS, left)):
                return view


def _redirect(link: str) -> Response:
    response = redirect(link, HTTPStatus.FOUND)
    assert isinstance(response, Response)
    return response
