"""Batches over HTTP: submit, look, list, call off; keys and tenants; what happens when a part is away."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime

import pytest
import redis
from pydantic import SecretStr
from sqlalchemy import insert, text, update

from api.app import create_app
from shared import tenants
from shared.database import open_engine, transaction
from shared.models import ApiKey, Batch, IdempotencyKey
from shared.queue import Bell, queue_name
from shared.services import Services
from shared.settings import Settings
from shared.tenants import TenantIdentity
from tests.api_calls import Calls, claim, problem


@pytest.fixture
def api(services: Services, api_key: str) -> Calls:
    return Calls(create_app(services), api_key)


@pytest.fixture
def stranger(services: Services, api: Calls) -> Calls:
    """Another tenant's view of the same API."""
    with transaction(services.engine) as connection:
        other = tenants.ensure_tenant(connection, "stranger")
        return Calls(api.app, tenants.create_key(connection, other, "theirs"))


def count(services: Services, table: str) -> int:
    with transaction(services.engine) as connection:
        return int(connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one())


# submit ------------------------------------------------------------------------------------------------------------


def test_a_batch_is_accepted_stored_and_announced(api: Calls, bells: redis.Redis) -> None:
    answer = api.post(
        "/batches",
        json={"model": "fake", "name": "foxes", "priority": "high", "prompts": ["a fox", "två rävar"], "num_images": 2},
    )

    assert answer.status_code == 202
    body = answer.json or {}
    assert answer.headers["Location"] == body["links"]["self"] == f"/api/v1/batches/{body['id']}"
    assert "Idempotency-Replayed" not in answer.headers
    assert set(body) == {
        "id", "object", "name", "model", "priority", "state", "job_count", "counts", "parameters", "created_at",
        "started_at", "finished_at", "images_per_second", "eta_seconds", "retention_seconds", "state_reason", "links",
    }  # fmt: skip
    assert (body["object"], body["name"], body["model"], body["priority"]) == ("batch", "foxes", "fake", "high")
    assert (body["state"], body["job_count"], body["started_at"]) == ("queued", 4, None)
    zero = dict.fromkeys(["scheduled", "held", "rendering", "succeeded", "failed", "canceled"], 0)
    assert body["counts"] == {"queued": 4, **zero}
    assert datetime.fromisoformat(body["created_at"]).utcoffset() is not None
    assert body["links"]["jobs"] == f"/api/v1/batches/{body['id']}/jobs"
    assert [job["prompt"] for job in api.jobs(body)] == ["a fox", "a fox", "två rävar", "två rävar"]
    assert bells.llen(queue_name("fake")) == 4


def test_images_of_one_prompt_take_consecutive_seeds(api: Calls) -> None:
    batch = api.submit("a", num_images=3, parameters={"seed": 2**63 - 3})
    assert [job["seed"] for job in api.jobs(batch)] == [2**63 - 3, 2**63 - 2, 2**63 - 1]


def test_jobs_may_differ_from_the_shared_parameters(api: Calls) -> None:
    answer = api.post(
        "/batches",
        json={
            "model": "fake",
            "parameters": {"width": 32, "num_inference_steps": 3},
            "jobs": [{"prompt": "a"}, {"prompt": "b", "width": 16, "seed": 5}],
        },
    )
    first, second = api.jobs(answer.json or {})
    assert (first["parameters"]["width"], first["parameters"]["num_inference_steps"]) == (32, 3)
    assert (second["parameters"]["width"], second["parameters"]["num_inference_steps"]) == (16, 3)
    assert (second["prompt"], second["seed"]) == ("b", 5)


def test_a_batch_of_too_many_jobs_is_refused(services: Services, api_key: str) -> None:
    small = replace(services, settings=services.settings.model_copy(update={"max_batch_jobs": 3}))
    answer = Calls(create_app(small), api_key).post(
        "/batches", json={"model": "fake", "prompts": ["a", "b"], "num_images": 2}
    )
    body = problem(answer, 413, "too-many")
    assert body["errors"][0]["pointer"] == "/prompts"
    assert "at most 3" in body["errors"][0]["detail"]
    assert count(services, "batch") == 0


# look and list -----------------------------------------------------------------------------------------------------


def test_a_batch_tells_how_it_stands(api: Calls, services: Services) -> None:
    batch = api.submit("a", "b", "c")
    claim(services)
    body = api.get(f"/batches/{batch['id']}").json or {}
    assert body["state"] == "rendering"
    assert (body["counts"]["queued"], body["counts"]["rendering"]) == (2, 1)
    assert body["started_at"] is not None


def test_the_list_is_newest_first_and_can_be_walked(api: Calls, stranger: Calls) -> None:
    made = [api.submit(name=f"n{i}")["id"] for i in range(5)]
    stranger.submit(name="theirs")
    seen, cursor = [], None
    while True:
        page = api.get("/batches", query_string={"limit": 2, **({"cursor": cursor} if cursor else {})}).json or {}
        seen += [batch["id"] for batch in page["data"]]
        if not (cursor := page["next_cursor"]):
            break
    assert seen == made[::-1]


