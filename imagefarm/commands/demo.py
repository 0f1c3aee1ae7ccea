"""`imagefarm demo`: everything in one go, from nothing to a sheet of pictures."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from imagefarm.client import Farm
from imagefarm.connection import read_client_file
from imagefarm.console import duration, say
from imagefarm.contact_sheet import Picture, Section, contact_sheet, save
from imagefarm.following import fetch, follow, seconds_taken, summarize
from imagefarm.local_farm import LocalFarm, Wanted
from imagefarm.prompt_files import parse
from imagefarm.records import Batch
from shared.errors import FarmError
from shared.settings import PROJECT_ROOT
from shared.states import State

DIFFUSION, GAN = "demo-diffusion", "demo-gan"
_PROMPTS = PROJECT_ROOT / "examples" / "prompts.csv"
_GAN_SEED = 20
#: what the GAN draws, by class_index
_CLASSES = ("circle", "square", "triangle", "star", "ring", "cross", "heart")
_COLUMNS = 7


@click.command()
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("imagefarm-demo"),
    show_default=True,
    help="Where everything goes.",
)
def demo(folder: Path) -> None:
    """See it all work, from nothing to a sheet of pictures.

    Starts a farm, renders with Stable Diffusion and with a GAN, makes a contact sheet and stops the farm.

    Needs nothing but this package with its worker extra; the two small models come with it.
    """
    if not _PROMPTS.is_file():
        raise FarmError(f"the demo's prompts are not here ({_PROMPTS}): run it from a checkout of the project")
    began = time.monotonic()
    say("starting a farm …", "dim")
    with _farm(folder / "farm-data") as farm:
        say(f"the farm is up after {duration(time.monotonic() - began)}: {farm.url}", "green")
        known = {model.name: model for model in farm.models()}
        rows = parse(_PROMPTS.read_bytes(), _PROMPTS.name, ".csv", lambda _: known[DIFFUSION].parameters)
        jobs = [{"prompt": row.prompt, **row.parameters} for row in rows]
        batches = follow(
            farm,
            [
                farm.submit(jobs=jobs, model=DIFFUSION, name="prompts.csv"),
                farm.submit(jobs=_gan_jobs(), model=GAN, name="all classes"),
            ],
        )
        for batch in batches:
            summarize(farm, batch)
        sections = [_section(farm, batch) for batch in batches]
        for batch in batches:
            fetch(farm, batch, folder / "images" / batch.id)
        sheet = contact_sheet("imagefarm demo", sections, columns=_COLUMNS)
        path = folder / "contact-sheet.png"
        save(sheet, path)
        say("stopping the farm …", "dim")
    say(f"done in {duration(time.monotonic() - began)}; the pictures are on", "green")
    click.echo(path)
    if any(batch.succeeded < batch.job_count for batch in batches):
        raise FarmError(f"some pictures were not rendered; the logs are in {folder / 'farm-data' / 'logs'}")


@contextmanager
def _farm(data: Path) -> Iterator[Farm]:
    """A farm for this block, on services of its own whatever the environment says."""
    wanted = Wanted(data, f"127.0.0.1:{_free_port()}", models=(DIFFUSION, GAN), self_contained=True)
    finished = threading.Event()
    with LocalFarm(wanted, lambda text: say(text, "yellow")) as local:
        tending = threading.Thread(target=local.tend_until, args=(finished,))
        tending.start()
        try:
            address = read_client_file(data)
            assert address is not None
            with Farm(address.url, address.api_key) as farm:
                yield farm
        finally:
            finished.set()
            tending.join()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _gan_jobs() -> list[dict[str, Any]]:
    """Every class of the GAN, once."""
    return [
        {"prompt": f"class {number}: {name}", "class_index": number, "seed": _GAN_SEED + number}
        for number, name in enumerate(_CLASSES)
    ]


def _section(farm: Farm, batch: Batch) -> Section:
    jobs = list(farm.jobs(batch, [State.SUCCEEDED]))
    pictures = [Picture(job.read(), job.prompt) for job in jobs]
    note = f"{batch.succeeded} of {batch.job_count} images"
    if jobs and jobs[0].image:
        note += f", {jobs[0].image.width}x{jobs[0].image.height} pixels"
    if steps := batch.parameters.get("num_inference_steps"):
        note += f", {steps} steps"
    if seconds := seconds_taken(batch):
        note += f", rendered in {duration(seconds)}"
    return Section(batch.model, note, pictures)
