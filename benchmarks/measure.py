"""How rows are measured and written: interleaved repeats, medians, CPU seconds of whole process trees."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from rich.progress import track

RESULTS = Path(__file__).parent / "results.json"
_PACKAGES = ("celery", "diffusers", "psycopg", "redis", "sqlalchemy", "torch", "transformers")


@dataclass(frozen=True)
class Row:
    """One line of the table. `ratio` compares `value` with `baseline` as the row's documentation says."""

    id: str
    title: str
    value: float
    unit: str
    baseline: float
    ratio: float
    #: every single measurement, by name
    samples: dict[str, list[float]]
    #: further figures
    extra: dict[str, float | str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The row as it is kept in `results.json`."""
        fields = asdict(self)
        extra = fields.pop("extra")
        return {
            **fields,
            **extra,
            "machine": machine(),
            "versions": versions(),
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
        }


def machine() -> str:
    """What the figures were measured on, in words."""
    gigabytes = round(psutil.virtual_memory().total / 2**30)
    return f"{_processor()}, {psutil.cpu_count()} cores, {gigabytes} GiB, {platform.system()}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def interleave(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Measure each side in turn, `repeats` times, so that a change of the machine's mood hits all alike."""
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for _ in track(range(repeats), description="  repeats", transient=True):
        for name, measure in sides.items():
            samples[name].append(measure())
    return samples


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that at least `percent` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def cpu_seconds(*pids: int) -> float:
    """CPU time (user and system) used so far by these processes and all their descendants."""
    total = 0.0
    for pid in pids:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
    return total


def resident_megabytes(pid: int) -> float:
    """The largest resident set among a process and its descendants, in MB."""
    root = psutil.Process(pid)
    return max(process.memory_info().rss for process in [root, *root.children(recursive=True)]) / 1e6


def keep(rows: Sequence[Row], results: Path = RESULTS) -> None:
    """Append rows to `results`."""
    old = json.loads(results.read_text()) if results.exists() else []
    results.write_text(json.dumps([*old, *(row.record() for row in rows)], indent=1) + "\n")
