"""`python -m tests.chaos`: break everything, then prove that nothing was lost, doubled, missing or orphaned."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from statistics import median
from types import FrameType

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.chaos.run import Outcome, run


@click.command(help=__doc__)
@click.option("--jobs", default=2000, show_default=True, help="Images to render.")
@click.option("--faults", default=100, show_default=True, help="Faults to inject; each wants at least two jobs.")
@click.option("--seed", default=1, show_default=True, help="Draws the faults, their order and the load.")
@click.option("--workers", default=4, show_default=True, help="Render workers.")
@click.option("--logs", type=click.Path(path_type=Path), help="Keep the logs of all processes in this folder.")
def main(jobs: int, faults: int, seed: int, workers: int, logs: Path | None) -> None:
    if jobs < 2 * (faults + 1):
        raise click.BadParameter(f"{faults} faults want at least {2 * (faults + 1)} jobs", param_hint="--jobs")
    signal.signal(signal.SIGTERM, _as_interrupt)
    console = Console()
    columns = (TextColumn("{task.description:>20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        ended, broken = progress.add_task("starting", total=jobs), progress.add_task("faults", total=faults)

        def show(what: str, jobs_ended: int, faults_done: int) -> None:
            progress.update(ended, description=what, completed=jobs_ended)
            progress.update(broken, completed=faults_done)

        outcome = run(jobs, faults, seed, workers=workers, logs=logs, on_progress=show)
    _tell(console, outcome)
    print(outcome.line)
    sys.exit(0 if outcome.findings.clean else 1)


def _as_interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _tell(console: Console, outcome: Outcome) -> None:
    faults = Table("fault", "done", "recovered after", title="Faults", title_justify="left")
    for kind in sorted(outcome.done | outcome.missed):
        times = sorted(outcome.recoveries.get(kind, []))
        spread = f"{median(times):.1f} s, at most {times[-1]:.1f} s" if times else ""
        missed = f" ({outcome.missed[kind]} not reached)" if outcome.missed[kind] else ""
        faults.add_row(kind, f"{outcome.done[kind]}{missed}", spread)
    console.print(faults)
    console.print(_figures(outcome))
    for difference in outcome.findings.differences[:200]:
        console.print(f"[red]{difference}", highlight=False)


def _figures(outcome: Outcome) -> Table:
    found, ledger = outcome.findings, outcome.ledger
    seconds = sorted(answer.seconds for answer in ledger.answers) or [0.0]
    refused = sum(answer.status >= 400 for answer in ledger.answers)
    figures = Table("what", "figure", title="Reckoning", title_justify="left")
    for name, figure in {
        "jobs": found.jobs,
        **{f"… {state}": number for state, number in sorted(found.states.items())},
        "… struck three times, blameless": len(found.struck_thrice),
        "faults": outcome.done.total(),
        "lost": len(found.lost),
        "doubled": len(found.doubled),
        "missing": len(found.missing),
        "orphans": len(found.orphans),
        "objects of given-up jobs, swept": outcome.swept,
        "other differences": len(found.other),
        "late results refused": outcome.late_results,
        "API answers": f"{len(seconds)}, {refused} of them problems, {ledger.cut_off} requests cut off",
        "API seconds": f"median {median(seconds):.3f}, 99 % {seconds[len(seconds) * 99 // 100]:.2f}, "
        f"most {seconds[-1]:.2f}",
        "submits answered from an earlier call": ledger.replayed,
        "seconds": round(outcome.seconds),
    }.items():
        figures.add_row(name, str(figure))
    return figures


if __name__ == "__main__":
    main()