def test_a_whole_page_has_no_next(api: Calls) -> None:
    for _ in range(2):
        api.submit()
    assert (api.get("/batches?limit=2").json or {})["next_cursor"] is None
    assert (api.get("/batches").json or {})["next_cursor"] is None


# cancel ------------------------------------------------------------------------------------------------------------


def test_a_canceled_batch_ends_at_once_and_stays_so(api: Calls) -> None:
    batch = api.submit("a", "b")
    for _ in range(2):
        answer = api.delete(f"/batches/{batch['id']}")
        assert answer.status_code == 202
        assert (answer.json or {})["state"] == "canceled"
    assert (answer.json or {})["counts"]["canceled"] == 2


# idempotency -------------------------------------------------------------------------------------------------------

KEY = {"Idempotency-Key": "order 17"}


def test_the_same_key_and_body_give_the_same_batch(api: Calls, services: Services) -> None:
    body = {"model": "fake", "prompts": ["a", "b"]}
    first, second = (api.post("/batches", json=body, headers=KEY) for _ in range(2))
    assert first.status_code == second.status_code == 202
    assert (first.json or {})["id"] == (second.json or {})["id"]
    assert "Idempotency-Replayed" not in first.headers
    assert second.headers["Idempotency-Replayed"] == "true"
    assert second.headers["Location"] == first.headers["Location"]
    assert (count(services, "batch"), count(services, "job")) == (1, 2)


def test_a_key_belongs_to_one_body_and_one_tenant(api: Calls, stranger: Calls, services: Services) -> None:
    api.submit("a")
    assert api.post("/batches", json={"model": "fake", "prompts": ["a"]}, headers=KEY).status_code == 202
    other = api.post("/batches", json={"model": "fake", "prompts": ["b"]}, headers=KEY)
    assert problem(other, 422, "idempotency-key-reused")["errors"][0]["pointer"] == "/Idempotency-Key"
    theirs = stranger.post("/batches", json={"model": "fake", "prompts": ["b"]}, headers=KEY)
    assert theirs.status_code == 202
    assert "Idempotency-Replayed" not in theirs.headers
    assert count(services, "batch") == 3


def test_a_key_that_another_call_holds_is_a_conflict(api: Calls, services: Services, tenant: TenantIdentity) -> None:
    api.submit("a")
    with transaction(services.engine) as connection:
        # what a call that is still storing its jobs holds
        row = connection.execute(text("SELECT id FROM batch")).scalar_one()
        values = {"tenant_id": tenant.id, "key": KEY["Idempotency-Key"], "request_sha256": bytes(32), "batch_id": row}
        connection.execute(insert(IdempotencyKey).values(**values))
        answer = api.post("/batches", json={"model": "fake", "prompts": ["a"]}, headers=KEY)
        problem(answer, 409, "idempotency-in-progress")
        assert int(answer.headers["Retry-After"]) > 0
        connection.rollback()
    assert count(services, "batch") == 1


def test_equal_calls_at_the_same_time_make_one_batch(api: Calls, services: Services) -> None:
    barrier, ids = threading.Barrier(6), []

    def call() -> None:
        client = Calls(api.app, api.headers["Authorization"].removeprefix("Bearer "))
        barrier.wait()
        answer = client.post("/batches", json={"model": "fake", "prompts": ["a"] * 2000}, headers=KEY)
        ids.append((answer.json or {}).get("id", answer.text))

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 6
    assert len(set(ids)) == 1
    assert (count(services, "batch"), count(services, "job")) == (1, 2000)


@pytest.mark.parametrize("key", ["", "x" * 256, "clé", "a\x7fb", "a\tb"])
def test_a_key_must_be_printable_and_short(api: Calls, services: Services, key: str) -> None:
    answer = api.post("/batches", json={"model": "fake", "prompts": ["a"]}, headers={"Idempotency-Key": key})
    assert problem(answer, 400, "invalid-idempotency-key")["errors"][0]["pointer"] == "/Idempotency-Key"
    assert count(services, "batch") == 0


# keys and tenants --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer ", "Basic dTpw", "Bearer imf_x", "Bearer " + "x" * 5000, "imf_abcdefghijkl_" + "x" * 43,
     "Bearer imf_abcdefghijkl_" + "x" * 43, "Bearer clé", "Bearer ' OR 1=1 --"],
)  # fmt: skip
def test_without_a_known_key_nothing_is_answered(api: Calls, authorization: str) -> None:
    for method, path in (("GET", "/batches"), ("POST", "/batches"), ("DELETE", "/jobs/x"), ("GET", "/models")):
        answer = api._call(method, path, headers={"Authorization": authorization})
        problem(answer, 401, "unauthenticated")
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_a_key_with_one_wrong_character_or_revoked_is_not_known(api: Calls, services: Services, api_key: str) -> None:
    wrong = api_key[:-1] + ("A" if api_key[-1] != "A" else "B")
    problem(api.get("/batches", headers={"Authorization": f"Bearer {wrong}"}), 401, "unauthenticated")
    assert api.get("/batches").status_code == 200
    with transaction(services.engine) as connection:
        connection.execute(update(ApiKey).values(revoked_at=text("clock_timestamp()")))
    problem(api.get("/batches"), 401, "unauthenticated")


