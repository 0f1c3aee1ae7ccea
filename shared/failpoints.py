"""Named places where a process can be made to break, for chaos runs; inert unless `IMAGEFARM_FAILPOINTS` names them.

`after_upload=kill:1/50,render_step=hang,seed=7`: one hit in fifty of the first, drawn from the seed, is a `kill -9`.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
from collections import Counter

from shared.errors import OutOfMemory

POINTS = (
    "after_claim", "render_step", "after_upload", "after_result", "mid_copy", "before_bell", "before_chore", "mid_fold",
)  # fmt: skip
ACTIONS = ("kill", "hang", "oom")

_armed: dict[str, tuple[str, int]] = {}
_seed = "0"
_hits: Counter[str] = Counter()


def parse(setting: str) -> tuple[dict[str, tuple[str, int]], str]:
    """The action of each named place with its "one in how many", and the seed. Raises `ValueError`."""
    given = dict(part.strip().partition("=")[::2] for part in setting.split(",") if part.strip())
    seed, armed = given.pop("seed", "0"), {}
    for point, value in given.items():
        action, _, odds = value.partition(":")
        among = (odds or "1/1").removeprefix("1/")
        if point not in POINTS or action not in ACTIONS or not among.isdigit() or int(among) < 1:
            raise ValueError(f"expected POINT=ACTION:1/N with a point of {POINTS} and an action of {ACTIONS}")
        armed[point] = (action, int(among))
    return armed, seed


def arm(setting: str) -> None:
    """Switch the named places on, and all others off."""
    global _armed, _seed
    _armed, _seed = parse(setting)


def hit(point: str) -> None:
    """Pass a place; one look unless armed. `kill` is SIGKILL; `oom` raises what an engine raises without memory."""
    if point not in _armed:
        return
    action, among = _armed[point]
    _hits[point] += 1
    if random.Random(f"{_seed} {point} {os.getpid()} {_hits[point]}").randrange(among):
        return
    logging.getLogger(__name__).critical("failpoint %s: %s", point, action)
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "hang":
        threading.Event().wait()
    raise OutOfMemory(f"failpoint {point}")
