"""The one Celery task: somebody rang, so look for work."""

from __future__ import annotations

import logging
import threading
from typing import Any

from celery.signals import worker_process_init, worker_process_shutdown

from shared.queue import DRAIN_TASK
from shared.services import open_services
from worker.app import app, stopping
from worker.executor import Executor

logger = logging.getLogger(__name__)

_executor: Executor | None = None


@worker_process_init.connect
def _open(**_: Any) -> None:
    """Build the executor in the child: connections and CUDA must not cross a fork."""
    global _executor
    services = open_services("imagefarm worker")
    _executor = Executor(services, services.settings.served_models or list(services.catalogue))
    _executor.start()
    threading.Thread(target=_watch, args=(_executor,), name="stop-watch", daemon=True).start()


def _watch(executor: Executor) -> None:
    stopping.wait()
    logger.info("told to stop: finishing the current pass")
    executor.stop_soon()


@worker_process_shutdown.connect
def _close(**_: Any) -> None:
    if _executor is not None:
        _executor.close()


@app.task(name=DRAIN_TASK)
def drain(model: str) -> None:
    """Render until the queues are empty. Doubled or late bells find nothing to do."""
    if _executor is None:
        raise RuntimeError("drain runs in a prefork child only")
    _executor.drain(model)