def test_a_key_in_the_query_is_no_key(api: Calls, api_key: str) -> None:
    problem(api.client.get(f"/api/v1/batches?api_key={api_key}"), 401, "unauthenticated")


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("GET", "/jobs"), ("DELETE", "")],
)
def test_another_tenants_batch_looks_like_none(api: Calls, stranger: Calls, method: str, path: str) -> None:
    theirs, none = stranger.submit("secret")["id"], "batch_" + "0" * 32
    answers = [api._call(method, f"/batches/{name}{path}") for name in (theirs, none)]
    bodies = [problem(answer, 404, "not-found") for answer in answers]
    for body in bodies:
        del body["request_id"]
    assert bodies[0] == bodies[1]
    assert (stranger.get(f"/batches/{theirs}").json or {})["counts"]["queued"] == 1


# when a part is away -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["closed", "black hole"])
def dead_redis_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Nobody listens, or somebody takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if request.param == "closed":
            server.close()
        yield f"redis://127.0.0.1:{port}/0"


def test_without_redis_a_submit_is_still_accepted_soon(services: Services, api_key: str, dead_redis_url: str) -> None:
    settings = services.settings.model_copy(update={"redis_url": SecretStr(dead_redis_url)})
    api = Calls(create_app(replace(services, settings=settings, bell=Bell(settings))), api_key)
    for _ in range(3):
        began = time.monotonic()
        api.submit("a")
        assert time.monotonic() - began < 1
    assert count(services, "job") == 3
    ready = api.client.get("/readyz")
    assert ready.status_code == 200
    assert (ready.json or {})["redis"] == "degraded"
    assert (ready.json or {})["storage"] == "ok"


def without_database(settings: Settings, services: Services) -> Services:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    gone = settings.model_copy(update={"database_url": SecretStr(f"postgresql://u:secret@127.0.0.1:{port}/none")})
    return replace(services, settings=gone, engine=open_engine(gone, "tests"))


def test_without_the_database_the_answer_is_to_try_again(
    settings: Settings, services: Services, api_key: str, caplog: pytest.LogCaptureFixture
) -> None:
    api = Calls(create_app(without_database(settings, services)), api_key)
    for answer in (api.get("/batches"), api.client.get("/readyz")):
        problem(answer, 503, "unavailable")
        assert int(answer.headers["Retry-After"]) > 0
        assert "secret" not in answer.text + caplog.text
    assert api.client.get("/healthz").json == {"status": "ok"}


def test_an_older_schema_is_not_ready(api: Calls, services: Services) -> None:
    assert api.client.get("/readyz").json == {"status": "ready", "database": "ok", "redis": "ok", "storage": "ok"}
    with transaction(services.engine) as connection:
        [head] = connection.execute(text("SELECT version_num FROM alembic_version")).scalars()
        connection.execute(text("UPDATE alembic_version SET version_num = 'older'"))
    try:
        assert "migrations" in problem(api.client.get("/readyz"), 503, "unavailable")["detail"]
    finally:
        with transaction(services.engine) as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = :head"), {"head": head})


def test_an_unexpected_error_tells_nothing_but_its_number(
    api: Calls, services: Services, caplog: pytest.LogCaptureFixture
) -> None:
    api.submit("a")
    with transaction(services.engine) as connection:
        # what no version of the code would write
        connection.execute(update(Batch).values(parameters=[1]))
    answer = api.get("/batches", headers={"X-Request-ID": "my-id.1"})
    body = problem(answer, 500, "internal")
    assert body["request_id"] == "my-id.1"
    assert "my-id.1" in caplog.text
    assert "Traceback" in caplog.text
    assert not {"pydantic", "Traceback", "parameters"} & set(answer.text.replace(":", " ").split())


# headers -----------------------------------------------------------------------------------------------------------


def test_every_answer_carries_the_safe_headers(api: Calls) -> None:
    for answer in (api.get("/batches"), api.get("/nope"), api.post("/batches", data="{"), api.client.get("/healthz")):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "é", "<script>", "a\tb"])
def test_a_strange_request_id_is_replaced(api: Calls, given: str) -> None:
    found = api.get("/batches", headers={"X-Request-ID": given}).headers["X-Request-ID"]
    assert found != given
    assert len(found) == 32


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/api/v1/nope", 404, "not-found"), ("GET", "/", 404, "not-found"),
        ("GET", "/api/v1/batches/", 404, "not-found"), ("GET", "/api//v1/batches", 404, "not-found"),
        ("PUT", "/api/v1/batches", 405, "method-not-allowed"), ("POST", "/healthz", 405, "method-not-allowed"),
    ],
)  # fmt: skip
def test_unknown_routes_and_methods_are_problems_too(
    api: Calls, method: str, path: str, status: int, code: str
) -> None:
    answer = api.client.open(path, method=method, headers=api.headers)
    problem(answer, status, code)
    assert ("Allow" in answer.headers) == (status == 405)
