"""`watch`, `status`, `download`, `cancel`: what one does with batches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import click
from rich.text import Text

from imagefarm.client import Farm
from imagefarm.console import duration, interrupted, open_farm, plain_table, say, show
from imagefarm.following import fetch, follow, summarize
from imagefarm.records import DEFAULT_TEMPLATE, Batch
from shared.errors import FarmError, NotFound

#: some jobs of a watched batch did not succeed
EXIT_INCOMPLETE = 3

_STYLES = {"finished": "green", "rendering": "cyan", "canceled": "yellow", "canceling": "yellow", "paused": "yellow"}


def newest(farm: Farm) -> Batch:
    """The batch that was submitted last."""
    found = next(farm.batches(), None)
    if found is None:
        raise NotFound('there is no batch yet; submit one: imagefarm submit "a red circle"')
    return found


def watch_to_end(farm: Farm, batches: Sequence[Batch]) -> tuple[list[Batch], int]:
    """Watch, say how it ended; the ended batches and the exit code. Ctrl-C leaves the batches alone."""
    try:
        ended = follow(farm, batches)
    except KeyboardInterrupt:
        ids = " ".join(batch.id for batch in batches)
        say(f"\nno longer watching; the farm goes on. Again: imagefarm watch {ids}", "yellow")
        interrupted()
    for batch in ended:
        summarize(farm, batch)
    return ended, 0 if all(batch.succeeded == batch.job_count for batch in ended) else EXIT_INCOMPLETE


@click.command()
@click.argument("batch", nargs=-1)
@click.pass_context
def watch(ctx: click.Context, batch: tuple[str, ...]) -> None:
    """Show the progress of batches until they have ended.

    Without BATCH it is the newest one.

    Exit code 0: every image was rendered; 3: some were not. Ctrl-C stops the watching, not the batch.
    """
    with open_farm() as farm:
        batches = [farm.batch(id_) for id_ in batch] or [newest(farm)]
        _, code = watch_to_end(farm, batches)
    ctx.exit(code)


@click.command()
@click.argument("batch", required=False)
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="Most batches to list.")
def status(batch: str | None, limit: int) -> None:
    """Show how a batch stands, or list the newest ones."""
    with open_farm() as farm:
        if batch is None:
            _list(list(islice(farm.batches(), limit)))
        else:
            _detail(farm.batch(batch))


def _list(batches: Sequence[Batch]) -> None:
    if not batches:
        say('no batches yet; submit one: imagefarm submit "a red circle"')
        return
    table = plain_table("batch", "name", "model", "state", "done", "failed", "submitted")
    for batch in batches:
        table.add_row(
            batch.id,
            batch.name,
            batch.model,
            Text(batch.state, _STYLES.get(batch.state, "")),
            f"{batch.ended}/{batch.job_count}",
            Text(str(batch.failed), "red") if batch.failed else "",
            f"{batch.created_at.astimezone():%m-%d %H:%M}" if batch.created_at else "",
        )
    show(table)


def _detail(batch: Batch) -> None:
    table = plain_table("", "")
    table.show_header = False
    table.add_row("batch", batch.id)
    for name in ("name", "model", "priority"):
        table.add_row(name, getattr(batch, name))
    table.add_row("state", Text(batch.state, _STYLES.get(batch.state, "")))
    if batch.state_reason:
        table.add_row("waits", batch.state_reason)
    table.add_row("jobs", ", ".join(f"{count} {state}" for state, count in batch.counts.items() if count))
    for name in ("created_at", "started_at", "finished_at"):
        moment = getattr(batch, name)
        table.add_row(name.removesuffix("_at"), f"{moment.astimezone():%Y-%m-%d %H:%M:%S}" if moment else "")
    if batch.images_per_second:
        table.add_row("rate", f"{batch.images_per_second:.3g} images/s")
    if batch.eta_seconds is not None:
        table.add_row("left", duration(batch.eta_seconds))
    table.add_row("parameters", ", ".join(f"{name}={value}" for name, value in batch.parameters.items()))
    show(table)


@click.command()
@click.argument("batch")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--template", default=DEFAULT_TEMPLATE, show_default=True, help="Name of each file.")
@click.option("--parallel", type=click.IntRange(1, 32), default=8, show_default=True, help="Transfers at a time.")
@click.option("--overwrite", is_flag=True, help="Replace files that hold other pictures.")
def download(batch: str, folder: Path, template: str, parallel: int, overwrite: bool) -> None:
    """Fetch the pictures of a batch into a folder.

    \b
    imagefarm download batch_… pictures
    imagefarm download batch_… pictures --template "{prompt}-{seed}.{ext}"

    Fields of the template: index, seed, prompt, job, batch, model, ext. Every picture is checked against its SHA-256.
    Run it again to go on: what is complete is not fetched twice.
    """
    with open_farm() as farm:
        fetch(farm, farm.batch(batch), folder, template=template, parallel=parallel, overwrite=overwrite)


@click.command()
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
def cancel(ids: tuple[str, ...]) -> None:
    """Call off batches or jobs.

    What waits is not rendered, what is being rendered is stopped, what is done stays.
    """
    with open_farm() as farm:
        for id_ in ids:
            if not id_.startswith(("batch_", "job_")):
                raise FarmError(f"{id_!r} is not an id; ids look like batch_… or job_…")
            farm.cancel(id_)
            say(f"{id_} is called off: {_remains(farm, id_)}")


def _remains(farm: Farm, id_: str) -> str:
    if id_.startswith("job_"):
        return farm.job(id_).state
    batch = farm.batch(id_)
    done = f"{batch.succeeded} of {batch.job_count} images were done"
    return f"{done}, {batch.job_count - batch.ended} are being stopped" if batch.ended < batch.job_count else done
