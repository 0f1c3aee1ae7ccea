"""The description of the API: valid, complete, true; and the page that shows it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from api.app import create_app
from api.problems import _KINDS
from shared.services import Services
from tests.api_calls import Calls, render

#: routes that are no part of the described API
UNDESCRIBED = {"/healthz", "/readyz", "/openapi.json", "/docs", "/docs/scalar.standalone.js", "/files/{key}"}


@pytest.fixture
def api(services: Services, api_key: str) -> Calls:
    return Calls(create_app(services), api_key)


@pytest.fixture
def document(api: Calls) -> dict[str, Any]:
    answer = api.client.get("/openapi.json")
    assert (answer.status_code, answer.content_type) == (200, "application/json")
    return dict(answer.json or {})


def test_the_document_is_valid_openapi(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    OpenAPIV31SpecValidator(document).validate()


def test_every_route_is_described_or_meant_not_to_be(api: Calls, document: dict[str, Any]) -> None:
    routes = {
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), method.lower())
        for rule in api.app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    described = {(path, method) for path, item in document["paths"].items() for method in item}
    assert described == {(path, method) for path, method in routes if path not in UNDESCRIBED}
    assert {path for path, _ in routes} >= UNDESCRIBED


def test_every_operation_says_what_it_needs_and_how_it_fails(document: dict[str, Any]) -> None:
    operations = [operation for item in document["paths"].values() for operation in item.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    for operation in operations:
        assert operation["security"] == [{"key": []}]
        assert {"401", "422", "503"} <= set(operation["responses"])
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                assert set(response["content"]) == {"application/problem+json"}
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


def checked(document: dict[str, Any], method: str, path: str, status: str, body: Any) -> None:
    """Check an answer against what the document promises."""
    content = document["paths"][path][method]["responses"][status]["content"]
    [media] = content.values()
    schema = {**media["schema"], "components": document["components"]}
    errors = [f"{list(e.path)}: {e.message}" for e in OAS31Validator(schema).iter_errors(body)]
    assert not errors


def test_answers_are_as_described(api: Calls, services: Services, document: dict[str, Any]) -> None:
    batch = api.submit("a", "b")
    render(services)
    job = api.jobs(batch)[0]
    for path, name in (
        ("/batches", ""), ("/batches/{batch_id}", batch["id"]), ("/batches/{batch_id}/jobs", batch["id"]),
        ("/jobs/{job_id}", job["id"]), ("/models", ""), ("/models/{name}", "fake"), ("/workers", ""),
    ):  # fmt: skip
        answer = api.get(re.sub(r"{\w+}", name, path))
        checked(document, "get", f"/api/v1{path}", "200", answer.json)
    half = api.post("/batches", data="{", content_type="application/json")
    for method, path, status, answer in (
        ("post", "/batches", "422", api.post("/batches", json={"x": 1})),
        ("post", "/batches", "400", half),
        ("get", "/batches", "400", api.get("/batches?cursor=x")),
        ("get", "/batches/{batch_id}/jobs", "400", api.get(f"/batches/{batch['id']}/jobs?cursor=x")),
        ("get", "/jobs/{job_id}", "404", api.get("/jobs/x")),
        ("post", "/batches", "202", api.post("/batches", json={"model": "fake", "prompts": ["a"]})),
        ("delete", "/batches/{batch_id}", "202", api.delete(f"/batches/{batch['id']}")),
    ):
        assert answer.status_code == int(status)
        checked(document, method, f"/api/v1{path}", status, answer.json)


def test_problems_have_titles_and_true_statuses() -> None:
    for code, kind in _KINDS.items():
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", code)
        assert 400 <= kind.status <= 599
        assert kind.title.endswith(".")


def test_the_page_loads_nothing_from_elsewhere(api: Calls) -> None:
    page = api.client.get("/docs")
    assert page.content_type == "text/html; charset=utf-8"
    sources = re.findall(r'(?:src|href|data-url)="([^"]*)"', page.text)
    assert sources == ["/openapi.json", "/docs/scalar.standalone.js"]
    policy = dict(part.strip().split(" ", 1) for part in page.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert not re.search(r"https?:|\*", page.headers["Content-Security-Policy"])
    with api.client.get(sources[1]) as script:
        assert (script.status_code, script.content_type) == (200, "text/javascript; charset=utf-8")
        assert len(script.data) > 1_000_000
