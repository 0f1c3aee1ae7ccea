"""What a job asks for: one pydantic model for each backend, and the lookup by backend name.

A spec holds everything that decides the pixels of ONE image. `shared/specs/<backend>.py` holds `Spec`; adding a kind of
job is adding a file. Specs import pydantic and the standard library only, so the API validates without torch and
without a living worker.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from shared.errors import CatalogueError, Fault

MAX_PROMPT = 32_000
MAX_SEED = 2**63 - 1


def text_fault(text: str) -> str | None:
    """Why `text` cannot be stored or rendered, or None."""
    if "\x00" in text:
        return "must not contain NUL characters"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return "must be valid Unicode (it holds a lone surrogate)"
    return None


def _storable(text: str) -> str:
    if fault := text_fault(text):
        raise PydanticCustomError("invalid_text", "{reason}", {"reason": fault})
    return text


#: part of a JSON schema: minimum and maximum, multipleOf, maxLength, enum
Bounds = Mapping[str, Any]
#: text that PostgreSQL can store and a tokenizer can read
StorableText = Annotated[str, AfterValidator(_storable)]
#: … and that is no longer than any prompt
Text = Annotated[StorableText, Field(max_length=MAX_PROMPT)]


class Limits(BaseModel):
    """What a model can do, from the catalogue. Sizes in pixels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size_multiple: int = Field(8, ge=1)
    min_size: int = Field(64, ge=1)
    max_size: int = Field(2048, ge=1)
    max_pixels: int = Field(2048 * 2048, ge=1)
    max_steps: int = Field(150, ge=1)
    max_prompt: int = Field(MAX_PROMPT, ge=1, le=MAX_PROMPT)
    num_classes: int | None = Field(None, ge=1)
    #: values that a hosted model takes, by field: `{size = ["auto", "1024x1024"], quality = ["low"]}`
    choices: dict[str, list[str]] = Field(default_factory=dict)


class RenderSpec(BaseModel):
    """What every kind of job has: a prompt, a seed, and how the picture is encoded."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=False)

    #: fields that may differ between the images of one forward pass; all others are part of the batch key
    PER_IMAGE: ClassVar[frozenset[str]] = frozenset(
        {"prompt", "seed", "output_format", "output_quality", "output_metadata"}
    )
    #: whether the engine is steered by a seed at all
    TAKES_SEED: ClassVar[bool] = True
    #: whether an empty prompt makes sense
    NEEDS_PROMPT: ClassVar[bool] = True

    prompt: Text = ""
    seed: int = Field(0, ge=0, le=MAX_SEED, description="Seed of this image; drawn at random where none is given.")
    output_format: Literal["png", "webp", "jpeg"] = Field("png", description="Encoding of the stored image.")
    output_quality: int = Field(95, ge=1, le=100, description="Quality of JPEG and WebP; PNG is lossless.")
    output_metadata: Literal["full", "none"] = Field(
        "full", description="Whether the parameters are embedded in the image file."
    )

    @property
    def work(self) -> float:
        """Relative effort of this image, used for fairness: megapixels × steps, or 1 for a call."""
        return 1.0

    @classmethod
    def bounds(cls, limits: Limits) -> dict[str, Bounds]:
        """What a model of these limits takes of a field, where that is less than the field allows."""
        return {"prompt": {"maxLength": limits.max_prompt}}

    def faults(self, limits: Limits) -> list[Fault]:
        """What is wrong with this spec for a model of these limits; pointers are relative to the spec."""
        found = [
            fault
            for name, bounds in self.bounds(limits).items()
            for fault in _faults(name, getattr(self, name), bounds)
        ]
        if self.NEEDS_PROMPT and not self.prompt.strip():
            found.append(Fault("/prompt", "empty", "must not be empty"))
        return found

    def batch_key(self, model: str, revision: str) -> int:
        """Signed 64-bit hash of all that must be equal for two jobs to share one forward pass."""
        shared = self.model_dump(exclude=set(self.PER_IMAGE), mode="json")
        canonical = json.dumps([model, revision, shared], sort_keys=True, separators=(",", ":"))
        return int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:8], signed=True)


def _faults(name: str, value: Any, bounds: Bounds) -> Iterator[Fault]:
    """What is wrong with the value of a field within these bounds; None is a value that was not given."""
    if value is None:
        return
    if "maxLength" in bounds and len(value) > bounds["maxLength"]:
        yield Fault(f"/{name}", "too-long", f"must have at most {bounds['maxLength']} characters")
    if "enum" in bounds and value not in bounds["enum"]:
        takes = f"takes {', '.join(bounds['enum'])}" if bounds["enum"] else "does not take this parameter"
        yield Fault(f"/{name}", "not-accepted", f"this model {takes}")
    if (grid := bounds.get("multipleOf")) and value % grid:
        below = max(bounds["minimum"], value // grid * grid)
        yield Fault(f"/{name}", "off-grid", f"must be a multiple of {grid}; {below} or {below + grid} would do")
    low, high = bounds.get("minimum"), bounds.get("maximum")
    if (low is not None and value < low) or (high is not None and value > high):
        span = f"at most {high}" if low is None else f"from {low} to {high}"
        yield Fault(f"/{name}", "out-of-range", f"must be {span}")


def size_bounds(limits: Limits) -> dict[str, Bounds]:
    """Bounds of the sides of an image for a model that draws on a grid."""
    side = {"minimum": limits.min_size, "maximum": limits.max_size, "multipleOf": limits.size_multiple}
    return {"width": side, "height": side}


def area_faults(width: int, height: int, limits: Limits) -> list[Fault]:
    """The fault of an image whose sides are right but which is too large as a whole."""
    if max(width, height) > limits.max_size or width * height <= limits.max_pixels:
        return []
    return [Fault("/width", "too-large", f"width × height must be at most {limits.max_pixels} pixels")]


def backends() -> list[str]:
    """The backends that have a spec, from the files in this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


@cache
def spec_class(backend: str) -> type[RenderSpec]:
    """The spec of a backend. Raises `CatalogueError` where there is none."""
    if backend not in backends():
        raise CatalogueError(f"backend {backend!r} is unknown; known are {', '.join(backends())}")
    found: type[RenderSpec] = importlib.import_module(f"shared.specs.{backend}").Spec
    return found


def accepted_fields(backend: str, limits: Limits) -> dict[str, dict[str, Any]]:
    """JSON schema of each parameter that jobs for a model of this backend and these limits accept."""
    spec = spec_class(backend)
    bounds = spec.bounds(limits)
    found = {}
    for name, schema in spec.model_json_schema()["properties"].items():
        if bounds.get(name, {}).get("enum") == [] or (name == "seed" and not spec.TAKES_SEED):
            continue
        found[name] = _narrowed(schema, bounds.get(name, {}))
    # what stands there is no default: a seed that is not given is drawn
    found.get("seed", {}).pop("default", None)
    return found


def _narrowed(schema: Mapping[str, Any], bounds: Bounds) -> dict[str, Any]:
    """A field's schema within bounds; where it may be null, they are those of its other form."""
    if "anyOf" in schema:
        forms = [form if form["type"] == "null" else _narrowed(form, bounds) for form in schema["anyOf"]]
        return {**schema, "anyOf": forms}
    tighter = {"minimum": max, "maximum": min, "maxLength": min}
    found = {**schema, **bounds}
    for word in tighter.keys() & schema.keys() & bounds.keys():
        found[word] = tighter[word](schema[word], bounds[word])
    if "enum" in schema and "enum" in bounds:
        found["enum"] = [value for value in schema["enum"] if value in bounds["enum"]]
    return found
