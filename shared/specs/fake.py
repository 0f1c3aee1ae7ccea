"""Jobs for the fake engine: pictures drawn from the seed, at a cost and with faults that the job names."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from shared.errors import Fault
from shared.specs import Bounds, Limits, RenderSpec, area_faults, size_bounds


class Spec(RenderSpec):
    """One drawn pattern. A pass of B images takes `num_inference_steps × (step_seconds + B × step_image_seconds)`."""

    NEEDS_PROMPT: ClassVar[bool] = False
    PER_IMAGE: ClassVar[frozenset[str]] = RenderSpec.PER_IMAGE | {"fault"}

    width: int = Field(64, ge=1, le=4096)
    height: int = Field(64, ge=1, le=4096)
    num_inference_steps: int = Field(1, ge=1, le=1000)
    step_seconds: float = Field(0.0, ge=0, le=60, description="Seconds of each step, whatever the batch.")
    step_image_seconds: float = Field(0.0, ge=0, le=60, description="Seconds of each step for every image of the pass.")
    fault: Literal["none", "transient", "permanent", "out_of_memory", "device_lost", "crash", "hang"] = Field(
        "none", description="What goes wrong when this job is rendered."
    )

    @property
    def work(self) -> float:
        return self.num_inference_steps * max(self.step_seconds + self.step_image_seconds, 0.001)

    @classmethod
    def bounds(cls, limits: Limits) -> dict[str, Bounds]:
        return {**super().bounds(limits), **size_bounds(limits)}

    def faults(self, limits: Limits) -> list[Fault]:
        return super().faults(limits) + area_faults(self.width, self.height, limits)
