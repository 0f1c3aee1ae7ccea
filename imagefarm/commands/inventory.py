"""`models` and `workers`: what a farm has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import click
from rich.text import Text

from imagefarm.console import duration, open_farm, plain_table, say, show
from imagefarm.records import Model
from shared.errors import NotFound

_STYLES = {"alive": "green", "silent": "red"}


@click.command()
@click.argument("name", required=False)
def models(name: str | None) -> None:
    """List the models, or the parameters of one.

    \b
    imagefarm models
    imagefarm models demo-diffusion
    """
    with open_farm() as farm:
        found = farm.models()
    if name is None:
        table = plain_table("model", "served", "backend", "description")
        for model in found:
            served = Text("✔", "green") if model.served else Text("no worker", "dim")
            table.add_row(model.name, served, model.backend, model.description)
        show(table)
        return
    chosen = next((model for model in found if model.name == name), None)
    if chosen is None:
        raise NotFound(f"the farm has no model {name!r}; it has {', '.join(model.name for model in found)}")
    _parameters(chosen)


def _parameters(model: Model) -> None:
    table = plain_table("parameter", "takes", "default", "meaning")
    for name, schema in model.parameters.items():
        default = schema.get("default")
        shown = "" if default in (None, "") else json.dumps(default)
        table.add_row(name, _takes(schema), shown, schema.get("description", ""))
    show(table)


def _takes(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_takes(branch) for branch in schema["anyOf"] if branch.get("type") != "null")
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    kind = {"integer": "whole number", "string": "text", "boolean": "true or false"}.get(schema.get("type", ""), "")
    limits = f" {low} to {high}" if low is not None and high is not None and high < 2**53 else ""
    grid = f" in steps of {schema['multipleOf']}" if schema.get("multipleOf", 1) != 1 else ""
    return (kind or str(schema.get("type", "any"))) + limits + grid


@click.command()
def workers() -> None:
    """List the workers and how they are."""
    with open_farm() as farm:
        found = farm.workers()
    if not found:
        say("no workers; start one with `imagefarm worker` (or `imagefarm up`)", "yellow")
        return
    table = plain_table(
        "worker", "state", "device", "serves", "loaded", "renders", "images", "images/s", "heartbeat", "last error"
    )
    for worker in found:
        age = (datetime.now(UTC) - worker.heartbeat_at).total_seconds() if worker.heartbeat_at else None
        beat = f"{duration(max(0.0, age))} ago" if age is not None else ""
        table.add_row(
            worker.id,
            Text(worker.state, _STYLES.get(worker.state, "yellow")),
            str(worker.device.get("name") or worker.device.get("type") or ""),
            ", ".join(worker.models),
            ", ".join(worker.resident),
            str(worker.rendering or ""),
            str(worker.images),
            ", ".join(f"{model} {rate['images_per_second']:.3g}" for model, rate in worker.rates.items()),
            beat,
            "; ".join([*(_rest(model, why) for model, why in worker.resting.items()), worker.last_error or ""]).strip(
                "; "
            ),
        )
    show(table)


def _rest(model: str, why: Mapping[str, Any]) -> str:
    return f"{model} rests {duration(why['seconds'])} after {why['failures']} × {why['error_class']}"


@click.command()
def queues() -> None:
    """List what waits for each model, and how many workers that calls for."""
    with open_farm() as farm:
        found = farm.queues()
    table = plain_table("model", "queued", "rendering", "held", "scheduled", "oldest", "work left", "workers", "wanted")
    for queue in found:
        table.add_row(
            queue.model,
            *(str(number or "") for number in (queue.queued, queue.rendering, queue.held, queue.scheduled)),
            duration(queue.oldest_wait_seconds) if queue.oldest_wait_seconds else "",
            duration(queue.pending_seconds) if queue.pending_seconds else "",
            str(queue.live_workers),
            str(queue.wanted_workers),
        )
    show(table)
