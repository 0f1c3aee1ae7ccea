"""Hosted DALL·E-class models through the OpenAI Images API: OpenAI itself, its Azure `/openai/v1/` face, and gateways.

One call makes one image, and no call is ever repeated here: every call costs money, so a repetition is the farm's
decision. For the same reason an answer that was paid for but makes no sense is `Permanent`. The vendor is never asked
for a file format: its default is lossless, and the farm encodes what the job asks for.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
from openai import APIConnectionError, APIStatusError, APITimeoutError, DefaultHttpxClient, OpenAI, OpenAIError
from PIL import Image

from shared.catalogue import ModelEntry
from shared.errors import CatalogueError, OverBudget, Permanent, RenderError, Transient
from shared.settings import Settings
from shared.specs import RenderSpec
from worker.backends import OnStep, Rendered
from worker.download import download

logger = logging.getLogger(__name__)

#: what of the spec is sent, where it is set
FIELDS = ("size", "quality", "background", "moderation", "style")
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 40_000_000
#: most characters of a vendor's text in an error
MAX_SAID = 500
#: longest wait that a vendor can ask for, in seconds
MAX_RETRY_AFTER = 3600.0

MONEY = {
    "insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "insufficient_user_quota",
    "pre_consume_token_quota_failed",
}  # fmt: skip
POLICY = {"moderation_blocked", "content_policy_violation", "content_filter", "responsibleaipolicyviolation"}
POLICY_WORDS = re.compile(
    r"safety system|content[ _]policy|moderation_blocked|content management policy", re.IGNORECASE
)
NO_MODEL = {"model_not_found", "deploymentnotfound", "model_not_available"}


class Backend:
    """One hosted model. Needs the vendor's key, and nothing in memory."""

    def __init__(self, entry: ModelEntry, settings: Settings) -> None:
        """Raises `CatalogueError` where the entry does not say where the model is hosted."""
        if entry.hosted is None:
            raise CatalogueError(f"model {entry.name}: backend {entry.backend} needs a `hosted` source")
        self._entry = entry
        self._hosted = entry.hosted
        self._key = settings.provider_key(entry.hosted.provider)
        self._client: OpenAI | None = None

    def load(self) -> None:
        """Prepare the client; calls nobody. Raises `Permanent` (reason `no_api_key`)."""
        provider, timeout = self._hosted.provider, self._hosted.timeout_seconds
        if self._key is None:
            usual = {"openai": "OPENAI_API_KEY", "cometapi": "COMETAPI_API_KEY"}
            variable = usual.get(provider, f'IMAGEFARM_PROVIDER_KEYS={{"{provider}": "…"}}')
            raise Permanent(f"no API key for {provider}: set {variable} on the workers of this model", "no_api_key")
        self._client = OpenAI(
            api_key=self._key.get_secret_value(),
            base_url=self._hosted.base_url,
            max_retries=0,
            timeout=timeout,
            http_client=DefaultHttpxClient(
                timeout=timeout,
                follow_redirects=False,
                # compressed answers could grow past `max_bytes` after they were counted
                headers={"Accept-Encoding": "identity"},
                event_hooks={"request": [self._start], "response": [self._bound]},
            ),
        )
        # of the client's own environment variables: ours are in the settings, and other vendors must not learn these
        self._client.organization = self._client.project = None

    def render(self, specs: Sequence[RenderSpec], on_step: OnStep) -> list[Rendered]:
        """One call for each spec, all at once; a failure of one costs the others' images too (see `max_batch`)."""
        on_step(0, len(specs))
        with ThreadPoolExecutor(len(specs)) as pool:
            calls = [pool.submit(self._one, spec) for spec in specs]
            for done, call in enumerate(as_completed(calls), 1):
                if call.exception() is None:
                    on_step(done, len(specs))
        return [call.result() for call in calls]

    def unload(self) -> None:
        """Close the connections."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def max_batch(self, spec: RenderSpec) -> int:
        """What the catalogue entry names, else 1: calls share nothing, so a pass of several only adds risk."""
        return self._entry.max_batch if "max_batch" in self._entry.model_fields_set else 1

    def _one(self, spec: RenderSpec) -> Rendered:
        headers, answer = self._call(spec)
        picture = self._picture(answer, headers)
        image = _decoded(self._bytes_of(picture))
        asked = getattr(spec, "size", None)
        notes: dict[str, Any] = {
            "vendor": self._hosted.provider,
            "model": _text(answer.get("model"), 200) or self._hosted.model,
            "request_id": _text(headers.get("x-request-id"), 200),
            "revised_prompt": _text(picture.get("revised_prompt"), 8000),
            "usage": _numbers(answer.get("usage")),
        }
        if asked not in (None, "auto", f"{image.width}x{image.height}"):
            # it is paid for, and another call would very likely end the same: keep it, but say so
            notes["asked_size"] = asked
            logger.warning("%s: asked for %s, got %dx%d", self._entry.name, asked, image.width, image.height)
        return Rendered(image, {name: value for name, value in notes.items() if value})

    def _call(self, spec: RenderSpec) -> tuple[Mapping[str, str], dict[str, Any]]:
        """The vendor's headers and JSON answer."""
        if self._client is None:
            self.load()
        assert self._client is not None
        asked: dict[str, Any] = {name: getattr(spec, name) for name in FIELDS if getattr(spec, name, None) is not None}
        if self._hosted.response_format is not None:
            asked["response_format"] = self._hosted.response_format
        who = self._hosted.provider
        try:
            raw = self._client.images.with_raw_response.generate(
                model=self._hosted.model, prompt=spec.prompt, n=1, **asked
            )
        except APIStatusError as error:
            raise self._refusal(error.status_code, error.body, error.response.headers) from None
        except APITimeoutError as error:
            if isinstance(error.__cause__, httpx2.ConnectTimeout):
                raise Transient(f"{who} could not be reached in time") from None
            raise Transient(f"no answer from {who} in time; the image may have been billed all the same") from None
        except APIConnectionError as error:
            if isinstance(error.__cause__, _Unreadable):
                raise _invalid(f"{who}: {error.__cause__}") from None
            raise Transient(self._said(f"the connection to {who} failed: {error.__cause__ or error}")) from None
        except OpenAIError as error:
            raise _invalid(self._said(f"{who}: {error}")) from None
        try:
            answer = json.loads(raw.http_response.content, parse_constant=_refuse_constant)
        except ValueError:
            raise _invalid(self._said(f"{who} did not answer with JSON: {raw.http_response.text}")) from None
        if not isinstance(answer, dict):
            raise _invalid(f"{who} answered with JSON of another shape")
        return raw.headers, answer

    def _picture(self, answer: dict[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
        data = answer.get("data")
        if isinstance(data, list) and data and isinstance(data[0], dict):
            return data[0]
        if answer.get("error"):  # some gateways hide a failure behind status 200
            raise self._refusal(200, answer["error"], headers)
        raise _invalid(f"{self._hosted.provider} answered without an image")

    def _bytes_of(self, picture: dict[str, Any]) -> bytes:
        encoded, url = picture.get("b64_json"), picture.get("url")
        if not isinstance(encoded, str) and isinstance(url, str) and url.startswith("data:"):
            encoded = url
        if isinstance(encoded, str):
            if encoded.startswith("data:"):
                encoded = encoded.partition(",")[2]
            try:
                return base64.b64decode("".join(encoded.split()), validate=True)
            except ValueError:
                raise _invalid("the image is not valid base64") from None
        if isinstance(url, str):
            return download(url, trusted=self._hosted.base_url, max_bytes=self._hosted.max_bytes)
        raise _invalid(f"{self._hosted.provider} answered without an image")

    def _refusal(self, status: int, body: object, headers: Mapping[str, str]) -> RenderError:
        """What an error of the vendor means for the job. `body` is its `error` object, other JSON, or text."""
        codes, said = _codes(body), _message(body)
        text = self._said(
            " ".join(filter(None, (f"{self._hosted.provider} answered {status}", *sorted(codes)))) + f": {said}"
        )
        if headers.get("x-request-id"):
            text += f" (request {_text(headers['x-request-id'], 80)})"
        client_fault = status < 500 and status != 429
        blocked = status == 403 and isinstance(body, Mapping) and "blocked" in said.lower()
        if client_fault and (codes & POLICY or blocked or (isinstance(body, Mapping) and POLICY_WORDS.search(said))):
            return Permanent(text, "content_policy")
        if codes & MONEY or status == 402:
            return OverBudget(text)
        if status in (408, 409, 429) or status >= 500:
            return Transient(text, _retry_after(headers))
        if status in (401, 403):
            return Permanent(f"{text}. Check the API key of {self._hosted.provider}", "bad_api_key")
        if status == 404 or codes & NO_MODEL:
            return Permanent(f"{text}. Check `model` and `base_url` of {self._entry.name}", "model_missing")
        return Permanent(text, "invalid_answer" if status < 300 else "bad_request")

    def _said(self, text: str) -> str:
        """Text that a vendor had a part in, without our key, without markup, and short."""
        if self._key is not None:
            text = text.replace(self._key.get_secret_value(), "[key]")
        text = " ".join(re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", text[:50_000], flags=re.DOTALL).split())
        return _text(text if len(text) <= MAX_SAID else text[: MAX_SAID - 1] + "…", MAX_SAID)

    def _start(self, request: httpx2.Request) -> None:
        request.extensions["deadline"] = time.monotonic() + self._hosted.timeout_seconds

    def _bound(self, response: httpx2.Response) -> None:
        """Keep every answer, errors included, below `max_bytes` and within the time of its request."""
        if response.headers.get("content-encoding", "identity") != "identity":
            raise _Unreadable("the answer is compressed though that was not asked for")
        assert isinstance(response.stream, httpx2.SyncByteStream)
        response.stream = _Bounded(response.stream, self._hosted.max_bytes, response.request.extensions["deadline"])


class _Unreadable(httpx2.RequestError):
    """An answer that is not read to its end; of this class, so that the client reports it as the cause."""


class _Bounded(httpx2.SyncByteStream):
    def __init__(self, stream: httpx2.SyncByteStream, max_bytes: int, deadline: float) -> None:
        self._stream, self._left, self._deadline = stream, max_bytes, deadline

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            self._left -= len(chunk)
            if self._left < 0:
                raise _Unreadable("the answer is larger than `max_bytes` of this model")
            if time.monotonic() > self._deadline:
                raise httpx2.ReadTimeout("the answer takes too long")
            yield chunk

    def close(self) -> None:
        self._stream.close()


def _invalid(text: str) -> Permanent:
    return Permanent(text, "invalid_answer")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _text(value: object, limit: int) -> str:
    """`value` as text that PostgreSQL can store, or nothing."""
    return value[:limit].replace("\x00", "").encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def _numbers(value: object) -> dict[str, Any]:
    """The numbers of a vendor's `usage`, nested as they came."""
    if not isinstance(value, Mapping):
        return {}
    kept = {_text(k, 80): v if isinstance(v, int | float) else _numbers(v) for k, v in value.items()}
    return {name: number for name, number in kept.items() if number != {}}


def _codes(body: object) -> set[str]:
    """Every code and type in an error, in lower case; Azure nests the telling one."""
    if not isinstance(body, Mapping):
        return set()
    found = {str(body[name])[:80].lower() for name in ("code", "type") if body.get(name)}
    return found | _codes(body.get("innererror") or body.get("inner_error"))


def _message(body: object) -> str:
    if isinstance(body, Mapping):
        for name in ("message", "msg", "detail", "error"):
            if isinstance(body.get(name), str):
                return str(body[name])
        return json.dumps(body, default=str)
    return str(body or "no reason given")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the vendor asks to wait, from 0 to `MAX_RETRY_AFTER`, or None where it does not say."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "")
        try:
            seconds = float(value) * scale
        except ValueError:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - time.time()
            except ValueError:
                continue
        if not math.isnan(seconds):
            return min(max(seconds, 0.0), MAX_RETRY_AFTER)
    return None


def _decoded(data: bytes) -> Image.Image:
    """The picture in `data` as RGB, or RGBA where it has transparency. Believes no name or content type."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _invalid(f"the image has {image.width}×{image.height} pixels; at most {MAX_PIXELS} are read")
            return image.convert("RGBA" if image.has_transparency_data else "RGB")
    except Permanent:
        raise
    except Exception as error:  # decoders raise anything on bytes made to break them
        raise _invalid(f"the answer is not a PNG, JPEG or WebP image ({type(error).__name__})") from None
