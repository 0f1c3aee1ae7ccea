"""Jobs for generators of generative adversarial networks."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from shared.errors import Fault
from shared.specs import Bounds, Limits, RenderSpec


class Spec(RenderSpec):
    """One sample of a GAN. The latent is drawn from the seed; size and channels are the network's own.

    The prompt is not read by the network; it may label the job.
    """

    PER_IMAGE: ClassVar[frozenset[str]] = RenderSpec.PER_IMAGE | {"class_index", "truncation_psi"}
    NEEDS_PROMPT: ClassVar[bool] = False

    class_index: int | None = Field(None, ge=0, description="Class to draw; needed by class-conditional models.")
    truncation_psi: float = Field(
        1.0, ge=-2, le=2, description="Pulls the latent toward the mean: 0 the mean itself, 1 untouched."
    )

    @classmethod
    def bounds(cls, limits: Limits) -> dict[str, Bounds]:
        classes = limits.num_classes
        return {
            **super().bounds(limits),
            "class_index": {"minimum": 0, "maximum": classes - 1} if classes else {"enum": []},
        }

    def faults(self, limits: Limits) -> list[Fault]:
        found = super().faults(limits)
        if limits.num_classes and self.class_index is None:
            found.append(Fault("/class_index", "missing", f"this model needs one, 0 to {limits.num_classes - 1}"))
        return found
