"""What clients send wrongly, by mistake or on purpose: always a problem that names the field, and nothing is stored."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import text

from api.app import create_app
from api.bodies import parse_object
from shared.database import open_engine, transaction
from shared.queue import redis_client
from shared.services import Services
from shared.settings import Settings
from tests.api_calls import Calls, problem
from tests.conftest import settings_for

VALID: dict[str, Any] = {"model": "fake", "prompts": ["a fox"]}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def settings(
    migrated_database_url: str, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Settings]:
    """Emptied once at the end: what is refused leaves nothing to empty, and emptying takes most of such a test."""
    chosen = settings_for(migrated_database_url, redis_url, f"file://{tmp_path_factory.mktemp('objects')}")
    yield chosen
    with redis_client(chosen) as bells:
        bells.flushdb()
    engine = open_engine(chosen, "tests")
    with transaction(engine) as connection:
        connection.execute(text("TRUNCATE tenant, tenant_clock RESTART IDENTITY CASCADE"))
    engine.dispose()


def rows(services: Services) -> list[int]:
    tables = ("batch", "job", "batch_counter", "idempotency_key")
    with transaction(services.engine) as connection:
        return [connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one() for table in tables]


@pytest.fixture
def api(services: Services, api_key: str) -> Iterator[Calls]:
    """The API; whatever a test sends, nothing may be stored."""
    before = rows(services)
    yield Calls(create_app(services), api_key)
    assert rows(services) == before


def submit(api: Calls, body: bytes, **headers: str) -> Any:
    return api.post("/batches", data=body, headers={**JSON, **headers})


# bodies that are no JSON object ------------------------------------------------------------------------------------

OBJECT = b'{"model": "fake", "prompts": ["a"]}'

NOT_JSON = {
    "empty": b"",
    "blank": b"  \n",
    "half": OBJECT[:-1],
    "trailing comma": b'{"model": "fake",}',
    "single quotes": b"{'model': 'fake'}",
    "two documents": OBJECT + OBJECT,
    "raw newline in a text": b'{"model": "fake", "prompts": ["a\nb"]}',
    "wrong escape": b'{"model": "fake", "prompts": ["\\x41"]}',
    "comment": b'{"model": "fake"} // really',
    "byte order mark": b"\xef\xbb\xbf" + OBJECT,
    "UTF-16": OBJECT.decode().encode("utf-16"),
    "UTF-16 without mark": OBJECT.decode().encode("utf-16-le"),
    "UTF-32": OBJECT.decode().encode("utf-32"),
    "Latin-1": b'{"model": "fake", "prompts": ["caf\xe9"]}',
    "encoded surrogate": b'{"model": "fake", "prompts": ["\xed\xa0\x80"]}',
    "overlong NUL": b'{"model": "fake", "prompts": ["\xc0\x80"]}',
    "form": b"model=fake&prompts=a",
    "gzip": gzip.compress(OBJECT),
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_what_is_not_json_is_malformed(api: Calls, body: bytes) -> None:
    found = problem(submit(api, body), 400, "malformed-json")
    assert found["errors"][0]["code"] == "malformed-json"


@pytest.mark.parametrize("body", [b"true", b"null", b"1", b'"text"', b"[]", b"[" + OBJECT + b"]"])
def test_the_top_must_be_an_object(api: Calls, body: bytes) -> None:
    assert problem(submit(api, body), 422, "invalid")["errors"] == [
        {"pointer": "", "code": "object-type", "detail": "must be a JSON object"}
    ]


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": ""}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data; boundary=x"}, {"Content-Type": "application/jsonp"},
        {"Content-Type": "application/json; charset=utf-16"}, {"Content-Type": 'application/json; charset="latin-1"'},
        {"Content-Encoding": "gzip"}, {"Content-Encoding": "br"}, {"Content-Encoding": "identity, gzip"},
    ],
)  # fmt: skip
def test_other_types_and_encodings_are_not_taken(api: Calls, headers: dict[str, str]) -> None:
    problem(submit(api, OBJECT, **headers), 415, "unsupported-media-type")


def test_a_compression_bomb_is_not_unpacked(api: Calls) -> None:
    bomb = gzip.compress(b'{"model": "fake", "prompts": ["' + b"a" * 20_000_000 + b'"]}')
    problem(submit(api, bomb, **{"Content-Encoding": "gzip"}), 415, "unsupported-media-type")


DEEP = {
    "lists": b'{"prompts":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "never closed": b"[" * 100_000,
    "just too deep": b'{"prompts":' + b"[" * 64 + b"]" * 64 + b"}",
    "behind quotes": b'{"a\\"[": "]\\\\", "prompts":' + b"[" * 64 + b"]" * 64 + b"}",
}


@pytest.mark.parametrize("body", DEEP.values(), ids=DEEP.keys())
def test_endless_nesting_is_refused(api: Calls, body: bytes) -> None:
    problem(submit(api, body), 400, "json-too-deep")


def test_brackets_in_texts_and_flat_lists_are_not_nesting() -> None:
    deep = b'{"a":' + b"[" * 63 + b"]" * 63 + b"}"
    assert parse_object(deep)
    texts = ["[" * 1000 + '"\\' * 3 + "{" * 1000, "\\", '"', "[[[[\\\\"]
    assert parse_object(json.dumps({"prompts": texts}).encode()) == {"prompts": texts}
    assert len(parse_object(b'{"jobs": [' + b",".join([b"{}"] * 5000) + b"]}")["jobs"]) == 5000


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        (b'{"model": "fake", "model": "fake", "prompts": ["a"]}', "/model"),
        (b'{"model": "fake", "prompts": ["a"], "parameters": {"seed": 1, "seed": 2}}', "/parameters/seed"),
        (b'{"model": "fake", "jobs": [{"prompt": "a"}, {"prompt": "a", "prompt": "b"}]}', "/jobs/1/prompt"),
        (b'{"model": "fake", "prompts": ["a"], "parameters": {"a/b~c": 1, "a/b~c": 2}}', "/parameters/a~1b~0c"),
    ],
)
def test_a_name_given_twice_is_refused(api: Calls, body: bytes, pointer: str) -> None:
    assert problem(submit(api, body), 400, "duplicate-key")["errors"][0]["pointer"] == pointer


@pytest.mark.parametrize(
    "number",
    ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "-" + "9" * 4000, "1" * 21, "0." + "1" * 5000],
    ids=lambda number: number[:9],
)
@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ('{"model": "fake", "prompts": ["a"], "num_images": %s}', "/num_images"),
        ('{"model": "fake", "prompts": ["a"], "parameters": {"step_seconds": %s}}', "/parameters/step_seconds"),
        ('{"model": "fake", "jobs": [{"prompt": "a"}, {"prompt": "b", "seed": %s}]}', "/jobs/1/seed"),
    ],
)
def test_numbers_beyond_all_numbers_are_refused(api: Calls, body: str, pointer: str, number: str) -> None:
    [fault] = problem(submit(api, (body % number).encode()), 422, "invalid")["errors"]
    assert fault["pointer"] == pointer
    assert fault["code"] in {"not-finite", "out-of-range"}


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beyond_the_limit_is_refused(services: Services, api_key: str, api: Calls, chunked: bool) -> None:
    limit = 70_000  # more than is read at a time
    small = replace(services, settings=services.settings.model_copy(update={"max_body_bytes": limit}))
    calls = Calls(create_app(small), api_key)
    for size, status in ((limit + 1, 413), (limit * 3, 413), (limit, 422)):
        body = json.dumps({"model": "none", "prompts": [""]}).encode()
        body = body[:-3] + b"a" * (size - len(body)) + body[-3:]
        assert len(body) == size
        # the server ends a chunked body; how long it is nobody knows before
        headers = {**JSON, "Transfer-Encoding": "chunked"} if chunked else JSON
        ended = {"wsgi.input_terminated": True} if chunked else {}
        answer = calls.post("/batches", data=body, headers=headers, environ_overrides=ended)
        problem(answer, status, "body-too-large" if status == 413 else "unknown-model")


# fields ------------------------------------------------------------------------------------------------------------

LONE = "\ud800"

FIELDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no model": ({"model": None}, "/model", "string-type"),
    "number as model": ({"model": 1}, "/model", "string-type"),
    "no prompts": ({"prompts": None}, "/prompts", "exactly-one"),
    "prompts and jobs": ({"jobs": [{"prompt": "a"}]}, "/prompts", "exactly-one"),
    "zero prompts": ({"prompts": []}, "/prompts", "too-short"),
    "zero jobs": ({"prompts": None, "jobs": []}, "/jobs", "too-short"),
    "a text as prompts": ({"prompts": "a fox"}, "/prompts", "list-type"),
    "an object as prompts": ({"prompts": {"0": "a"}}, "/prompts", "list-type"),
    "a number among prompts": ({"prompts": ["a", 1]}, "/prompts/1", "string-type"),
    "null among prompts": ({"prompts": ["a", None]}, "/prompts/1", "string-type"),
    "a text among jobs": ({"prompts": None, "jobs": [{"prompt": "a"}, "b"]}, "/jobs/1", "object-type"),
    "number as prompt": ({"prompts": None, "jobs": [{"prompt": 5}]}, "/jobs/0/prompt", "string-type"),
    "NUL in a prompt": ({"prompts": ["a", "b\x00c"]}, "/prompts/1", "invalid-text"),
    "NUL in a job": ({"prompts": None, "jobs": [{"prompt": "b\x00c"}]}, "/jobs/0/prompt", "invalid-text"),
    "NUL in the name": ({"name": "a\x00b"}, "/name", "invalid-text"),
    "lone surrogate": ({"prompts": [LONE]}, "/prompts/0", "invalid-text"),
    "lone surrogate in a job": ({"prompts": None, "jobs": [{"prompt": LONE}]}, "/jobs/0/prompt", "invalid-text"),
    "lone surrogate in the name": ({"name": LONE}, "/name", "invalid-text"),
    "lone surrogate in the model": ({"model": LONE}, "/model", "invalid-text"),
    "lone surrogate as a job's parameter": (
        {"prompts": None, "jobs": [{"prompt": "a"}, {"prompt": "a", LONE: 1}]}, "/jobs/1", "invalid-text",
    ),
    "lone surrogate as a parameter": ({"parameters": {LONE: 1}}, "/parameters", "invalid-text"),
    "a megabyte of prompt": ({"prompts": ["a" * 1_000_000]}, "/prompts/0", "too-long"),
    "a megabyte of name": ({"name": "a" * 1_000_000}, "/name", "too-long"),
    "a megabyte of model": ({"model": "a" * 1_000_000}, "/model", "too-long"),
    "number as name": ({"name": 7}, "/name", "string-type"),
    "unknown priority": ({"priority": "urgent"}, "/priority", "enum"),
    "number as priority": ({"priority": 0}, "/priority", "enum"),
    "zero images": ({"num_images": 0}, "/num_images", "out-of-range"),
    "negative images": ({"num_images": -1}, "/num_images", "out-of-range"),
    "too many images": ({"num_images": 1001}, "/num_images", "out-of-range"),
    "images as text": ({"num_images": "4"}, "/num_images", "int-type"),
    "images as float": ({"num_images": 4.0}, "/num_images", "int-type"),
    "images as true": ({"num_images": True}, "/num_images", "int-type"),
    "parameters as list": ({"parameters": []}, "/parameters", "dict-type"),
    "unknown field": ({"promts": ["a"]}, "/promts", "unknown-field"),
    "unknown parameter": ({"parameters": {"step": 3}}, "/parameters/step", "unknown-field"),
    "another model's parameter": ({"parameters": {"guidance_scale": 3}}, "/parameters/guidance_scale", "unknown-field"),
    "prompt among the parameters": ({"parameters": {"prompt": "b"}}, "/parameters/prompt", "not-accepted"),
    "zero width": ({"parameters": {"width": 0}}, "/parameters/width", "out-of-range"),
    "negative height": ({"parameters": {"height": -8}}, "/parameters/height", "out-of-range"),
    "width as float": ({"parameters": {"width": 64.0}}, "/parameters/width", "int-type"),
    "width as text": ({"parameters": {"width": "64"}}, "/parameters/width", "int-type"),
    "width as null": ({"parameters": {"width": None}}, "/parameters/width", "int-type"),
    "steps as true": ({"parameters": {"num_inference_steps": True}}, "/parameters/num_inference_steps", "int-type"),
    "width of 65,536": ({"parameters": {"width": 65_536, "height": 65_536}}, "/parameters/width", "out-of-range"),
    "size off the grid": (
        {"model": "demo-diffusion", "parameters": {"width": 100}}, "/parameters/width", "off-grid",
    ),
    "guidance as text": (
        {"model": "demo-diffusion", "parameters": {"guidance_scale": "7"}}, "/parameters/guidance_scale", "float-type",
    ),
    "scheduler unknown": (
        {"model": "demo-diffusion", "parameters": {"scheduler": "../x"}}, "/parameters/scheduler", "literal-error",
    ),
    "seed of 2^63": ({"parameters": {"seed": 2**63}}, "/parameters/seed", "out-of-range"),
    "last seed and another": ({"num_images": 2, "parameters": {"seed": 2**63 - 1}}, "/parameters/seed", "out-of-range"),
    "negative seed": ({"parameters": {"seed": -1}}, "/parameters/seed", "out-of-range"),
    "seed as float": ({"parameters": {"seed": 1e3}}, "/parameters/seed", "int-type"),
    "seed of a hosted model": ({"model": "gpt-image-2", "parameters": {"seed": 1}}, "/parameters/seed", "not-accepted"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "pointer", "code"), FIELDS.values(), ids=FIELDS.keys())
def test_a_wrong_field_is_named(api: Calls, change: dict[str, Any], pointer: str, code: str) -> None:
    body = {name: value for name, value in {**VALID, **change}.items() if value is not None or name == "model"}
    found = problem(submit(api, json.dumps(body).encode()), 422, "invalid")
    assert [(fault["pointer"], fault["code"]) for fault in found["errors"]][:1] == [(pointer, code)]
    assert len(json.dumps(found)) < 3000


def test_long_names_are_cut_short_in_the_answer(api: Calls) -> None:
    for body in ({**VALID, "x" * 100_000: 1}, {**VALID, "parameters": {"x" * 100_000: 1}}):
        answer = api.post("/batches", json=body)
        problem(answer, 422, "invalid")
        assert len(answer.text) < 3000


@pytest.mark.parametrize(
    ("body", "hint"),
    [
        ({"model": "fake", "promts": ["a"]}, "did you mean prompts?"),
        ({**VALID, "parameters": {"num_inference_step": 3}}, "did you mean num_inference_steps?"),
        ({**VALID, "model": "demo-difusion"}, "demo-diffusion"),
    ],
)
def test_a_typo_gets_a_hint(api: Calls, body: dict[str, Any], hint: str) -> None:
    answer = api.post("/batches", json=body)
    assert answer.status_code == 422
    assert hint in answer.text


@pytest.mark.parametrize(
    "model",
    ["", "none", "FAKE", "../../etc/passwd", "/etc/passwd", "%2e%2e/fake", "https://host/model", "a\nb", "fake\x00",
     "'; DROP TABLE job; --", "demo-diffusion/../fake", "ｆａｋｅ"],
)  # fmt: skip
def test_a_model_is_a_name_of_the_catalogue_only(api: Calls, model: str) -> None:
    answer = api.post("/batches", json={**VALID, "model": model})
    assert problem(answer, 422, "unknown-model")["errors"][0]["pointer"] == "/model"


def test_a_hundred_faults_are_told_of_a_hundred_thousand(api: Calls) -> None:
    began = time.monotonic()
    for body in (
        {"model": "fake", "prompts": [""] * 99_999 + [5], "parameters": {"x": 1}},
        {"model": "fake", "prompts": [7] * 100_000},
        {"model": "fake", "jobs": [{"prompt": "a", "width": -1}] * 100_000},
        {"model": "fake", "prompts": ["a"], "parameters": {f"unknown {i}": 1 for i in range(50_000)}},
        {**VALID, **{f"unknown {i}": 1 for i in range(50_000)}},
    ):
        found = problem(api.post("/batches", json=body), 422, "invalid")
        assert 1 <= len(found["errors"]) <= 100
    assert time.monotonic() - began < 10


def test_a_million_and_one_jobs_are_too_many(api: Calls) -> None:
    body = {"model": "fake", "prompts": ["a"] * 1001, "num_images": 1000}
    fault = problem(api.post("/batches", json=body), 413, "too-many")["errors"][0]
    assert fault["pointer"] == "/prompts"
    assert "1000000" in fault["detail"]


# paths, queries, headers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status", "code", "pointer"),
    [
        ("/batches?limit=0", 422, "invalid", "/limit"), ("/batches?limit=1001", 422, "invalid", "/limit"),
        ("/batches?limit=-1", 422, "invalid", "/limit"), ("/batches?limit=ten", 422, "invalid", "/limit"),
        ("/batches?limit=1e2", 422, "invalid", "/limit"), ("/batches?limit=" + "9" * 5000, 422, "invalid", "/limit"),
        ("/batches?limit=", 422, "invalid", "/limit"), ("/batches?page=2", 422, "invalid", "/page"),
        ("/batches?limit=1;DROP%20TABLE%20job", 422, "invalid", "/limit"),
        ("/batches?sort=id%20desc", 422, "invalid", "/sort"), ("/batches?cursor=", 400, "invalid-cursor", "/cursor"),
        ("/batches?cursor=1", 400, "invalid-cursor", "/cursor"),
        ("/batches?cursor=%27%20OR%201=1", 400, "invalid-cursor", "/cursor"),
        ("/batches?cursor=azE7RFJPUA", 400, "invalid-cursor", "/cursor"),
        ("/batches?cursor=%00", 400, "invalid-cursor", "/cursor"),
        ("/batches?cursor=azk5OTk5OTk5OTk5OTk5OTk5OTk5", 400, "invalid-cursor", "/cursor"),
        ("/batches?cursor=" + "a" * 101, 422, "invalid", "/cursor"),
        ("/batches/{batch}?x=1", 422, "invalid", "/x"),
        ("/batches/{batch}/jobs?state=done", 422, "invalid", "/state/0"),
        ("/batches/{batch}/jobs?state=queued,", 422, "invalid", "/state/1"),
        ("/batches/{batch}/jobs?state=queued%27%20OR%20%271%27=%271", 422, "invalid", "/state/0"),
        ("/batches/{batch}/jobs?status=queued", 422, "invalid", "/status"),
        ("/jobs/{job}?wait=61", 422, "invalid", "/wait"), ("/jobs/{job}?wait=-1", 422, "invalid", "/wait"),
        ("/jobs/{job}?wait=nan", 422, "invalid", "/wait"), ("/jobs/{job}?wait=inf", 422, "invalid", "/wait"),
        ("/jobs/{job}?wait=soon", 422, "invalid", "/wait"), ("/jobs/{job}/image?size=9", 422, "invalid", "/size"),
        ("/models?x", 422, "invalid", "/x"), ("/models/fake?x=1", 422, "invalid", "/x"),
        ("/workers?alive=true", 422, "invalid", "/alive"),
    ],
)  # fmt: skip
def test_a_wrong_query_is_named(api: Calls, path: str, status: int, code: str, pointer: str) -> None:
    ids = {"batch": "batch_" + "0" * 32, "job": "job_" + "0" * 32 + "_0"}
    [fault] = problem(api.get(path.format(**ids)), status, code)["errors"]
    assert fault["pointer"] == pointer


@pytest.mark.parametrize(
    "name",
    ["1", "batch_", "batch_" + "0" * 31, "batch_" + "G" * 32, "batch_" + "0" * 33, "%00", "..", "..%2f..", "' OR 1=1",
     "batch_" + "0" * 32 + "%0a", "job_" + "0" * 32 + "_0", "é", "x" * 4000],
)  # fmt: skip
def test_a_wrong_id_is_nobodys(api: Calls, name: str) -> None:
    for path in (f"/batches/{name}", f"/batches/{name}/jobs"):
        problem(api.get(path), 404, "not-found")


@pytest.mark.parametrize(
    "name",
    ["job_" + "0" * 32, "job_" + "0" * 32 + "_-1", "job_" + "0" * 32 + "_00", "job_" + "0" * 32 + "_9999999999",
     "job_" + "0" * 32 + "_1%0a", "%ff"],
)  # fmt: skip
def test_a_wrong_job_id_is_nobodys(api: Calls, name: str) -> None:
    for method, suffix in (("GET", ""), ("GET", "/image"), ("DELETE", "")):
        problem(api._call(method, f"/jobs/{name}{suffix}"), 404, "not-found")


# what only looks wrong ---------------------------------------------------------------------------------------------

ODD_TEXTS = [
    "שלום \u202ealtered\u202c", "zero\u200bwidth\u200d", "e\u0301\u0302\u0303" * 50, "\ufeffmark",
    "👩‍👩‍👧‍👦 \U0010ffff",
    "tab\tline\nreturn\r\\N \\. back\\slash", "<img src=x onerror=alert(1)>", "'; DROP TABLE job; --", "=HYPERLINK(1)",
    "\x1b[31mred\x1b[0m", "%s %(x)s {x}", "<lora:../../x:1>", "\u2028\u2029\x85\x7f",
]  # fmt: skip


def test_odd_texts_are_stored_as_they_are(services: Services, api_key: str) -> None:
    calls = Calls(create_app(services), api_key)
    batch = calls.submit(*ODD_TEXTS, name=ODD_TEXTS[0])
    assert batch["name"] == ODD_TEXTS[0]
    assert [job["prompt"] for job in calls.jobs(batch)] == ODD_TEXTS
    answer = calls.post("/batches", json={"model": "fake", "jobs": [{"prompt": prompt} for prompt in ODD_TEXTS]})
    assert [job["prompt"] for job in calls.jobs(answer.json or {})] == ODD_TEXTS
    text_in_utf8 = json.dumps({"model": "fake", "prompts": ODD_TEXTS}, ensure_ascii=False).encode()
    answer = submit(calls, text_in_utf8, **{"Content-Type": 'Application/JSON ; charset="UTF-8"'})
    assert [job["prompt"] for job in calls.jobs(answer.json or {})] == ODD_TEXTS
