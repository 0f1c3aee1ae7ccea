"""`drain`, `undrain`, `tenants`, `cap`: for those who run the farm. They need an operator's key."""

from __future__ import annotations

from collections.abc import Sequence

import click

from imagefarm.client import Farm
from imagefarm.console import open_farm, plain_table, say, show
from imagefarm.records import Worker
from shared.errors import NotFound


@click.command()
@click.argument("worker", nargs=-1, required=True)
def drain(worker: tuple[str, ...]) -> None:
    """Let workers claim nothing more; what they render now is finished.

    WORKER is an id of `imagefarm workers`, or its machine: `imagefarm drain gpu-host-3` drains all workers there.
    """
    _drain(worker, draining=True)


@click.command()
@click.argument("worker", nargs=-1, required=True)
def undrain(worker: tuple[str, ...]) -> None:
    """Let drained workers claim again."""
    _drain(worker, draining=False)


def _drain(names: Sequence[str], *, draining: bool) -> None:
    with open_farm() as farm:
        for one in _meant(farm, names):
            farm.drain(one, draining)
            say(f"{one.id} {'claims nothing more' if draining else 'claims again'}")


def _meant(farm: Farm, names: Sequence[str]) -> list[Worker]:
    workers = farm.workers()
    for name in names:
        if not any(_is_called(worker, name) for worker in workers):
            raise NotFound(f"no worker or machine is called {name!r}; `imagefarm workers` lists them")
    return [worker for worker in workers if any(_is_called(worker, name) for name in names)]


def _is_called(worker: Worker, name: str) -> bool:
    # an id is HOST-PID-RANDOM; gpu-1 is not gpu-10
    return worker.id == name or worker.id.rsplit("-", 2)[0] == name


@click.command()
def tenants() -> None:
    """List the tenants, their shares and caps."""
    with open_farm() as farm:
        found = farm.tenants()
    table = plain_table("tenant", "weight", "jobs in flight", "paused")
    for tenant in found:
        cap = "" if tenant.max_in_flight is None else f"at most {tenant.max_in_flight}"
        table.add_row(tenant.name, f"{tenant.weight:g}", cap, "yes" if tenant.paused else "")
    show(table)


@click.command()
@click.argument("tenant")
@click.argument("jobs", metavar="JOBS|none")
def cap(tenant: str, jobs: str) -> None:
    """Set how many jobs of a tenant may be in flight, for each model.

    \b
    imagefarm cap alice 8
    imagefarm cap alice none
    """
    if jobs != "none" and not (jobs.isdecimal() and int(jobs)):
        raise click.BadParameter(f"{jobs!r} is neither a number from 1 nor 'none'", param_hint="JOBS")
    with open_farm() as farm:
        farm.change_tenant(tenant, max_in_flight=None if jobs == "none" else int(jobs))
    say(f"{tenant} may have {'any number of' if jobs == 'none' else jobs} jobs in flight")
