"""The Celery application of a worker: `celery -A worker.app worker`, or simply `imagefarm worker`.

Celery brings the bells, the process pool and the signals. It carries no job, keeps no result and retries nothing; all
of that is rows (`shared.lifecycle`). One prefork child renders: the parent stays responsive while the child is inside
a kernel, and CUDA is touched in the child only.
"""

from __future__ import annotations

from multiprocessing.sharedctypes import RawValue
from typing import Any

from celery import Celery
from celery.signals import setup_logging, worker_ready, worker_shutting_down
from kombu.entity import Queue

from shared import logs
from shared.catalogue import load_catalogue
from shared.errors import SettingsError
from shared.queue import broker_url, queue_name
from shared.settings import Settings, load_settings
from worker.childwatch import ChildWatch

#: Not 0 once the worker is told to stop: written in the parent, read in the child (both share it over the fork). A bare
#: byte rather than an Event, whose lock stays taken for good when a child is killed while it waits for it.
stopping = RawValue("b", 0)


def served_models(settings: Settings) -> list[str]:
    """The models that this worker serves: those that the settings name, else the whole catalogue.

    Raises `SettingsError` where one is unknown, so that a slip of the pen is seen when the worker starts.
    """
    catalogue = load_catalogue(settings.catalogue)
    if unknown := [name for name in settings.served_models if name not in catalogue]:
        raise SettingsError(
            f"IMAGEFARM_WORKER_MODELS: {unknown[0]!r} is not in {settings.catalogue}; it has {', '.join(catalogue)}"
        )
    return settings.served_models or list(catalogue)


def make_app(settings: Settings) -> Celery:
    """Celery configured so that losing the broker loses nothing."""
    app = Celery("imagefarm", broker=broker_url(settings), include=["worker.tasks"])
    app.conf.update(
        task_acks_late=False,
        task_ignore_result=True,
        result_backend=None,
        task_serializer="json",
        accept_content=["json"],
        task_queues=[Queue(queue_name(model)) for model in served_models(settings)],
        task_publish_retry=False,
        worker_pool="prefork",
        worker_concurrency=1,
        worker_prefetch_multiplier=1,
        worker_max_tasks_per_child=None,
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # what Redis refuses (it is full, read-only, loading) passes like an outage: connect anew, do not end
        broker_channel_error_retry=True,
        broker_transport_options={
            "visibility_timeout": 3600,
            "socket_timeout": 5,
            "socket_connect_timeout": 2,
            "socket_keepalive": True,
            "health_check_interval": 10,
        },
    )
    return app


@setup_logging.connect
def _set_up_logging(**_: Any) -> None:
    logs.configure(load_settings().log_level)


@worker_shutting_down.connect
def _tell_child(**_: Any) -> None:
    stopping.value = 1


@worker_ready.connect
def _watch_child(**_: Any) -> None:
    child_watch.start()


app = make_app(load_settings())
child_watch = ChildWatch(load_settings())
