"""The baseline of row f: a Celery task that does nothing, one message an image."""

from celery import Celery

#: keeps the baseline's messages apart from the farm's bells
KEY_PREFIX = "baseline."

app = Celery("noop", broker="redis://")
app.conf.update(
    task_ignore_result=True, worker_hijack_root_logger=False, broker_transport_options={"global_keyprefix": KEY_PREFIX}
)


@app.task(name="noop")
def noop(prompt: str) -> None:
    """Render nothing."""
