"""`pause`, `resume`, `prioritize`, `retry`: what may be done to what was submitted."""

from __future__ import annotations

import click

from imagefarm.client import Farm
from imagefarm.console import open_farm, say
from shared.errors import FarmError
from shared.states import Priority


@click.command()
@click.argument("batch", nargs=-1)
@click.option("--model", help="Stop a model everywhere (operators).")
@click.option("--tenant", help="Stop all of a tenant (operators).")
def pause(batch: tuple[str, ...], model: str | None, tenant: str | None) -> None:
    """Set batches, a model or a tenant aside.

    What is being rendered is finished; what waits stands in nobody's way until `imagefarm resume`.
    """
    _pause(batch, model, tenant, paused=True)


@click.command()
@click.argument("batch", nargs=-1)
@click.option("--model", help="Go on with a model (operators).")
@click.option("--tenant", help="Go on with a tenant (operators).")
def resume(batch: tuple[str, ...], model: str | None, tenant: str | None) -> None:
    """Let what was paused go on."""
    _pause(batch, model, tenant, paused=False)


def _pause(batches: tuple[str, ...], model: str | None, tenant: str | None, *, paused: bool) -> None:
    if not batches and model is None and tenant is None:
        raise click.UsageError("name a batch, or --model or --tenant")
    done = "is paused" if paused else "goes on"
    with open_farm() as farm:
        for id_ in batches:
            changed = farm.pause(id_) if paused else farm.resume(id_)
            say(f"{id_} {done}" + (f": {changed.state_reason}" if changed.state_reason else ""))
        if model is not None:
            farm.pause_model(model, paused)
            say(f"the model {model} {done}")
        if tenant is not None:
            farm.change_tenant(tenant, paused=paused)
            say(f"the tenant {tenant} {done}")


@click.command()
@click.argument("batch")
@click.argument("priority", type=click.Choice([str(one) for one in Priority]))
def prioritize(batch: str, priority: str) -> None:
    """Put a batch into another priority class."""
    with open_farm() as farm:
        farm.set_priority(batch, priority)
    say(f"{batch} has {priority} priority")


@click.command()
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@click.option("--error-class", "error_classes", multiple=True, metavar="CLASS", help="Only jobs that failed so.")
@click.option("--canceled", is_flag=True, help="Canceled jobs too.")
def retry(ids: tuple[str, ...], error_classes: tuple[str, ...], canceled: bool) -> None:
    """Render failed jobs again, with a clean record.

    ID is a batch, of which all failed jobs are meant, or a single job.
    """
    states = ["failed", "canceled"] if canceled else ["failed"]
    with open_farm() as farm:
        for id_ in ids:
            _retry(farm, id_, error_classes, states)


def _retry(farm: Farm, id_: str, error_classes: tuple[str, ...], states: list[str]) -> None:
    if not id_.startswith(("batch_", "job_")):
        raise FarmError(f"{id_!r} is not an id; ids look like batch_… or job_…")
    count = farm.retry(id_, error_classes, states)
    say(f"{id_}: {count} {'job is' if count == 1 else 'jobs are'} queued again")
