"""A hosted image vendor on loopback: speaks the Images API as OpenAI does (base64) or as the CometAPI gateway does
(URLs of webp files that it serves itself), and misbehaves on request."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from PIL import Image

KEY = "sk-tests-0123456789abcdef"
MODELS = ("gpt-image-2", "qwen-image")


@dataclass(frozen=True)
class Answer:
    """One programmed HTTP answer."""

    status: int = 200
    #: an object is sent as JSON, text as HTML, bytes as they are
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)
    #: seconds before the first byte
    delay: float = 0.0
    #: seconds between single bytes; 0 sends all at once
    drip: float = 0.0
    #: end the connection after this many bytes of the body
    cut: int | None = None


@dataclass(frozen=True)
class Call:
    """One request as it came in."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


def picture(width: int = 64, height: int = 48, kind: str = "PNG", mode: str = "RGB") -> bytes:
    """An encoded image of a known color."""
    out = io.BytesIO()
    color = (200, 40, 90, 128)[: len(mode)]
    Image.new(mode, (width, height), color).save(out, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return out.getvalue()


def error(status: int, code: str | None, message: str, kind: str = "invalid_request_error", **more: Any) -> Answer:
    """An error in OpenAI's own shape."""
    headers = more.pop("headers", {})
    return Answer(status, {"error": {"message": message, "type": kind, "param": None, "code": code, **more}}, headers)


def encoded(data: bytes | str, /, **more: Any) -> Answer:
    """A success whose image is in the answer; text is sent as it is in place of base64."""
    text = data if isinstance(data, str) else base64.b64encode(data).decode()
    usage = {
        "input_tokens": 9,
        "input_tokens_details": {"text_tokens": 9, "image_tokens": 0},
        "output_tokens": 272,
        "total_tokens": 281,
    }
    body = {"created": 1_790_000_000, "data": [{"b64_json": text}], "size": "64x48", "usage": usage, **more}
    return Answer(200, body, {"x-request-id": "req_tests"})


def linked(url: str, /, **more: Any) -> Answer:
    """A success whose image must be fetched."""
    return Answer(200, {"created": 1_790_000_000, "data": [{"url": url, **more}]}, {"x-request-id": "req_tests"})


class ImagesServer:
    """Runs while entered. `answers` are used up first; without any, it answers as `vendor` would."""

    def __init__(self, vendor: Literal["openai", "cometapi"] = "openai") -> None:
        self.vendor = vendor
        #: what was asked, in order: one for each image that would have been billed
        self.calls: list[Call] = []
        #: paths below `/files/` that were fetched
        self.fetched: list[str] = []
        self.answers: deque[Answer] = deque()
        #: what is served below `/files/`; a list is used up, its last answer stays
        self.files: dict[str, list[Answer]] = {}
        self._closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _handler_of(self))
        self.origin = f"http://127.0.0.1:{self._server.server_port}"
        self.base_url = f"{self.origin}/v1"

    def __enter__(self) -> ImagesServer:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def serve(self, name: str, *answers: Answer) -> str:
        """Serve these under a URL of this server, which is returned."""
        self.files[name] = list(answers)
        return f"{self.origin}/files/{name}"

    def answer_to(self, call: Call) -> Answer:
        """What the vendor says to one request for an image."""
        self.calls.append(call)
        if self.answers:
            return self.answers.popleft()
        asked = call.body
        if call.path != "/v1/images/generations":
            return error(404, None, f"Invalid URL (POST {call.path})")
        if call.headers.get("authorization") != f"Bearer {KEY}":
            return error(401, "invalid_api_key", "Incorrect API key provided.")
        if asked.get("model") not in MODELS:
            return error(404, "model_not_found", f"The model '{asked.get('model')}' does not exist.")
        known = {"model", "prompt", "n", "size", "quality", "background", "moderation"}
        if self.vendor == "cometapi":
            known |= {"response_format", "style"}
        if unknown := set(asked) - known:
            return error(400, "unknown_parameter", f"Unknown parameter: '{min(unknown)}'.")
        width, _, height = asked.get("size", "64x48").replace("auto", "64x48").partition("x")
        if self.vendor == "openai":
            return encoded(picture(int(width), int(height)))
        drawn = Answer(body=picture(int(width), int(height), "WEBP"), headers={"Content-Type": "image/webp"})
        return linked(self.serve(f"{len(self.calls)}.webp", drawn))

    def file_at(self, path: str) -> Answer:
        """What a GET gets."""
        name = path.removeprefix("/files/")
        self.fetched.append(name)
        left = self.files.get(name, [Answer(404, "<h1>Not Found</h1>")])
        return left.pop(0) if len(left) > 1 else left[0]

    def send(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        """Write an answer, with its faults."""
        body, kind = answer.body, "application/octet-stream"
        if isinstance(body, str):
            body, kind = body.encode(), "text/html"
        elif not isinstance(body, bytes):
            body, kind = json.dumps(body).encode(), "application/json"
        self._closing.wait(answer.delay)
        with contextlib.suppress(OSError):
            handler.send_response(answer.status)
            headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close"} | answer.headers
            for name, value in headers.items():
                handler.send_header(name, value)
            handler.end_headers()
            if not answer.drip:
                handler.wfile.write(body[: answer.cut])
                return
            for i in range(len(body)):
                if self._closing.wait(answer.drip):
                    return
                handler.wfile.write(body[i : i + 1])


class _Server(ThreadingHTTPServer):
    daemon_threads = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves early is what some tests are about."""


def _handler_of(server: ImagesServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
            headers = {name.lower(): value for name, value in self.headers.items()}
            server.send(self, server.answer_to(Call(self.path, headers, body)))
            self.close_connection = True

        def do_GET(self) -> None:
            server.send(self, server.file_at(self.path))
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    return Handler
