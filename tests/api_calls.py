"""Calls the API in this process, and stands in for the worker that it has not got."""

from __future__ import annotations

import hashlib
import uuid
from typing import Any

from werkzeug.test import TestResponse

from api.app import Api
from shared import lifecycle
from shared.database import transaction
from shared.keys import image_key, thumbnail_key
from shared.lifecycle import ClaimedJob, Failure, Result
from shared.services import Services

ROOT = "/api/v1"


class Calls:
    """The native API with a key; `path` is below `/api/v1`."""

    def __init__(self, app: Api, key: str) -> None:
        self.app = app
        self.client = app.test_client()
        self.headers = {"Authorization": f"Bearer {key}"}

    def get(self, path: str, **options: Any) -> TestResponse:
        return self._call("GET", path, **options)

    def post(self, path: str, **options: Any) -> TestResponse:
        return self._call("POST", path, **options)

    def patch(self, path: str, **options: Any) -> TestResponse:
        return self._call("PATCH", path, **options)

    def delete(self, path: str, **options: Any) -> TestResponse:
        return self._call("DELETE", path, **options)

    def submit(self, *prompts: str, **fields: Any) -> dict[str, Any]:
        """A stored batch."""
        answer = self.post("/batches", json={"model": "fake", "prompts": prompts or ["a fox"], **fields})
        assert answer.status_code == 202, answer.text
        return dict(answer.json or {})

    def jobs(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """The jobs of a small batch."""
        return list((self.get(f"/batches/{batch['id']}/jobs").json or {})["data"])

    def _call(self, method: str, path: str, headers: dict[str, str] | None = None, **options: Any) -> TestResponse:
        return self.client.open(ROOT + path, method=method, headers={**self.headers, **(headers or {})}, **options)


def problem(answer: TestResponse, status: int, code: str) -> dict[str, Any]:
    """The problem that an answer must be."""
    body = dict(answer.json or {})
    assert (answer.status_code, body.get("type")) == (status, f"urn:imagefarm:problem:{code}"), answer.text
    assert answer.content_type == "application/problem+json"
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]
    assert body["request_id"] == answer.headers["X-Request-ID"]
    return body


def claim(services: Services, *, limit: int = 1, token: uuid.UUID | None = None) -> tuple[uuid.UUID, list[ClaimedJob]]:
    """Lease waiting jobs of the fake model, as a worker does."""
    token = token or uuid.uuid4()
    with transaction(services.engine) as connection:
        jobs = lifecycle.claim(connection, "fake", worker="w1", token=token, lease_seconds=30, limit=limit)
    return token, jobs


def render(services: Services, data: bytes = b"picture", thumbnail: bytes | None = None) -> ClaimedJob:
    """Claim the next job, store an image for it and record it."""
    token, [job] = claim(services)
    digest = hashlib.sha256(data).digest()
    key = image_key(job.tenant_id, job.batch_id, job.idx, digest.hex(), "png")
    services.storage.put(key, data, content_type="image/png")
    if thumbnail is not None:
        services.storage.put(thumbnail_key(key), thumbnail, content_type="image/webp")
    facts = {"width": 64, "height": 48, "bytes": len(data), "content_type": "image/png", "device": "cpu"}
    facts["thumbnail"] = thumbnail is not None
    with transaction(services.engine) as connection:
        assert lifecycle.succeed(connection, token, [Result(job.id, key, digest, 0.5, facts)]) == {job.id}
    return job


def fail(services: Services, failure: Failure, token: uuid.UUID) -> None:
    """Give a claimed job up."""
    with transaction(services.engine) as connection:
        assert lifecycle.fail(connection, token, [failure])
