"""Puts claimed jobs into passes, and learns how large a pass this machine can take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.catalogue import ModelEntry
from shared.lifecycle import ClaimedJob
from shared.specs import RenderSpec, spec_class


@dataclass(frozen=True)
class Task:
    """A claimed job with its spec."""

    job: ClaimedJob
    spec: RenderSpec


def spec_of(entry: ModelEntry, shared: Mapping[str, Any], job: ClaimedJob) -> RenderSpec:
    """The full spec of a job: the batch's parameters, its own over them, its prompt and seed.

    Raises pydantic's `ValidationError` where this worker's code does not know what was stored (version skew).
    """
    fields = {**shared, **(job.overrides or {}), "prompt": job.prompt, "seed": job.seed}
    return spec_class(entry.backend).model_validate(fields)


class PassSizes:
    """The largest pass for each kind of job, lowered when the device runs out of memory, for as long as we live."""

    def __init__(self) -> None:
        self._limits: dict[int, int] = {}

    def limit(self, batch_key: int, most: int) -> int:
        return min(most, self._limits.get(batch_key, most))

    def lower(self, batch_key: int, failed_size: int) -> None:
        """A pass of this size did not fit; from now on halves of it at most."""
        self._limits[batch_key] = max(1, failed_size // 2)


def passes(tasks: Sequence[Task], size: int) -> Iterator[list[Task]]:
    """The tasks in order, at most `size` at a time."""
    for start in range(0, len(tasks), size):
        yield list(tasks[start : start + size])
