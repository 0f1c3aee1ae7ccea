"""`python -m benchmarks [ROW…]`: measure rows, print a table, append to `benchmarks/results.json`."""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from rich.console import Console
from rich.table import Column, Table

from benchmarks.measure import Row, keep, machine
from benchmarks.rows import known_rows, measure


def show(measured: list[Row], console: Console) -> None:
    table = Table("row", "what", "value", "baseline", "ratio", Column("further", no_wrap=True), title=machine())
    for row in measured:
        further = "\n".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in row.extra.items()
        )
        table.add_row(
            row.id, row.title, f"{row.value:.4g} {row.unit}", f"{row.baseline:.4g}", f"{row.ratio:.2f}", further
        )
    console.print(table)


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", help=f"rows to measure: {', '.join(known_rows())}; all without"
    )
    parser.add_argument(
        "--held-seconds", type=float, default=60.0, help="claim: how long an old transaction stays open (60)"
    )
    given = parser.parse_args()
    options = {"claim": {"held_seconds": given.held_seconds}}
    wanted = [name for argument in given.rows for name in argument.split(",") if name]
    if unknown := sorted(set(wanted) - set(known_rows())):
        parser.error(f"no such row: {', '.join(unknown)}; known are {', '.join(known_rows())}")
    console = Console()
    measured = []
    # a fresh process for each row: what one loads or connects must not weigh on the next
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for name in wanted or known_rows():
            console.print(f"measuring {name} …")
            measured.append(pool.submit(measure, name, **options.get(name, {})).result())
    show(measured, console)
    keep(measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
