"""How every process of the farm logs: one line an event, to standard error."""

from __future__ import annotations

import logging


def configure(level: str) -> None:
    """Set up logging for this process. Chatty libraries speak from WARNING on."""
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%Y-%m-%dT%H:%M:%S%z", force=True
    )
    for name in ("alembic", "botocore", "boto3", "celery", "httpx2", "kombu", "openai", "s3transfer", "urllib3"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[level]))
