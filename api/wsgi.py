"""The API for any WSGI server: `gunicorn api.wsgi:app`. Prefer `python -m api.serve`, which also handles slow clients.

Nothing is opened before the first request, so a server may load this module and fork afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import cache
from wsgiref.types import StartResponse, WSGIEnvironment

from api.app import Api, create_app
from shared.services import Services, open_services
from shared.settings import Settings, load_settings

#: connections to the database that one process keeps; twice as many threads wait as work
_POOL_SIZE = 10

_building = threading.Lock()


def open_api_services(settings: Settings | None = None) -> Services:
    """The services of one API process."""
    return open_services("imagefarm-api", settings or load_settings(), pool_size=_POOL_SIZE)


@cache
def _api() -> Api:
    return create_app(open_api_services())


def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """The WSGI application of this process."""
    with _building:
        api = _api()
    return api(environ, start_response)
