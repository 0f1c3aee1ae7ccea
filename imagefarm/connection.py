"""The HTTP connection to a farm: pooled, with time-outs and safe repeats; every failure becomes a readable error."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from urllib3.util import Retry

from shared.errors import FarmError, Fault, SettingsError
from shared.settings import load_client_settings, variable

#: file in the data folder of a farm started by `imagefarm up`: its address and a key
CLIENT_FILE = "client.json"

_CONNECT_SECONDS = 5.0
_USER_AGENT = "imagefarm-python"
_MAX_LISTED = 10
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


class FarmUnreachable(FarmError):
    """No farm answers."""

    code = "unreachable"


class FarmRequestError(FarmError):
    """The farm refused a request. The text names each wrong field and what would be right."""

    code = "request"

    def __init__(self, status: int, title: str, detail: str, kind: str = "", errors: list[Fault] | None = None) -> None:
        #: HTTP status
        self.status = status
        self.title = title
        #: stable name of the problem, the last part of its `type`
        self.kind = kind
        #: one fault for each wrong field, by JSON pointer
        self.errors = errors or []
        # a detail that only repeats the faults is not said twice
        head = title if any(fault.detail in detail for fault in self.errors) else detail or title
        lines = [f"  {pointer_text(fault.pointer)}: {fault.detail}" for fault in self.errors[:_MAX_LISTED]]
        if len(self.errors) > _MAX_LISTED:
            lines.append(f"  … and {len(self.errors) - _MAX_LISTED} more")
        super().__init__("\n".join([head, *lines]))


def pointer_text(pointer: str) -> str:
    """`/jobs/3/width` as people write it: `jobs[3].width`."""
    text = re.sub(r"/(\d+)(?=/|$)", r"[\1]", pointer)
    return text.replace("/", ".").lstrip(".") or "request"


@dataclass(frozen=True)
class Address:
    """Where a farm is and the key to it."""

    url: str
    api_key: str


def find_farm(url: str | None = None, api_key: str | None = None) -> Address:
    """The farm that is meant: by arguments, by `IMAGEFARM_URL` and `IMAGEFARM_API_KEY`, or the one of the data folder.

    Raises `FarmUnreachable` where none is known and `SettingsError` where its key is missing.
    """
    given = {name: value for name, value in {"url": url, "api_key": api_key}.items() if value is not None}
    settings = load_client_settings(**given)
    key = settings.api_key.get_secret_value().strip() if settings.api_key else None
    if key and not (key.isascii() and key.isprintable()):
        raise SettingsError("IMAGEFARM_API_KEY: holds characters that no key has")
    local = read_client_file(settings.data)
    if settings.url is None:
        if local is None:
            raise FarmUnreachable(
                "no farm is known here: start one with `imagefarm up`, or set IMAGEFARM_URL and IMAGEFARM_API_KEY "
                f"(looked for {settings.data / CLIENT_FILE})"
            )
        return Address(local.url, key or local.api_key)
    address = settings.url.rstrip("/").removesuffix("/api/v1")
    if key is None and local and local.url == address:
        key = local.api_key
    if key is None:
        raise SettingsError("IMAGEFARM_API_KEY: is not set; `imagefarm key create` makes a key on the farm's machine")
    return Address(address, key)


def read_client_file(data: Path) -> Address | None:
    """The address that `imagefarm up` left in its data folder, or None."""
    path = data / CLIENT_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Address(str(found["url"]).rstrip("/"), str(found["api_key"]))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}; is it the farm of somebody else?") from None
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{path}: is damaged: {error}; `imagefarm up` writes it anew") from None


class _Bearer(AuthBase):
    """An auth object, because a plain header would be overridden by a ~/.netrc entry for the host."""

    def __init__(self, api_key: str) -> None:
        self._value = f"Bearer {api_key}"

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = self._value
        return request


def proxies() -> dict[str, str]:
    """What requests need to know of proxies beside the environment: none has a part in reaching this machine."""
    named = variable("no_proxy") or variable("NO_PROXY") or ""
    return {"no_proxy": ",".join(filter(None, [named, *_THIS_MACHINE]))}


class Connection:
    """Requests to one farm. May be shared by threads."""

    def __init__(self, address: Address, timeout: float) -> None:
        self.url = address.url
        self._timeout = (_CONNECT_SECONDS, timeout)
        self._session = requests.Session()
        self._session.auth = _Bearer(address.api_key)
        self._session.headers["User-Agent"] = _USER_AGENT
        # A POST is repeated too: each carries an Idempotency-Key, so the farm does it once.
        repeats = Retry(
            total=6,
            connect=2,
            read=3,
            status=5,
            redirect=5,
            backoff_factor=0.2,
            backoff_jitter=0.1,
            status_forcelist=(429, 502, 503, 504),
            allowed_methods=None,
            raise_on_status=False,
            retry_after_max=60,
        )
        adapter = HTTPAdapter(pool_maxsize=32, max_retries=repeats)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def close(self) -> None:
        self._session.close()

    def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        patience: float = 0.0,
    ) -> Any:
        """One call of the native API, its JSON answer. `patience`: seconds that the farm itself may hold the call."""
        response = self._send(method, f"/api/v1{path}", query, body, headers, patience)
        if not response.content:
            return None
        try:
            return response.json()
        except ValueError:
            raise FarmUnreachable(f"{self.url} answers, but not as a farm does; is IMAGEFARM_URL right?") from None

    def fetch(self, path: str) -> bytes:
        """The bytes behind a path. Follows the link to the object storage; the key stays with the farm."""
        return self._send("GET", path, None, None, None, 0.0).content

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None,
        body: Any,
        headers: Mapping[str, str] | None,
        patience: float,
    ) -> requests.Response:
        connect, read = self._timeout
        try:
            data = None if body is None else json.dumps(body, allow_nan=False).encode()
        except ValueError:
            raise FarmError("NaN and infinite numbers cannot be sent to the farm") from None
        sent = {"Accept": "application/json, */*", **(headers or {})}
        if data is not None:
            sent["Content-Type"] = "application/json"
        try:
            response = self._session.request(
                method,
                self.url + path,
                params=query,
                data=data,
                headers=sent,
                timeout=(connect, read + patience),
                proxies=proxies(),
            )
        except requests.exceptions.InvalidURL as error:
            raise SettingsError(f"IMAGEFARM_URL: {error}") from None
        except requests.exceptions.SSLError as error:
            raise FarmUnreachable(f"{self.url}: the secure connection failed: {_reason(error)}") from error
        except requests.exceptions.RequestException as error:
            raise FarmUnreachable(
                f"{self.url} does not answer ({_reason(error)}); is a farm running? "
                "Start one with `imagefarm up`, or set IMAGEFARM_URL"
            ) from error
        if response.status_code >= 400:
            raise _problem(response)
        return response


def _reason(error: BaseException) -> str:
    """The innermost cause in a few words; the outer ones quote objects and addresses in memory."""
    while (inner := error.__context__ or error.__cause__) is not None:
        error = inner
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.rsplit(": ", 1)[-1]


def _problem(response: requests.Response) -> FarmRequestError:
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        body = {}
    faults = [
        Fault(str(f.get("pointer", "")), str(f.get("code", "")), str(f.get("detail", "")))
        for f in body.get("errors") or []
        if isinstance(f, dict)
    ]
    title = str(body.get("title") or f"the farm answered {response.status_code} {response.reason}")
    detail = str(body.get("detail") or "")
    if response.status_code == 401:
        detail = f"{detail or title} Check IMAGEFARM_API_KEY; `imagefarm key create` makes a key on the farm's machine."
    kind = str(body.get("type") or "").rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    return FarmRequestError(response.status_code, title, detail, kind, faults)
