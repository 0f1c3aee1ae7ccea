"""Jobs for diffusion pipelines (diffusers): text to image."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from shared.errors import Fault
from shared.specs import Bounds, Limits, RenderSpec, Text, area_faults, size_bounds

#: schedulers by the field's customary names; `worker.backends.stable_diffusion` maps them to diffusers classes
Scheduler = Literal[
    "ddim", "ddpm", "deis", "dpm2", "dpm2_a", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "euler", "euler_a",
    "flow_euler", "heun", "lcm", "pndm", "tcd", "unipc",
]  # fmt: skip


class Spec(RenderSpec):
    """One image of a Stable-Diffusion-class model."""

    PER_IMAGE: ClassVar[frozenset[str]] = RenderSpec.PER_IMAGE | {"negative_prompt"}

    negative_prompt: Text = Field("", description="What the image should not show; needs guidance_scale above 1.")
    width: int = Field(512, ge=8, le=16384, description="Pixels; a multiple of the model's grid.")
    height: int = Field(512, ge=8, le=16384, description="Pixels; a multiple of the model's grid.")
    num_inference_steps: int = Field(30, ge=1, le=1000, description="Denoising steps.")
    guidance_scale: float = Field(7.5, ge=0, le=50, description="Classifier-free guidance; 1 or less switches it off.")
    scheduler: Scheduler | None = Field(None, description="Sampler; the model's own where none is given.")

    @property
    def work(self) -> float:
        return self.width * self.height / 1e6 * self.num_inference_steps

    @classmethod
    def bounds(cls, limits: Limits) -> dict[str, Bounds]:
        return {
            **super().bounds(limits),
            **size_bounds(limits),
            "negative_prompt": {"maxLength": limits.max_prompt},
            "num_inference_steps": {"maximum": limits.max_steps},
        }

    def faults(self, limits: Limits) -> list[Fault]:
        return super().faults(limits) + area_faults(self.width, self.height, limits)
