"""Public names of batches and jobs: opaque, derived, always looked up together with their tenant.

A batch carries a random 128-bit number; a job is its batch and its position, so a million ids need no storage.
"""

from __future__ import annotations

import re
import uuid

from shared.errors import NotFound

_BATCH = re.compile(r"batch_([0-9a-f]{32})")
_JOB = re.compile(r"job_([0-9a-f]{32})_(0|[1-9]\d{0,8})")


def batch_id(public_id: uuid.UUID) -> str:
    return f"batch_{public_id.hex}"


def job_id(public_id: uuid.UUID, idx: int) -> str:
    return f"job_{public_id.hex}_{idx}"


def parse_batch_id(text: str) -> uuid.UUID:
    """The batch's number. Raises `NotFound` for anything else: a wrong id and somebody else's id look the same."""
    match = _BATCH.fullmatch(text)
    if match is None:
        raise NotFound(NO_BATCH)
    return uuid.UUID(match[1])


def parse_job_id(text: str) -> tuple[uuid.UUID, int]:
    """The batch's number and the job's position in it. Raises `NotFound`."""
    match = _JOB.fullmatch(text)
    if match is None:
        raise NotFound(NO_JOB)
    return uuid.UUID(match[1]), int(match[2])


NO_BATCH = "There is no such batch."
NO_JOB = "There is no such job."
