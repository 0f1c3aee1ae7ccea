"""Jobs for hosted DALL·E-class models behind the OpenAI Images API."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from shared.specs import Bounds, Limits, RenderSpec


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

    @classmethod
    def bounds(cls, limits: Limits) -> dict[str, Bounds]:
        chosen = {name: {"enum": values} for name, values in limits.choices.items() if name in cls.model_fields}
        return {**super().bounds(limits), **chosen}
