"""Serves the API: `python -m api.serve`. gunicorn with threads, on the address that IMAGEFARM_LISTEN names."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

from gunicorn.app.base import BaseApplication

from api.app import Api, create_app
from api.connections import PatientWorker
from api.wsgi import open_api_services
from shared import logs
from shared.catalogue import load_catalogue
from shared.errors import FarmError
from shared.settings import Settings, load_settings

#: seconds that requests may still take when the server is told to stop
GRACE_SECONDS = 15


class Server(BaseApplication):  # type: ignore[misc]
    """gunicorn, configured in code."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        #: of this process; set by its worker when it is told to stop
        self.closing = threading.Event()
        super().__init__()

    def load_config(self) -> None:
        for name, value in self._options().items():
            self.cfg.set(name, value)

    def _options(self) -> dict[str, Any]:
        return {
            "bind": self._settings.listen,
            "workers": min(2, os.cpu_count() or 1),
            "worker_class": PatientWorker,
            "threads": self._settings.api_threads,
            "worker_connections": 2000,
            "timeout": 60,
            "graceful_timeout": GRACE_SECONDS,
            "keepalive": 30,
            "limit_request_line": 8190,
            "limit_request_fields": 64,
            # no header of whoever connects can change path or scheme
            "forwarded_allow_ips": "",
            "forwarder_headers": "",
            "control_socket_disable": True,
            "accesslog": None,
            "loglevel": self._settings.log_level.lower(),
            "proc_name": "imagefarm-api",
        }

    def load(self) -> Api:
        """The application of one process, opened after the fork."""
        logs.configure(self._settings.log_level)
        return create_app(open_api_services(self._settings), self.closing)


def main() -> int:
    """Serve until told to stop."""
    try:
        settings = load_settings()
        load_catalogue(settings.catalogue)
    except FarmError as error:
        print(error.detail, file=sys.stderr)
        return 2
    logs.configure(settings.log_level)
    Server(settings).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
