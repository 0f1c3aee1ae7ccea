"""Failpoints: inert by default, seeded, and known by name to the code that passes them."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from shared import failpoints
from shared.errors import OutOfMemory, SettingsError
from shared.settings import PROJECT_ROOT, load_settings

URLS = {"database_url": "postgresql://h/d", "redis_url": "redis://h", "storage_url": "file:///x"}


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


def hits_until_it_breaks(most: int = 1000) -> int | None:
    for number in range(1, most + 1):
        try:
            failpoints.hit("render_step")
        except OutOfMemory:
            return number
    return None


def run(setting: str, wait: float) -> subprocess.Popen[str]:
    """A process that arms these failpoints and passes `after_upload`; killed if it is there after `wait` seconds."""
    script = f"from shared import failpoints as f; f.arm({setting!r}); f.hit('after_upload'); print('went on')"
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=PROJECT_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        process.wait(wait)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        process.args = "it hung"
    return process


def test_nothing_happens_unless_it_is_switched_on() -> None:
    assert load_settings(**URLS).failpoints == ""
    for point in failpoints.POINTS:
        failpoints.hit(point)
    failpoints.arm("after_upload=oom")
    failpoints.hit("render_step")


def test_kill_is_a_kill() -> None:
    with run("after_upload=kill", 30) as process:
        assert process.returncode == -signal.SIGKILL
        assert process.stderr is not None
        assert "failpoint after_upload: kill" in process.stderr.read()


def test_hang_never_returns() -> None:
    with run("after_upload=hang", 1.5) as process:
        assert process.args == "it hung"
        assert process.stdout is not None
        assert process.stdout.read() == ""


def test_the_odds_are_kept_and_drawn_from_the_seed() -> None:
    drawn = []
    for seed in range(40):
        failpoints.arm(f"render_step=oom:1/50,seed={seed}")
        drawn.append(hits_until_it_breaks())
    assert None not in drawn
    assert 15 < sum(filter(None, drawn)) / len(drawn) < 150
    assert len(set(drawn)) > 10


@pytest.mark.parametrize(
    "setting", ["after_lunch=kill", "after_upload=explode", "after_upload=kill:2/3", "after_upload"]
)
def test_a_slip_of_the_pen_is_refused(setting: str) -> None:
    with pytest.raises(SettingsError, match="IMAGEFARM_FAILPOINTS: expected POINT=ACTION"):
        load_settings(**URLS, failpoints=setting)


def test_every_point_is_passed_in_one_place_of_the_code() -> None:
    sources = [
        path.read_text() for folder in ("api", "shared", "worker") for path in (PROJECT_ROOT / folder).rglob("*.py")
    ]
    passed = [name for text in sources for name in re.findall(r'failpoints\.hit\("(\w+)"\)', text)]
    assert sorted(passed) == sorted(failpoints.POINTS)
