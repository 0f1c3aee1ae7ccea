"""Jobs for hosted DALL·E-class models behind the OpenAI Images API."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from shared.errors import Fault
from shared.specs import Limits, RenderSpec


class Spec(RenderSpec):
    """One image of a hosted model. Which values a model takes is written in its catalogue entry (`limits.choices`)."""

    TAKES_SEED: ClassVar[bool] = False

    size: str | None = Field(
        None, pattern=r"^(auto|[1-9]\d{1,4}x[1-9]\d{1,4})$", description="`auto` or WIDTHxHEIGHT; the vendor's default."
    )
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = None
    background: Literal["auto", "transparent", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    style: Literal["vivid", "natural"] | None = None

    def faults(self, limits: Limits) -> list[Fault]:
        found = super().faults(limits)
        for field in ("size", "quality", "background", "moderation", "style"):
            value, allowed = getattr(self, field), limits.choices.get(field)
            if value is not None and allowed is not None and value not in allowed:
                found.append(Fault(f"/{field}", "not-accepted", f"this model takes {', '.join(allowed) or 'none'}"))
        return found
