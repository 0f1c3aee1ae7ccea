"""The processes of a farm, one command each: `worker`, `keeper`, `api`; and `migrate`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NoReturn

import click

from imagefarm.children import python_environment
from imagefarm.commands.up import model_list
from imagefarm.console import say
from imagefarm.farm_files import database_settings, process_settings
from imagefarm.serving import (
    api_command,
    child_environment,
    choose_models,
    keeper_command,
    worker_command,
    worker_environment,
)
from shared import schema
from shared.catalogue import load_catalogue
from shared.database import open_engine


def _become(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Turn into another program: signals and exit codes are then its own."""
    os.execvpe(command[0], list(command), python_environment(environment))  # noqa: S606 - no shell is wanted


@click.command()
@click.option("--models", metavar="A,B", help="Models to serve.  [default: all that this machine can render]")
@click.option("--gpu", type=click.IntRange(0), metavar="N", help="The one GPU to use.")
@click.option("--name", help="Name in logs.  [default: from the GPU or the process]")
def worker(models: str | None, gpu: int | None, name: str | None) -> None:
    """Run a worker: it renders for the farm until stopped.

    \b
    imagefarm worker                              beside `imagefarm up`, or as the environment says
    imagefarm worker --gpu 1 --models demo-diffusion
    DATABASE_URL=… REDIS_URL=… STORAGE_URL=s3://… imagefarm worker

    Start one for each GPU, on as many machines as you like. SIGTERM or Ctrl-C finishes the running images first.
    """
    settings = process_settings()
    wanted = model_list(models) or settings.served_models
    chosen = choose_models(load_catalogue(settings.catalogue), settings, wanted)
    name = name or (f"gpu{gpu}" if gpu is not None else f"worker{os.getpid()}")
    say(f"worker {name} serves {', '.join(chosen)}", "dim")
    _become(worker_command(chosen, name), worker_environment(settings, chosen, gpu))


@click.command()
def keeper() -> None:
    """Run a keeper: it mends what crashes leave behind.

    It puts the jobs of dead workers back, rings lost bells and folds counters.

    Each farm needs one; any number may run, one of them leads.
    """
    _become(keeper_command(), child_environment(process_settings()))


@click.command()
@click.option("--listen", metavar="HOST:PORT", help="Address to listen on.  [default: IMAGEFARM_LISTEN]")
def api(listen: str | None) -> None:
    """Run the API server.

    \b
    imagefarm api --listen 0.0.0.0:8000
    """
    _become(api_command(), child_environment(process_settings(**({"listen": listen} if listen else {}))))


@click.command()
@click.option("--to", default="head", show_default=True, metavar="REVISION", help="Schema revision to reach.")
def migrate(to: str) -> None:
    """Bring the database to this version's schema.

    Needs DATABASE_URL only. Safe to run at any time, and by several machines at once.
    """
    engine = open_engine(database_settings(), "imagefarm migrate", pool_size=1)
    try:
        before = schema.current_revision(engine)
        after = schema.upgrade(engine, to)
    finally:
        engine.dispose()
    if before == after:
        older = f", which is newer than {to}; there is no way back by this command" if to not in (after, "head") else ""
        click.echo(f"the schema is at {after}{older or '; nothing to do'}")
    else:
        click.echo(f"the schema went from {before or 'empty'} to {after}")
