"""Hosted models: the real backend with the real client against a vendor on loopback."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from typing import Any

import pytest

from shared.catalogue import HostedSource, ModelEntry
from shared.errors import Canceled, CatalogueError, OverBudget, Permanent, RenderError, Transient
from shared.settings import load_settings
from shared.specs.openai_images import Spec
from tests.fakes.openai_server import KEY, Answer, ImagesServer, encoded, error, linked, picture
from worker.backends import Backend, Rendered, open_backend

COLOR = (200, 40, 90)


@pytest.fixture
def vendor() -> Iterator[ImagesServer]:
    with ImagesServer() as server:
        yield server


@pytest.fixture
def comet() -> Iterator[ImagesServer]:
    with ImagesServer("cometapi") as server:
        yield server


def backend_of(base_url: str, *, key: str | None = KEY, max_batch: int | None = None, **hosted: Any) -> Backend:
    """A loaded backend for a model at `base_url`."""
    source = {"provider": "openai", "base_url": base_url, "model": "gpt-image-2", "timeout_seconds": 5.0} | hosted
    settings = load_settings(
        database_url="postgresql://unused/unused",
        redis_url="redis://unused/0",
        storage_url="file:///unused",
        openai_api_key=key,
    )
    more = {} if max_batch is None else {"max_batch": max_batch}
    entry = ModelEntry(name="hosted", backend="openai_images", hosted=HostedSource(**source), **more)
    backend = open_backend(entry, settings)
    backend.load()
    return backend


@pytest.fixture
def render(vendor: ImagesServer) -> Iterator[Callable[..., Rendered]]:
    """Renders one spec at the vendor; checks that the vendor was called exactly once, whatever came of it."""
    opened: list[Backend] = []

    def one(answer: Answer | None = None, *, hosted: dict[str, Any] | None = None, **spec: Any) -> Rendered:
        if answer is not None:
            vendor.answers.append(answer)
        opened.append(backend_of(vendor.base_url, **(hosted or {})))
        before = len(vendor.calls)
        try:
            (rendered,) = opened[-1].render([Spec(**({"prompt": "a red square"} | spec))], lambda done, of: None)
        finally:
            assert len(vendor.calls) == before + 1, "every call costs money"
        return rendered

    yield one
    for backend in opened:
        backend.unload()


class TestImages:
    def test_base64(self, render: Callable[..., Rendered]) -> None:
        rendered = render()
        assert rendered.image.mode == "RGB"
        assert rendered.image.size == (64, 48)
        assert rendered.image.getpixel((5, 5)) == COLOR
        assert rendered.notes == {
            "vendor": "openai",
            "model": "gpt-image-2",
            "request_id": "req_tests",
            "usage": {
                "input_tokens": 9,
                "input_tokens_details": {"text_tokens": 9, "image_tokens": 0},
                "output_tokens": 272,
                "total_tokens": 281,
            },
        }

    def test_url_as_a_gateway_answers(self, comet: ImagesServer) -> None:
        backend = backend_of(comet.base_url, model="qwen-image", response_format="url")
        (rendered,) = backend.render([Spec(prompt="a cat", size="96x64", style="vivid")], lambda done, of: None)
        assert rendered.image.size == (96, 64)
        assert rendered.image.getpixel((5, 5)) == COLOR
        assert comet.fetched == ["1.webp"]
        assert comet.calls[0].body["response_format"] == "url"
        backend.unload()

    def test_only_what_is_set_is_sent(self, render: Callable[..., Rendered], vendor: ImagesServer) -> None:
        render(output_format="webp", output_quality=50)
        assert vendor.calls[0].path == "/v1/images/generations"
        assert vendor.calls[0].body == {"model": "gpt-image-2", "prompt": "a red square", "n": 1}
        render(size="128x64", quality="low", background="opaque", moderation="low")
        assert vendor.calls[1].body == {
            "model": "gpt-image-2",
            "prompt": "a red square",
            "n": 1,
            "size": "128x64",
            "quality": "low",
            "background": "opaque",
            "moderation": "low",
        }

    def test_other_accounts_of_this_machine_are_not_told(
        self, render: Callable[..., Rendered], vendor: ImagesServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OPENAI_ORG_ID", "org-private")
        monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-private")
        monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
        render()
        assert vendor.calls[0].headers["authorization"] == f"Bearer {KEY}"
        assert not any("private" in value for value in vendor.calls[0].headers.values())

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
    def test_the_bytes_tell_the_format(self, render: Callable[..., Rendered], vendor: ImagesServer, kind: str) -> None:
        url = vendor.serve("a.png", Answer(body=picture(kind=kind), headers={"Content-Type": "text/plain"}))
        assert render(linked(url)).image.size == (64, 48)

    def test_transparency_is_kept(self, render: Callable[..., Rendered]) -> None:
        rendered = render(encoded(picture(mode="RGBA")))
        assert rendered.image.mode == "RGBA"
        assert rendered.image.getpixel((5, 5)) == (*COLOR, 128)

    def test_wrapped_base64_and_data_urls_are_read(self, render: Callable[..., Rendered]) -> None:
        text = encoded(picture()).body["data"][0]["b64_json"]
        assert render(encoded("\n".join(text[i : i + 76] for i in range(0, len(text), 76)))).image.size == (64, 48)
        assert render(encoded(f"data:image/png;base64,{text}")).image.size == (64, 48)
        assert render(linked(f"data:image/png;base64,{text}")).image.size == (64, 48)

    def test_a_paid_image_of_another_size_is_kept_and_marked(self, render: Callable[..., Rendered]) -> None:
        rendered = render(encoded(picture(32, 32)), size="64x64")
        assert rendered.image.size == (32, 32)
        assert rendered.notes["asked_size"] == "64x64"
        assert "asked_size" not in render(encoded(picture(32, 32)), size="32x32").notes
        assert "asked_size" not in render(encoded(picture(32, 32)), size="auto").notes

    def test_what_the_vendor_says_fits_a_database(self, render: Callable[..., Rendered]) -> None:
        data = [{**encoded(picture()).body["data"][0], "revised_prompt": "a\x00b\ud800" + "c" * 20_000}]
        usage = {"total_tokens": 3, "note": "x" * 1000, "details": {"cost\x00": 0.5, "list": [1]}}
        notes = render(encoded("", data=data, usage=usage)).notes
        assert notes["revised_prompt"].startswith("ab?c")
        assert len(notes["revised_prompt"]) <= 8000
        assert notes["usage"] == {"total_tokens": 3, "details": {"cost": 0.5}}


SHORT = {"timeout_seconds": 0.3}


def problem(status: int, body: Any, **headers: str) -> Answer:
    return Answer(status, body, headers)


class TestRefusals:
    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            (error(400, "moderation_blocked", "Rejected.", "image_generation_user_error"), "content_policy"),
            (error(400, "content_policy_violation", "Rejected by our safety system."), "content_policy"),
            (error(400, None, "Your request was rejected as a result of our safety system."), "content_policy"),
            (error(400, "bad", "Invalid.", inner_error={"code": "ResponsibleAIPolicyViolation"}), "content_policy"),
            (error(403, "403", "The resource is temporarily blocked because of violations"), "content_policy"),
            (error(401, "invalid_api_key", "Incorrect API key provided."), "bad_api_key"),
            (error(403, None, "Your country is not supported."), "bad_api_key"),
            (problem(403, "<html><h1>Sorry, you have been blocked</h1></html>"), "bad_api_key"),
            (error(404, "model_not_found", "The model 'gpt-image-2' does not exist."), "model_missing"),
            (error(400, "model_not_found", "The model has been retired."), "model_missing"),
            (problem(404, "<html>nginx</html>"), "model_missing"),
            (error(400, "invalid_value", "Invalid size."), "bad_request"),
            (problem(422, {"detail": [{"loc": ["size"], "msg": "Invalid size."}]}), "bad_request"),
            (problem(400, "Invalid size."), "bad_request"),
            (problem(307, "", location="http://127.0.0.1:9/v1/images/generations"), "bad_request"),
            (problem(200, {"error": {"message": "Rejected", "code": "moderation_blocked"}}), "content_policy"),
            (problem(200, {"error": {"message": "no channel"}}), "invalid_answer"),
        ],
    )  # fmt: skip
    def test_permanent(self, render: Callable[..., Rendered], answer: Answer, reason: str) -> None:
        with pytest.raises(Permanent) as raised:
            render(answer)
        assert raised.value.reason == reason

    @pytest.mark.parametrize(
        "answer",
        [
            error(429, "insufficient_quota", "You exceeded your current quota.", "insufficient_quota"),
            error(429, None, "You exceeded your current quota.", "insufficient_quota"),
            error(400, "billing_hard_limit_reached", "Billing hard limit has been reached."),
            error(403, "insufficient_user_quota", "The balance is used up."),
            problem(402, "Payment Required"),
        ],
    )
    def test_money(self, render: Callable[..., Rendered], answer: Answer) -> None:
        with pytest.raises(OverBudget):
            render(answer)

    @pytest.mark.parametrize(
        ("answer", "wait"),
        [
            (error(429, "rate_limit_exceeded", "Slow down.", headers={"retry-after": "7"}), 7),
            (error(429, None, "Slow down.", headers={"retry-after": "7", "retry-after-ms": "1500"}), 1.5),
            (error(429, None, "Slow down.", headers={"retry-after": "1e99"}), 3600),
            (error(429, None, "Slow down.", headers={"retry-after": "-5"}), 0),
            (error(429, None, "Slow down.", headers={"retry-after": "nan"}), None),
            (error(429, None, "Slow down.", headers={"retry-after": "soon"}), None),
            (error(429, None, "The content policy service is overloaded."), None),
            (error(500, "server_error", "The server had an error."), None),
            (error(503, None, "Overloaded", headers={"retry-after": "3"}), 3),
            (problem(502, "<html><style>b {}</style><h1>502 Bad Gateway</h1></html>"), None),
            (problem(500, {"error": "upstream"}), None),
            (error(408, None, "Timeout"), None),
            (error(409, None, "Conflict"), None),
        ],
    )
    def test_transient(self, render: Callable[..., Rendered], answer: Answer, wait: float | None) -> None:
        with pytest.raises(Transient) as raised:
            render(answer)
        assert raised.value.retry_after == (wait if wait is None else pytest.approx(wait))

    def test_a_date_to_wait_for(self, render: Callable[..., Rendered]) -> None:
        then = formatdate(time.time() + 90, usegmt=True)
        with pytest.raises(Transient) as raised:
            render(error(429, None, "Slow down.", headers={"retry-after": then}))
        assert raised.value.retry_after == pytest.approx(90, abs=5)

    def test_the_vendors_words_are_quoted_without_key_or_markup(self, render: Callable[..., Rendered]) -> None:
        with pytest.raises(Permanent) as raised:
            render(
                error(400, "invalid_value", f"Invalid size, {KEY}: " + "x" * 5000, headers={"x-request-id": "req_7"})
            )
        assert raised.value.detail.startswith(
            "openai answered 400 invalid_request_error invalid_value: Invalid size, [key]"
        )
        assert raised.value.detail.endswith("(request req_7)")
        assert KEY not in raised.value.detail
        assert len(raised.value.detail) < 600
        with pytest.raises(Transient, match=r"^openai answered 502: 502 Bad Gateway$"):
            render(problem(502, "<html><style>b {}</style><h1>502\n Bad Gateway</h1></html>"))


class TestTheWay:
    def test_a_timeout_may_have_been_billed(self, render: Callable[..., Rendered]) -> None:
        started = time.monotonic()
        with pytest.raises(Transient, match="may have been billed"):
            render(Answer(body={}, delay=5.0), hosted=SHORT)
        assert time.monotonic() - started < 2

    @pytest.mark.parametrize("status", [200, 500])
    def test_an_answer_that_drips_ends_in_time(self, render: Callable[..., Rendered], status: int) -> None:
        started = time.monotonic()
        with pytest.raises(Transient, match="may have been billed"):
            render(Answer(status, b"{" + b" " * 500, drip=0.05), hosted=SHORT)
        assert time.monotonic() - started < 2

    @pytest.mark.parametrize("status", [200, 500])
    def test_an_answer_that_is_too_large_is_not_read(self, render: Callable[..., Rendered], status: int) -> None:
        with pytest.raises(Permanent, match="larger than") as raised:
            render(Answer(status, b" " * 20_000), hosted={"max_bytes": 10_000})
        assert raised.value.reason == "invalid_answer"

    def test_a_compressed_answer_is_not_read(self, render: Callable[..., Rendered], vendor: ImagesServer) -> None:
        with pytest.raises(Permanent, match="compressed"):
            render(Answer(body=b"\x1f\x8b", headers={"Content-Encoding": "gzip"}))
        assert vendor.calls[0].headers["accept-encoding"] == "identity"

    def test_a_connection_that_breaks(self, render: Callable[..., Rendered]) -> None:
        with pytest.raises(Transient, match="connection to openai failed"):
            render(Answer(body=b" " * 1000, cut=10))

    def test_nobody_there(self) -> None:
        backend = backend_of("http://127.0.0.1:9/v1")
        with pytest.raises(Transient, match="connection to openai failed"):
            backend.render([Spec(prompt="a")], lambda done, of: None)
        backend.unload()


class TestSenselessAnswers:
    @pytest.mark.parametrize(
        "answer",
        [
            encoded("%%% not base64 %%%"),
            encoded(""),
            encoded("abc"),
            encoded(b"this is no image"),
            encoded(picture()[:-30]),
            encoded(picture(kind="GIF", mode="L")),
            encoded(picture(kind="BMP")),
            encoded(b"", data=[]),
            encoded(b"", data=None),
            encoded(b"", data="text"),
            encoded(b"", data=[None]),
            encoded(b"", data=[{"b64_json": 7}]),
            encoded(b"", data=[{}]),
            Answer(body=[1, 2]),
            Answer(body=b'{"created": NaN, "data": []}'),
            Answer(body="<html>Welcome</html>"),
            Answer(body=b"\xff\xfe"),
            Answer(body=b""),
        ],
    )
    def test_no_image_in_it(self, render: Callable[..., Rendered], answer: Answer) -> None:
        with pytest.raises(Permanent) as raised:
            render(answer)
        assert raised.value.reason == "invalid_answer"

    def test_a_bomb_is_refused_before_it_is_decoded(self, render: Callable[..., Rendered]) -> None:
        started = time.monotonic()
        with pytest.raises(Permanent, match=r"7000×7000 pixels"):
            render(encoded(picture(7000, 7000, mode="L")))
        assert time.monotonic() - started < 3


class TestLinkedAnswers:
    def test_a_file_that_comes_late_is_not_paid_twice(
        self, render: Callable[..., Rendered], vendor: ImagesServer
    ) -> None:
        url = vendor.serve("a.png", Answer(503, "busy"), Answer(body=picture()))
        assert render(linked(url)).image.size == (64, 48)
        assert vendor.fetched == ["a.png", "a.png"]

    def test_only_the_vendors_own_origin_may_be_private(
        self, render: Callable[..., Rendered], vendor: ImagesServer
    ) -> None:
        with ImagesServer() as other:
            with pytest.raises(Permanent, match="not https"):
                render(linked(other.serve("a.png", Answer(body=picture()))))
            assert other.fetched == []

    def test_the_cap_of_the_catalogue_holds(self, render: Callable[..., Rendered], vendor: ImagesServer) -> None:
        url = vendor.serve("a.png", Answer(body=b" " * 200_000))
        with pytest.raises(Permanent, match="max_bytes"):
            render(linked(url), hosted={"max_bytes": 100_000})


class TestContract:
    def test_steps_frame_the_call(self, vendor: ImagesServer) -> None:
        steps: list[tuple[int, int, int]] = []
        backend = backend_of(vendor.base_url)
        backend.render([Spec(prompt="a")], lambda done, of: steps.append((done, of, len(vendor.calls))))
        assert steps == [(0, 1, 0), (1, 1, 1)]
        assert backend.max_batch(Spec(prompt="a")) == 1, "unless the catalogue says otherwise"
        backend.unload()

    def test_a_job_called_off_in_time_costs_nothing_and_the_next_works(self, vendor: ImagesServer) -> None:
        backend = backend_of(vendor.base_url)

        def cancel(done: int, of: int) -> None:
            raise Canceled

        with pytest.raises(Canceled):
            backend.render([Spec(prompt="a")], cancel)
        assert vendor.calls == []
        assert len(backend.render([Spec(prompt="a")], lambda done, of: None)) == 1
        backend.unload()
        backend.load()
        assert len(backend.render([Spec(prompt="a")], lambda done, of: None)) == 1
        backend.unload()

    def test_several_specs_are_several_calls_in_their_order(self, vendor: ImagesServer) -> None:
        backend = backend_of(vendor.base_url, max_batch=4)
        specs = [Spec(prompt=f"number {i}", size=f"{16 * (i + 1)}x16") for i in range(4)]
        assert backend.max_batch(specs[0]) == 4
        steps: list[int] = []
        rendered = backend.render(specs, lambda done, of: steps.append(done))
        assert [each.image.width for each in rendered] == [16, 32, 48, 64]
        assert sorted(call.body["prompt"] for call in vendor.calls) == [spec.prompt for spec in specs]
        assert steps == [0, 1, 2, 3, 4]
        backend.unload()

    def test_one_failure_fails_the_pass(self, vendor: ImagesServer) -> None:
        vendor.answers.extend([error(500, None, "x")])
        backend = backend_of(vendor.base_url, max_batch=2)
        with pytest.raises(RenderError):
            backend.render([Spec(prompt="a"), Spec(prompt="b")], lambda done, of: None)
        backend.unload()

    @pytest.mark.parametrize(
        ("provider", "variable"), [("openai", "OPENAI_API_KEY"), ("mine", 'IMAGEFARM_PROVIDER_KEYS={"mine": "…"}')]
    )
    def test_without_a_key_it_says_which_to_set(self, provider: str, variable: str) -> None:
        with pytest.raises(Permanent) as raised:
            backend_of("http://127.0.0.1:9/v1", key=None, provider=provider)
        assert raised.value.reason == "no_api_key"
        assert variable in raised.value.detail

    def test_a_model_without_a_host_is_a_wrong_catalogue(self) -> None:
        settings = load_settings(
            database_url="postgresql://unused/unused", redis_url="redis://unused/0", storage_url="file:///unused"
        )
        with pytest.raises(CatalogueError, match="hosted"):
            open_backend(ModelEntry(name="x", backend="openai_images", folder="x"), settings)
