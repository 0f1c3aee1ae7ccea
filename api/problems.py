"""Every error as an RFC 9457 problem. The one place that knows which HTTP status an error has."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from flask import Flask, Response, g, request
from flask_openapi3.models import OPENAPI3_REF_PREFIX
from pydantic import BaseModel
from werkzeug.exceptions import HTTPException

from shared.errors import FarmError, Fault, InvalidInput, StorageError

logger = logging.getLogger(__name__)

CONTENT_TYPE = "application/problem+json"
#: `type` is this and the code of the error
TYPE_PREFIX = "urn:imagefarm:problem:"

_MAX_TEXT = 500
_RETRY_SECONDS = "2"


@dataclass(frozen=True)
class _Kind:
    status: int
    title: str
    headers: Mapping[str, str] | None = None


_RETRY = {"Retry-After": _RETRY_SECONDS}
_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="imagefarm"'}

#: by the code of an error, or of the first fault of an `InvalidInput`
_KINDS: dict[str, _Kind] = {
    "malformed-json": _Kind(400, "The body is not JSON."),
    "malformed-body": _Kind(400, "The body did not arrive as HTTP wants it."),
    "duplicate-key": _Kind(400, "A name is given twice."),
    "json-too-deep": _Kind(400, "The body is nested too deeply."),
    "invalid-cursor": _Kind(400, "This is not a cursor of this list."),
    "invalid-idempotency-key": _Kind(400, "This cannot be an idempotency key."),
    "unauthenticated": _Kind(401, "A valid API key is needed.", _CHALLENGE),
    "forbidden": _Kind(403, "This key may not do that."),
    "link-refused": _Kind(403, "This link is not valid."),
    "not-found": _Kind(404, "There is no such thing here."),
    "object-missing": _Kind(404, "The image is no longer stored."),
    "method-not-allowed": _Kind(405, "This cannot be done with this method."),
    "conflict": _Kind(409, "The request does not fit the present state."),
    "idempotency-in-progress": _Kind(409, "An equal request is being handled.", _RETRY),
    "not-ready": _Kind(409, "This job has no image."),
    "link-expired": _Kind(410, "This link is too old."),
    "body-too-large": _Kind(413, "The body is too large."),
    "too-many": _Kind(413, "The batch is too large."),
    "unsupported-media-type": _Kind(415, "The body must be plain JSON in UTF-8."),
    "invalid": _Kind(422, "The request is not valid."),
    "unknown-model": _Kind(422, "There is no such model."),
    "idempotency-key-reused": _Kind(422, "This idempotency key belongs to another request."),
    "too-many-requests": _Kind(429, "Too many requests at once.", _RETRY),
    "internal": _Kind(500, "Something went wrong inside the farm."),
    "unavailable": _Kind(503, "A part of the farm is out of reach.", _RETRY),
    "storage-unavailable": _Kind(503, "The object storage does not answer.", _RETRY),
    "storage-misconfigured": _Kind(503, "The object storage refuses this farm.", _RETRY),
}


class ProblemFault(BaseModel):
    """One wrong field: where, what kind of fault, and what would be right."""

    pointer: str
    code: str
    detail: str


class Problem(BaseModel):
    """An error (RFC 9457). `type` is stable; `errors` names each wrong field by JSON pointer."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[ProblemFault] = []
    #: also in the header X-Request-ID and in the log
    request_id: str


def documented(*codes: str) -> dict[str | int | HTTPStatus, Any]:
    """The entries of an OpenAPI operation's `responses` for these errors."""
    schema = {"$ref": f"{OPENAPI3_REF_PREFIX}/{Problem.__name__}"}
    by_status: dict[int, list[str]] = {}
    for code in codes:
        by_status.setdefault(_KINDS[code].status, []).append(code)
    return {
        status: {
            "description": " ".join(f"{code}: {_KINDS[code].title}" for code in same),
            "content": {CONTENT_TYPE: {"schema": schema}},
        }
        for status, same in by_status.items()
    }


def install(app: Flask) -> None:
    """Make every error of `app`, expected or not, a problem."""
    app.register_error_handler(FarmError, _farm_error)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _unexpected)


def _farm_error(error: FarmError) -> Response:
    if isinstance(error, InvalidInput):
        first = error.faults[0].code if error.faults else error.code
        return _answer(first if first in _KINDS else error.code, error.detail, error.faults)
    if error.code not in _KINDS:
        return _unexpected(error)
    if _KINDS[error.code].status >= 500:
        logger.warning("request %s: %s: %s", g.request_id, error.code, error.detail)
    # what the storage says names folders and hosts of ours: it is for the log
    return _answer(error.code, _KINDS[error.code].title if isinstance(error, StorageError) else error.detail)


def _http_error(error: HTTPException) -> Response:
    """An error of Flask itself: no such route, wrong method, a client that went away."""
    status = error.code or 500
    if status >= 500:
        return _unexpected(error)
    phrase = HTTPStatus(status).phrase
    response = _answer(phrase.lower().replace(" ", "-"), phrase + ".", kind=_Kind(status, phrase + "."))
    if allowed := error.get_response().headers.get("Allow"):
        response.headers["Allow"] = allowed
    return response


def _unexpected(error: Exception) -> Response:
    rule = request.url_rule.rule if request.url_rule else "an unknown route"
    logger.error("request %s: unexpected error in %s %s", g.request_id, request.method, rule, exc_info=error)
    return _answer("internal", "The error is in the farm's log under this request id.")


def _answer(code: str, detail: str, faults: Sequence[Fault] = (), kind: _Kind | None = None) -> Response:
    kind = _KINDS.get(code) or kind or _KINDS["internal"]
    problem = Problem(
        type=TYPE_PREFIX + code,
        title=kind.title,
        status=kind.status,
        detail=_clip(detail),
        errors=[ProblemFault(pointer=_clip(f.pointer), code=f.code, detail=_clip(f.detail)) for f in faults],
        request_id=g.request_id,
    )
    # ASCII only, so that a lone surrogate in a name can be told too
    body = json.dumps(problem.model_dump(exclude_defaults=True))
    return Response(body, kind.status, kind.headers, content_type=CONTENT_TYPE)


def _clip(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"
