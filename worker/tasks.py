"""The one Celery task: somebody rang, so look for work."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from celery.signals import worker_process_init, worker_process_shutdown

from shared.errors import FarmError
from shared.queue import DRAIN_TASK
from shared.services import open_services
from worker.app import app, child_watch, served_models, stopping
from worker.executor import Executor

logger = logging.getLogger(__name__)

_executor: Executor | None = None


@worker_process_init.connect
def _open(**_: Any) -> None:
    """Build the executor in the child: connections and CUDA must not cross a fork.

    Where that fails (the storage is away), the next bell tries again; the keeper rings while there is work.
    """
    global _executor
    try:
        services = open_services("imagefarm worker")
        _executor = Executor(services, served_models(services.settings))
    except FarmError as error:
        logger.error("this worker cannot work yet: %s", error)
        return
    _executor.start()
    child_watch.here(_executor.worker_id)
    threading.Thread(target=_watch, args=(_executor,), name="stop-watch", daemon=True).start()


def _watch(executor: Executor) -> None:
    while not stopping.value:
        time.sleep(0.1)
    logger.info("told to stop: finishing the current pass")
    executor.stop_soon()


@worker_process_shutdown.connect
def _close(**_: Any) -> None:
    if _executor is not None:
        _executor.close()
        child_watch.gone()


@app.task(name=DRAIN_TASK)
def drain(model: str) -> None:
    """Render until the queues are empty. Doubled or late bells find nothing to do."""
    if _executor is None:
        _open()
    if _executor is not None:
        _executor.drain(model)
