"""A short chaos run within the suite; `make chaos` plays longer ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.faults import FAULTS, IN_JOBS, draw
from tests.chaos.load import plan
from tests.chaos.run import run


@pytest.mark.timeout(300)
def test_nothing_is_lost_doubled_missing_or_orphaned(tmp_path: Path) -> None:
    # of the seeds one whose faults are quick ones: no hang, no restart of everything
    outcome = run(300, 25, seed=268352, workers=3, image_seconds=0.05, logs=tmp_path)
    assert outcome.findings.differences == []
    assert outcome.line.startswith("reconciled: 300 jobs, ")
    assert outcome.line.endswith(" faults, 0 lost, 0 doubled, 0 missing, 0 orphans")
    assert outcome.done.total() >= 20, outcome.missed


def test_every_kind_of_fault_comes_before_any_comes_again() -> None:
    kinds = len(FAULTS) + len(IN_JOBS)
    drawn = draw(2 * kinds, seed=3)
    assert len(set(drawn[:kinds])) == len(set(drawn[kinds:])) == kinds
    assert drawn == draw(2 * kinds, seed=3) != draw(2 * kinds, seed=4)


def test_the_load_is_as_large_as_was_asked_and_brings_the_faults_of_jobs() -> None:
    faults = draw(50, seed=1)
    shares = plan(777, faults, seed=1, image_seconds=0.1)
    submissions = [submission for share in shares for submission in share]
    assert sum(submission.size for submission in submissions) == 777
    assert len({submission.key for submission in submissions}) == len(submissions)
    asked = [job["fault"] for each in submissions for job in each.body.get("jobs", ()) if "fault" in job]
    canceled = ["cancel" for each in submissions if each.cancel]
    assert sorted(asked + canceled) == sorted(f.removeprefix("job: ") for f in faults if f.startswith("job: "))


def test_too_few_jobs_for_the_faults_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 52 jobs"):
        plan(51, draw(25, seed=1), seed=1, image_seconds=0.1)
