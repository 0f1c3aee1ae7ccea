"""Jobs over HTTP: look, list, wait, fetch the image, call off; and what the farm can render."""

from __future__ import annotations

import hashlib
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from pydantic import SecretStr
from sqlalchemy import insert
from werkzeug.test import TestResponse

from api.app import create_app
from api.context import Context
from shared import tenants
from shared.database import transaction
from shared.lifecycle import Failure
from shared.models import Worker
from shared.services import Services
from shared.states import Outcome
from shared.storage.s3 import open_storage as open_s3
from shared.tenants import TenantIdentity
from tests.api_calls import Calls, claim, fail, problem, render


@pytest.fixture
def api(services: Services, api_key: str) -> Calls:
    return Calls(create_app(services), api_key)


def job_path(batch: dict[str, object], index: int = 0) -> str:
    return f"/jobs/{str(batch['id']).replace('batch', 'job')}_{index}"


# look and list -----------------------------------------------------------------------------------------------------


def test_a_waiting_job(api: Calls) -> None:
    batch = api.submit("a fox", parameters={"seed": 5, "width": 32})
    body = api.get(job_path(batch)).json or {}
    job_id = job_path(batch).removeprefix("/jobs/")
    parameters = {**batch["parameters"], "width": 32}
    assert body == {
        "id": job_id, "object": "job", "batch_id": batch["id"], "index": 0, "model": "fake", "state": "queued",
        "prompt": "a fox", "seed": 5, "parameters": parameters, "attempt": 0, "cancel_requested": False,
        "run_at": None, "worker": None, "error": None, "image": None, "finished_at": None, "attempts": [],
        "state_reason": "no live worker serves fake", "queue_position": 0, "eta_seconds": None,
        "links": {"self": f"/api/v1/jobs/{job_id}", "batch": f"/api/v1/batches/{batch['id']}"},
    }  # fmt: skip
    del body["attempts"]
    body["queue_position"] = None  # counted where one job is asked for
    assert api.jobs(batch) == [body]


def test_a_failed_job_says_why(api: Calls, services: Services) -> None:
    batch = api.submit("a")
    token, [job] = claim(services)
    fail(services, Failure(job.id, Outcome.PERMANENT, "content_policy", "not this one"), token)
    body = api.get(job_path(batch)).json or {}
    error = {"class": "content_policy", "detail": "not this one"}
    assert (body["state"], body["error"], body["attempt"]) == ("failed", error, 1)
    [attempt] = body["attempts"]
    assert set(attempt) == {"attempt", "worker", "started_at", "finished_at", "outcome", "error", "gpu_seconds"}
    assert (attempt["worker"], attempt["outcome"], attempt["error"]) == ("w1", "permanent", error)


def test_jobs_are_listed_by_state_and_walked_in_order(api: Calls, services: Services) -> None:
    batch = api.submit(*"abcdef")
    render(services)
    claim(services, limit=2)
    path = f"/batches/{batch['id']}/jobs"

    def states(query: str) -> list[str]:
        return [job["state"] for job in (api.get(f"{path}?{query}").json or {})["data"]]

    assert states("state=succeeded") == ["succeeded"]
    assert states("state=succeeded,rendering") == states("state=rendering&state=succeeded") == [
        "succeeded", "rendering", "rendering",
    ]  # fmt: skip
    assert states("state=failed") == []
    seen, cursor = [], ""
    while True:
        page = api.get(f"{path}?limit=2&state=queued,rendering{cursor}").json or {}
        seen += [job["index"] for job in page["data"]]
        if page["next_cursor"] is None:
            break
        cursor = f"&cursor={page['next_cursor']}"
    assert seen == [1, 2, 3, 4, 5]


# the image ---------------------------------------------------------------------------------------------------------


def follow(api: Calls, link: str) -> TestResponse:
    """What a link gives to somebody without a key."""
    return api.app.test_client().get(link)


