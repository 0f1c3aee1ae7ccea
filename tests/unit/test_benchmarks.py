"""The frame of the benchmark: rows are found, measured in turn, and kept with everything that the figures need."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import Row, interleave, keep, percentile
from benchmarks.rows import known_rows
from shared.settings import PROJECT_ROOT


def test_every_row_can_be_measured_and_is_explained() -> None:
    table = (PROJECT_ROOT / "benchmarks" / "README.md").read_text()
    for name in known_rows():
        module = importlib.import_module(f"benchmarks.rows.{name}")
        assert callable(module.measure)
        assert f"| `{name}` |" in table


def test_sides_are_measured_in_turn() -> None:
    order: list[str] = []
    sides = {name: lambda name=name: float(len(order)) if not order.append(name) else 0.0 for name in "ab"}
    samples = interleave(sides, 3)
    assert order == ["a", "b"] * 3
    assert samples == {"a": [1.0, 3.0, 5.0], "b": [2.0, 4.0, 6.0]}


def test_a_percentile_is_one_of_the_values() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert [percentile(values, percent) for percent in (0, 1, 50, 99, 100)] == [1.0, 1.0, 50.0, 99.0, 100.0]
    assert percentile([7.0], 99) == 7.0


def test_rows_are_appended_with_machine_versions_and_samples(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    row = Row("x", "title", 2.0, "images/s", 1.0, 2.0, {"farm": [2.0]}, {"vs_delay": 7.0})
    keep([row], results)
    keep([row], results)
    kept = json.loads(results.read_text())
    fields = {"id", "title", "value", "unit", "baseline", "ratio", "samples", "machine", "versions", "date", "vs_delay"}
    assert len(kept) == 2
    assert set(kept[0]) == fields


def test_an_unknown_row_is_refused_with_the_known_ones() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "a5,zz"], cwd=PROJECT_ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no such row: zz" in done.stderr
    assert "a5" in done.stderr
