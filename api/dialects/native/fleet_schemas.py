"""What the native dialect answers about models and workers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field

from api.answers import Answer, Time
from api.parameters import Parameters
from shared.catalogue import ModelEntry
from shared.progress import WorkerView


class Model(Answer):
    """A model of the catalogue."""

    name: str
    backend: str
    description: str
    defaults: dict[str, Any]
    limits: dict[str, Any]
    max_batch: int
    parameters: dict[str, dict[str, Any]] = Field(description="JSON schema of each parameter.")
    served: bool = Field(description="Whether a living worker renders it.")

    @classmethod
    def of(cls, entry: ModelEntry, served: bool) -> Self:
        return cls(
            name=entry.name,
            backend=entry.backend,
            description=entry.description,
            defaults=entry.defaults,
            limits=entry.limits.model_dump(mode="json"),
            max_batch=entry.max_batch,
            parameters=entry.parameters(),
            served=served,
        )


class ModelChange(Parameters):
    """What to change about a model."""

    paused: bool = Field(strict=True, description="Whether its jobs are set aside.")


class ModelChanged(Answer):
    """How a model stands now."""

    name: str
    paused: bool


class ModelList(Answer):
    """All models."""

    data: list[Model]


class Worker(Answer):
    """A worker that has said hello. `alive` while its heartbeat is fresh."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    host: str
    pid: int
    models: list[str]
    rendering: int = Field(description="Jobs that it holds now.")
    resident: list[str] = Field(description="Models that are loaded.")
    device: dict[str, Any]
    images: int
    rates: dict[str, dict[str, float]] = Field(description="By model: images_per_second, seconds_per_work.")
    resting: dict[str, dict[str, Any]] = Field(description="Models that it leaves alone after failures.")
    last_error: str | None = Field(description="Told to operators only.")
    started_at: Time
    heartbeat_at: Time
    draining_at: Time | None
    state: Literal["alive", "resting", "draining", "silent"]
    alive: bool

    @classmethod
    def of(cls, view: WorkerView, *, for_operator: bool) -> Self:
        # an error may quote another tenant's job
        return cls.model_validate(view if for_operator else replace(view, last_error=None))


class WorkerList(Answer):
    """All workers, the living ones first."""

    data: list[Worker]
