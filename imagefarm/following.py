"""Shows batches on their way, and pictures on theirs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from imagefarm.client import Farm
from imagefarm.connection import FarmRequestError, FarmUnreachable
from imagefarm.console import duration, err, printable, say
from imagefarm.download import Downloaded
from imagefarm.records import Batch
from shared.states import State

_POLL_SECONDS = 0.4
#: a farm that is being restarted is worth waiting for
_OUTAGE_SECONDS = 120.0
#: seconds between two lines where the output is no terminal
_LINE_SECONDS = 10.0
_MAX_REASONS = 3


class _Facts(ProgressColumn):
    """Failures, rate and time left, as the farm reckons them."""

    def render(self, task: Task) -> Text:
        batch: Batch | None = task.fields.get("batch")
        return _facts(batch) if batch else Text()


def _facts(batch: Batch) -> Text:
    text = Text()
    if batch.failed:
        text.append(f"{batch.failed} failed  ", "red")
    if batch.canceled:
        text.append(f"{batch.canceled} canceled  ", "yellow")
    if batch.images_per_second:
        text.append(f"{batch.images_per_second:.3g} images/s  ", "cyan")
    if batch.eta_seconds is not None and not batch.done:
        text.append(f"{duration(batch.eta_seconds)} left", "dim")
    elif not batch.done and not batch.ended:
        text.append(batch.state_reason or batch.state, "yellow" if batch.state_reason else "dim")
    return text


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        _Facts(),
        console=err,
        disable=not err.is_terminal,
    )


def label(batch: Batch) -> str:
    """What a batch is called on the screen."""
    return printable(f"{batch.name} · {batch.model}" if batch.name else batch.model)


def follow(farm: Farm, batches: Sequence[Batch]) -> list[Batch]:
    """Show the batches until none has an open job; the batches as they ended."""
    latest = {batch.id: batch for batch in batches}
    said_at = time.monotonic()
    with _progress() as progress:
        bars = {
            batch.id: progress.add_task(label(batch), total=batch.job_count, batch=batch) for batch in latest.values()
        }
        while True:
            for id_, batch in latest.items():
                if not batch.done:
                    latest[id_] = batch = _with_end(_patiently(farm, id_))
                progress.update(bars[id_], completed=batch.ended, batch=batch)
            if all(batch.done for batch in latest.values()):
                return list(latest.values())
            if not err.is_terminal and time.monotonic() - said_at > _LINE_SECONDS:
                said_at = time.monotonic()
                for batch in latest.values():
                    say(f"{label(batch)}: {batch.ended}/{batch.job_count}  {_facts(batch).plain}")
            time.sleep(_POLL_SECONDS)


def _with_end(batch: Batch) -> Batch:
    """The farm notes the end of a batch a moment after its last job; to a person the moment of seeing it will do."""
    return replace(batch, finished_at=datetime.now(UTC)) if batch.done and not batch.finished_at else batch


def _patiently(farm: Farm, batch_id: str) -> Batch:
    deadline: float | None = None
    while True:
        try:
            return farm.batch(batch_id)
        except (FarmUnreachable, FarmRequestError) as error:
            if isinstance(error, FarmRequestError) and error.status < 500:
                raise
            now = time.monotonic()
            if deadline is None:
                say("the farm does not answer; still trying", "yellow")
            deadline = deadline or now + _OUTAGE_SECONDS
            if now > deadline:
                raise
            time.sleep(1.0)


def summarize(farm: Farm, batch: Batch) -> None:
    """Say how a batch ended, and why jobs failed."""
    took = ""
    seconds = seconds_taken(batch)
    if seconds is not None:
        took = f" in {duration(seconds)}"
        if seconds and batch.succeeded:
            took += f" ({batch.succeeded / seconds:.3g} images/s)"
    ends = [(batch.succeeded, "succeeded"), (batch.failed, "failed"), (batch.canceled, "canceled")]
    told = ", ".join(f"{count} {word}" for count, word in ends if count) or "nothing to do"
    good = batch.succeeded == batch.job_count
    say(f"{'✔' if good else '✘'} {label(batch)}: {told}{took}", "green" if good else "red")
    if batch.failed:
        _say_reasons(farm, batch)


def seconds_taken(batch: Batch) -> float | None:
    """From the first claim to the end, where there were both."""
    if batch.started_at is None or batch.finished_at is None:
        return None
    return max(0.0, (batch.finished_at - batch.started_at).total_seconds())


def _say_reasons(farm: Farm, batch: Batch) -> None:
    reasons: dict[str, str] = {}
    for number, job in enumerate(farm.jobs(batch, [State.FAILED])):
        if job.error:
            reasons.setdefault(str(job.error), job.id)
        if len(reasons) == _MAX_REASONS or number > 1000:
            break
    for reason, job_id in reasons.items():
        say(f"  {reason}  ({job_id})", "red")


def fetch(farm: Farm, batch: Batch, folder: Path, **options: Any) -> Downloaded:
    """Download with a progress bar, and say what was done."""
    with _progress() as progress:
        bar = progress.add_task("downloading", total=batch.succeeded)
        done = farm.download(
            batch,
            folder,
            on_progress=lambda count, total: progress.update(bar, completed=count, total=total),
            **options,
        )
    present = f", {done.present} were there already" if done.present else ""
    saved = "1 picture" if done.saved == 1 else f"{done.saved} pictures"
    say(f"✔ {saved} saved in {folder} ({_size(done.bytes)}){present}", "green")
    if not batch.done:
        say(f"{batch.job_count - batch.ended} are not rendered yet; run the same command again for the rest", "yellow")
    return done


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
