"""Control over HTTP: batches by their owner; models, tenants and workers by operators only."""

from __future__ import annotations

import uuid

import pytest
from sqlalchemy import insert

from api.app import create_app
from shared import tenants
from shared.database import transaction
from shared.lifecycle import Failure
from shared.models import Worker
from shared.services import Services
from shared.states import Outcome
from shared.tenants import TenantIdentity
from tests.api_calls import Calls, claim, fail, problem


@pytest.fixture
def api(services: Services, api_key: str) -> Calls:
    return Calls(create_app(services), api_key)


@pytest.fixture
def operator(services: Services, tenant: TenantIdentity, api: Calls) -> Calls:
    with transaction(services.engine) as connection:
        key = tenants.create_key(connection, tenant.id, "operator", operator=True)
    return Calls(api.app, key)


def test_a_batch_is_paused_and_goes_on(api: Calls) -> None:
    batch = api.submit("a", "b")
    path = f"/batches/{batch['id']}"
    for _ in range(2):
        paused = api.patch(path, json={"paused": True}).json or {}
        assert (paused["state"], paused["counts"]["held"]) == ("paused", 2)
        assert paused["state_reason"] == "its batch is paused"
    assert [job["state_reason"] for job in api.jobs(batch)] == ["its batch is paused"] * 2
    resumed = api.patch(path, json={"paused": False, "priority": "high"}).json or {}
    assert (resumed["state"], resumed["priority"], resumed["counts"]["queued"]) == ("queued", "high", 2)


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"paused": "yes"}, "/paused"), ({"paused": 1}, "/paused"), ({"priority": "urgent"}, "/priority"),
        ({"pausd": True}, "/pausd"), ({"priority": 1}, "/priority"),
    ],
)  # fmt: skip
def test_a_wrong_change_is_named(api: Calls, body: dict[str, object], pointer: str) -> None:
    batch = api.submit()
    found = problem(api.patch(f"/batches/{batch['id']}", json=body), 422, "invalid")
    assert found["errors"][0]["pointer"] == pointer
    assert (api.get(f"/batches/{batch['id']}").json or {})["state"] == "queued"


def test_failed_jobs_are_retried(api: Calls, services: Services) -> None:
    batch = api.submit("a", "b")
    for error_class in ("bad", "worse"):
        token, [job] = claim(services)
        fail(services, Failure(job.id, Outcome.PERMANENT, error_class, ""), token)
    path = f"/batches/{batch['id']}/retry"
    answer = api.post(path, json={"error_classes": ["worse"]})
    assert answer.status_code == 202
    assert (answer.json or {})["retried"] == 1
    assert (answer.json or {})["batch"]["counts"]["queued"] == 1
    first = api.jobs(batch)[0]["id"]
    assert (api.post(f"/jobs/{first}/retry").json or {})["state"] == "queued"
    problem(api.post(f"/jobs/{first}/retry"), 409, "conflict")
    assert (api.post(path, json={}).json or {})["retried"] == 0
    assert problem(api.post(path, json={"states": ["queued"]}), 422, "invalid")["errors"][0]["pointer"] == "/states/0"
    problem(api.post(path, json={"states": []}), 422, "invalid")


def test_retention_is_stored(api: Calls) -> None:
    assert api.submit(retention_seconds=3600)["retention_seconds"] == 3600
    for wrong in (0, -1, 1.5, "1", 10**11):
        answer = api.post("/batches", json={"model": "fake", "prompts": ["a"], "retention_seconds": wrong})
        assert problem(answer, 422, "invalid")["errors"][0]["pointer"] == "/retention_seconds"


def test_operators_stop_models_and_tenants(operator: Calls, tenant: TenantIdentity) -> None:
    batch = operator.submit()
    path = f"/batches/{batch['id']}"
    assert operator.patch("/models/fake", json={"paused": True}).json == {"name": "fake", "paused": True}
    assert (operator.get(path).json or {})["state_reason"] == "the model fake is paused"
    assert operator.patch("/models/fake", json={"paused": False}).status_code == 200
    stopped = operator.patch(f"/tenants/{tenant.name}", json={"paused": True, "max_in_flight": 4}).json
    assert stopped == {"name": tenant.name, "weight": 1.0, "paused": True, "max_in_flight": 4}
    assert (operator.get(path).json or {})["state_reason"] == "its tenant is paused"
    operator.patch(f"/tenants/{tenant.name}", json={"paused": False})
    assert operator.get("/tenants").json == {"data": [{**stopped, "paused": False}]}
    lifted = operator.patch(f"/tenants/{tenant.name}", json={"max_in_flight": None}).json or {}
    assert lifted["max_in_flight"] is None
    assert (operator.get(path).json or {})["counts"]["queued"] == 1
    problem(operator.patch("/models/nope", json={"paused": True}), 404, "not-found")
    problem(operator.patch("/tenants/nope", json={"paused": True}), 404, "not-found")
    problem(operator.patch(f"/tenants/{tenant.name}", json={"max_in_flight": 0}), 422, "invalid")
    for nothing in ({}, {"paused": None}):
        assert operator.patch(f"/tenants/{tenant.name}", json=nothing).json == lifted
    problem(operator.patch("/tenants/a%00b", json={"paused": True}), 422, "invalid")
    problem(operator.patch("/workers/a%00b", json={"draining": True}), 422, "invalid")


def test_operators_drain_workers(operator: Calls, services: Services) -> None:
    row = {"id": "host-1-abc", "host": "host", "pid": 1, "models": ["fake"], "device": {}}
    with transaction(services.engine) as connection:
        connection.execute(insert(Worker).values(**row))
    for draining, state, live in ((True, "draining", 0), (True, "draining", 0), (False, "alive", 1)):
        assert operator.patch("/workers/host-1-abc", json={"draining": draining}).status_code == 200
        assert [worker["state"] for worker in (operator.get("/workers").json or {})["data"]] == [state]
        assert (operator.get("/queues/fake").json or {})["live_workers"] == live
    problem(operator.patch("/workers/nobody", json={"draining": True}), 404, "not-found")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PATCH", "/models/fake", {"paused": True}), ("PATCH", "/workers/w", {"draining": True}),
        ("PATCH", "/tenants/local", {"paused": True}), ("GET", "/tenants", None),
    ],
)  # fmt: skip
def test_others_may_not(api: Calls, method: str, path: str, body: object) -> None:
    problem(api._call(method, path, json=body), 403, "forbidden")


def test_queues_are_told_for_every_model(api: Calls) -> None:
    api.submit("a", "b")
    queues = {queue["model"]: queue for queue in (api.get("/queues").json or {})["data"]}
    assert set(queues) >= {"fake", "demo-diffusion", "demo-gan"}
    assert (queues["fake"]["queued"], queues["fake"]["wanted_workers"]) == (2, 1)
    assert queues["demo-gan"]["wanted_workers"] == 0
    problem(api.get("/queues/nope"), 404, "not-found")


def test_another_tenants_batch_is_not_there(api: Calls, services: Services) -> None:
    with transaction(services.engine) as connection:
        stranger = tenants.create_key(connection, tenants.ensure_tenant(connection, "stranger"), "theirs")
    batch = Calls(api.app, stranger).submit()
    for answer in (
        api.patch(f"/batches/{batch['id']}", json={"paused": True}),
        api.post(f"/batches/{batch['id']}/retry", json={}),
        api.post(f"/jobs/job_{uuid.uuid4().hex}_0/retry"),
    ):
        problem(answer, 404, "not-found")
