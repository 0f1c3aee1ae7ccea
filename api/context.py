"""What every request handler works with, found through Flask's current application."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from flask import current_app

from api.slots import Slots
from shared.services import Services

_NAME = "imagefarm"


@dataclass(frozen=True)
class Context:
    """The parts of one API process."""

    services: Services
    #: set when the process is told to stop; whoever waits for something then answers at once
    closing: threading.Event
    #: places for requests that wait for a job to end
    polls: Slots
    #: places for requests whose body is still arriving
    uploads: Slots


def install(app_extensions: dict[str, object], services: Services, closing: threading.Event) -> None:
    """Make the context of one application. A share of the threads always stays free for short requests."""
    threads = services.settings.api_threads
    app_extensions[_NAME] = Context(services, closing, Slots(threads // 2), Slots(threads // 4))


def context() -> Context:
    """The context of the application that handles this request."""
    found: Context = current_app.extensions[_NAME]
    return found