@pytest.mark.parametrize("thumbnail", [None, b"small"])
def test_a_finished_image_is_fetched_by_link(api: Calls, services: Services, thumbnail: bytes | None) -> None:
    batch = api.submit("a")
    render(services, b"large", thumbnail)
    job = api.get(job_path(batch)).json or {}
    image = job["image"]
    assert (job["state"], job["attempts"][0]["outcome"], job["attempts"][0]["gpu_seconds"]) == (
        "succeeded", "succeeded", 0.5,
    )  # fmt: skip
    assert image["sha256"] == hashlib.sha256(b"large").hexdigest()
    assert (image["width"], image["height"], image["bytes"], image["content_type"]) == (64, 48, 5, "image/png")
    assert image["device"] == "cpu"
    assert "thumbnail" not in image
    for path, url, data, kind, suffix in (
        ("image", image["url"], b"large", "image/png", ".png"),
        ("thumbnail", image["thumbnail_url"], thumbnail or b"large", *(
            ("image/webp", ".webp") if thumbnail else ("image/png", ".png"))),
    ):  # fmt: skip
        answer = api.get(f"{job_path(batch)}/{path}")
        assert answer.status_code == 302
        for link in (answer.headers["Location"], url):
            got = follow(api, link)
            assert (got.status_code, got.data, got.content_type) == (200, data, kind)
            assert got.headers["Content-Disposition"] == f'inline; filename="{job["id"]}{suffix}"'
            assert got.headers["X-Content-Type-Options"] == "nosniff"
            assert "sandbox" in got.headers["Content-Security-Policy"]


def test_without_an_image_the_state_is_named(api: Calls, services: Services) -> None:
    batch = api.submit("a", "b")
    claim(services)
    for index, state in enumerate(("rendering", "queued")):
        for what in ("image", "thumbnail"):
            assert state in problem(api.get(f"{job_path(batch, index)}/{what}"), 409, "not-ready")["detail"]


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"type": ["text/html"]}, 403, "link-refused"), ({"filename": ["x.html"]}, 403, "link-refused"),
        ({"expires": ["99999999999"]}, 403, "link-refused"), ({"expires": ["x"]}, 403, "link-refused"),
        ({"signature": ["é"]}, 403, "link-refused"), ({"signature": []}, 403, "link-refused"),
    ],
)  # fmt: skip
def test_an_altered_link_is_refused(
    api: Calls, services: Services, change: dict[str, list[str]], status: int, code: str
) -> None:
    batch = api.submit("a")
    render(services)
    link = urlsplit(str(api.get(f"{job_path(batch)}/image").headers["Location"]))
    altered = {**parse_qs(link.query), **change}
    problem(follow(api, f"{link.path}?{urlencode(altered, doseq=True)}"), status, code)


@pytest.mark.parametrize(
    "key", ["t/1/1/0/x.png", "../../etc/passwd", "%2e%2e/.link-key", ".link-key", "a//b", "a\x00b"]
)
def test_no_path_reaches_a_file_without_a_link(api: Calls, key: str) -> None:
    problem(
        follow(api, f"/files/{key}?expires=99999999999&type=image/png&filename=x&signature=00"), 403, "link-refused"
    )


def test_an_old_link_and_a_link_to_nothing(api: Calls, services: Services) -> None:
    options = {"content_type": "image/png", "filename": "x.png"}
    problem(follow(api, services.storage.link("t/x.png", expires_in=-1, **options)), 410, "link-expired")
    problem(follow(api, services.storage.link("t/x.png", expires_in=60, **options)), 404, "object-missing")


def test_s3_serves_its_own_links(api: Calls, services: Services, api_key: str) -> None:
    batch = api.submit("a")
    render(services)
    own = {
        "storage_url": "s3://bucket/images",
        "s3_endpoint_url": "http://objects:9000",
        "s3_access_key": SecretStr("k"),
    }
    settings = services.settings.model_copy(update={**own, "s3_secret_key": SecretStr("s")})
    over_s3 = replace(services, settings=settings)
    assert type(over_s3.storage) is type(open_s3(settings))
    api = Calls(create_app(over_s3), api_key)
    link = api.get(f"{job_path(batch)}/image").headers["Location"]
    assert link.startswith("http://objects:9000/bucket/images/t/")
    assert (api.get(job_path(batch)).json or {})["image"]["url"].startswith("http://objects:9000/")
    problem(follow(api, "/files/t/x.png"), 404, "not-found")


# wait --------------------------------------------------------------------------------------------------------------


def test_waiting_ends_with_the_job(api: Calls, services: Services) -> None:
    batch = api.submit("a")
    finisher = threading.Timer(0.3, render, [services])
    finisher.start()
    began = time.monotonic()
    body = api.get(f"{job_path(batch)}?wait=20").json or {}
    assert 0.3 <= time.monotonic() - began < 3
    assert (body["state"], len(body["attempts"])) == ("succeeded", 1)
    finisher.join()


