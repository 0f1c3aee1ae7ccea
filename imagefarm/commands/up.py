"""`imagefarm up`: a whole farm on this machine."""

from __future__ import annotations

import shlex
import signal
import threading
import time
from pathlib import Path

import click
from rich.text import Text

from imagefarm.client import Farm
from imagefarm.connection import read_client_file
from imagefarm.console import err, interrupted, say
from imagefarm.local_farm import LocalFarm, Wanted
from imagefarm.serving import gpu_count
from shared.errors import FarmError

DEFAULT_DATA = Path("farm-data")


def model_list(value: str | None) -> list[str]:
    """`a,b` as a list."""
    return [name.strip() for name in (value or "").split(",") if name.strip()]


@click.command()
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_DATA,
    envvar="IMAGEFARM_DATA",
    show_default=True,
    help="Folder of this farm; everything it keeps is in there.",
)
@click.option("--listen", metavar="HOST:PORT", help="Address of the API.  [default: 127.0.0.1:8000]")
@click.option("--workers", type=click.IntRange(0, 64), default=1, show_default=True, help="Workers; each takes a GPU.")
@click.option("--models", metavar="A,B", help="Models to serve.  [default: all that this machine can render]")
def up(data: Path, listen: str | None, workers: int, models: str | None) -> None:
    """Start a whole farm on this machine.

    \b
    imagefarm up                                  everything in ./farm-data
    imagefarm up --workers 4                      four workers, on four GPUs
    imagefarm up --models demo-gan --listen 127.0.0.1:9000
    DATABASE_URL=… REDIS_URL=… STORAGE_URL=s3://… imagefarm up

    An API, a keeper and workers. PostgreSQL and Redis are embedded unless DATABASE_URL or REDIS_URL name others.
    Ctrl-C stops everything in order; starting again goes on where it stopped.
    """
    stop, hurry = threading.Event(), threading.Event()
    _on_signals(stop, hurry)
    began = time.monotonic()
    say("starting the farm …", "dim")
    try:
        with LocalFarm(Wanted(data, listen, workers, model_list(models)), say, stop, hurry) as farm:
            _banner(farm, data, workers, time.monotonic() - began)
            announcer = threading.Thread(target=_announce_workers, args=(data, workers, stop), daemon=True)
            announcer.start()
            farm.tend_until(stop)
            say("stopping: running images are finished first (Ctrl-C again: at once)", "dim")
        say("the farm has stopped; `imagefarm up` goes on where it was")
    except (FarmError, KeyboardInterrupt):
        if stop.is_set():  # a Ctrl-C during the start also ends what was being started
            interrupted()
        raise


def _on_signals(stop: threading.Event, hurry: threading.Event) -> None:
    def handle(*_: object) -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup a hang-up stays ignored
            signal.signal(number, handle)


def _banner(farm: LocalFarm, data: Path, workers: int, seconds: float) -> None:
    text = Text()
    text.append("\n  imagefarm is up", "bold green")
    text.append(f" after {seconds:.1f} s\n\n")
    facts = {
        "address": farm.url,
        "models": ", ".join(farm.models),
        "data": f"{data.resolve()} (logs in {data / 'logs'})",
        "API key": f"in {data / 'client.json'}, where the commands and Farm() find it",
    }
    for label, value in facts.items():
        text.append(f"  {label:<9}", "bold")
        text.append(f"{value}\n")
    text.append("\n  In another terminal:\n", "bold")
    if data.resolve() != DEFAULT_DATA.resolve():
        text.append(f"    export IMAGEFARM_DATA={shlex.quote(str(data.resolve()))}\n")
    example = "a red circle on a white background" if "demo-diffusion" in farm.models else "my first prompt"
    text.append(f'    imagefarm submit "{example}" -n 4 --watch --download pictures\n')
    text.append("    imagefarm models | workers | status | doctor\n\n")
    text.append("  Ctrl-C stops the farm.\n", "dim")
    err.print(text, soft_wrap=True)
    if farm.open_to_network:
        say("other machines can reach this address; every call needs a key (`imagefarm key create`)", "yellow")
    if gpu_count() > max(workers, 1):
        say(f"this machine has {gpu_count()} GPUs: --workers {gpu_count()} uses them all", "yellow")


def _announce_workers(data: Path, workers: int, stop: threading.Event) -> None:
    """Say when the workers are ready: loading an engine takes a while."""
    address = read_client_file(data)
    if address is None or not workers:
        return
    seen: set[str] = set()
    with Farm(address.url, address.api_key) as farm:
        while not stop.wait(0.5) and len(seen) < workers:
            try:
                alive = {worker.id: worker for worker in farm.workers() if worker.alive}
            except FarmError:
                continue
            for name in alive.keys() - seen:
                say(f"worker {name} is ready for {', '.join(alive[name].models)}", "green")
            seen |= alive.keys()
