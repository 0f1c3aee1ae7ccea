"""An engine without weights: draws a gradient from the seed, at a cost and with faults that the job names.

For tests, for load, and for trying a farm before the models are there.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence

from PIL import Image

from shared.catalogue import ModelEntry
from shared.errors import DeviceLost, OutOfMemory, Permanent, Transient
from shared.settings import Settings
from shared.specs import RenderSpec
from shared.specs.fake import Spec
from worker.backends import OnStep, Rendered


class Backend:
    """The fake engine."""

    def __init__(self, entry: ModelEntry, settings: Settings) -> None:
        self._entry = entry

    def load(self) -> None:
        """Nothing to bring into memory."""

    def render(self, specs: Sequence[RenderSpec], on_step: OnStep) -> list[Rendered]:
        jobs = [spec for spec in specs if isinstance(spec, Spec)]
        first = jobs[0]
        for job in jobs:
            _misbehave(job)
        seconds = first.step_seconds + len(jobs) * first.step_image_seconds
        for step in range(first.num_inference_steps):
            if seconds:
                time.sleep(seconds)
            on_step(step + 1, first.num_inference_steps)
        return [Rendered(draw(job.seed, job.width, job.height)) for job in jobs]

    def unload(self) -> None:
        """Nothing to give back."""

    def max_batch(self, spec: RenderSpec) -> int:
        return self._entry.max_batch


def draw(seed: int, width: int, height: int) -> Image.Image:
    """A smooth gradient between four colours that the seed names; RGB, `width` × `height`."""
    corners = Image.frombytes("RGB", (2, 2), random.Random(seed).randbytes(12))
    return corners.resize((width, height), Image.Resampling.BILINEAR)


def _misbehave(job: Spec) -> None:
    match job.fault:
        case "transient":
            raise Transient("this job asks for a transient fault")
        case "permanent":
            raise Permanent("this job asks for a permanent fault", code="asked_for")
        case "out_of_memory":
            raise OutOfMemory("this job asks to run out of memory")
        case "device_lost":
            raise DeviceLost("this job asks to lose the device")
        case "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            while True:
                time.sleep(1)