def test_waiting_ends_with_the_time_and_holds_no_connection(api: Calls, services: Services) -> None:
    batch = api.submit("a")
    answers: list[TestResponse] = []
    waiter = threading.Thread(target=lambda: answers.append(api.get(f"{job_path(batch)}?wait=0.6")))
    began = time.monotonic()
    waiter.start()
    held = []
    while waiter.is_alive():
        held.append(services.engine.pool.checkedout())  # type: ignore[attr-defined]
        waiter.join(0.01)
    assert 0.6 <= time.monotonic() - began < 2
    assert (answers[0].json or {})["state"] == "queued"
    # each look takes a few milliseconds of the quarter of a second
    assert held.count(0) > len(held) / 2


def test_a_stopping_or_crowded_server_does_not_wait(api: Calls, tenant: TenantIdentity) -> None:
    batch = api.submit("a")
    context: Context = api.app.extensions["imagefarm"]
    began = time.monotonic()
    with ExitStack() as crowd:
        share = context.services.settings.api_threads // 2 * 3 // 4
        assert all(crowd.enter_context(context.polls.hold(tenant.id)) for _ in range(share))
        assert (api.get(f"{job_path(batch)}?wait=30").json or {})["state"] == "queued"
        assert not crowd.enter_context(context.polls.hold(tenant.id))
        assert crowd.enter_context(context.polls.hold(tenant.id + 1))
    context.closing.set()
    assert (api.get(f"{job_path(batch)}?wait=30").json or {})["state"] == "queued"
    assert time.monotonic() - began < 2


# cancel ------------------------------------------------------------------------------------------------------------


def test_a_waiting_job_is_called_off_at_once_a_rendering_one_is_flagged(api: Calls, services: Services) -> None:
    batch = api.submit("a", "b")
    claim(services)
    for index, state, flagged in ((0, "rendering", True), (1, "canceled", False)):
        for _ in range(2):
            answer = api.delete(job_path(batch, index))
            assert answer.status_code == 202
            body = answer.json or {}
            assert (body["state"], body["cancel_requested"]) == (state, flagged)


@pytest.mark.parametrize(
    ("method", "suffix"), [("GET", ""), ("GET", "?wait=5"), ("GET", "/image"), ("GET", "/thumbnail"), ("DELETE", "")]
)
def test_another_tenants_job_looks_like_none(api: Calls, services: Services, method: str, suffix: str) -> None:
    with transaction(services.engine) as connection:
        other = tenants.ensure_tenant(connection, "stranger")
        stranger = Calls(api.app, tenants.create_key(connection, other, "theirs"))
    batch = stranger.submit("secret")
    bodies = []
    for path in (job_path(batch), "/jobs/job_" + "0" * 32 + "_0", job_path(batch, 1), "/jobs/nonsense", "/jobs/1"):
        body = problem(api._call(method, path + suffix), 404, "not-found")
        del body["request_id"]
        bodies.append(body)
    assert all(body == bodies[0] for body in bodies)
    assert (stranger.get(job_path(batch)).json or {})["state"] == "queued"


# models and workers ------------------------------------------------------------------------------------------------


def test_models_tell_what_they_take_and_whether_they_are_served(api: Calls, services: Services) -> None:
    models = {model["name"]: model for model in (api.get("/models").json or {})["data"]}
    assert set(models) == set(services.catalogue)
    fake = models["fake"]
    assert set(fake) == {
        "name", "backend", "description", "defaults", "limits", "max_batch", "parameters", "served",
    }  # fmt: skip
    assert (fake["backend"], fake["served"], fake["parameters"]["width"]["type"]) == ("fake", False, "integer")
    assert models["demo-diffusion"]["defaults"]["width"] == 64
    assert models["demo-diffusion"]["limits"]["size_multiple"] == 8
    add_worker(services)
    assert (api.get("/models/fake").json or {}) == {**fake, "served": True}
    problem(api.get("/models/nope"), 404, "not-found")


def test_workers_are_listed(api: Calls, services: Services) -> None:
    assert api.get("/workers").json == {"data": []}
    add_worker(services)
    [worker] = (api.get("/workers").json or {})["data"]
    assert set(worker) == {
        "id", "host", "pid", "models", "resident", "device", "images", "last_error", "started_at", "heartbeat_at",
        "alive", "rates", "resting", "rendering", "draining_at", "state",
    }  # fmt: skip
    assert (worker["id"], worker["models"], worker["device"], worker["alive"]) == (
        "w1", ["fake"], {"name": "none"}, True,
    )  # fmt: skip


def add_worker(services: Services) -> None:
    with transaction(services.engine) as connection:
        row = {"id": "w1", "host": "h", "pid": 7, "models": ["fake"], "device": {"name": "none"}}
        connection.execute(insert(Worker).values(**row))
