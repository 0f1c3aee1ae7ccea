"""The model catalogue: which models exist, which backend renders them, where the weights are, what they can do.

A model is a name in a TOML file, never a path from a request.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from shared.errors import CatalogueError, Fault, InvalidInput, UnknownModel
from shared.faults import faults_of
from shared.specs import Limits, RenderSpec, accepted_fields, spec_class

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def _full_commit(value: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{40}", value):
        raise ValueError("must be a full 40-digit commit, so that the weights can never change underneath")
    return value


class HubSource(BaseModel):
    """Weights on the Hugging Face hub, pinned to one commit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    revision: Annotated[str, AfterValidator(_full_commit)]


class HostedSource(BaseModel):
    """A vendor's or gateway's OpenAI-compatible endpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: selects the API key: `OPENAI_API_KEY`, `COMETAPI_API_KEY` or an entry of `IMAGEFARM_PROVIDER_KEYS`
    provider: str
    base_url: str = Field(pattern=r"^https?://")
    #: the vendor's own name of the model
    model: str
    #: how the vendor is asked for bytes: GPT image models always answer base64 and refuse the field
    response_format: Literal["b64_json", "url"] | None = None
    timeout_seconds: float = Field(180.0, gt=0)
    #: largest answer that is read, in bytes
    max_bytes: int = Field(64 * 1024 * 1024, gt=0)


class ModelEntry(BaseModel):
    """One model of the catalogue. Immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    backend: str
    description: str = ""
    #: exactly one of these three says where the model comes from; `fake` needs none
    folder: Path | None = None
    hub: HubSource | None = None
    hosted: HostedSource | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    variant: str | None = None
    #: most images of one forward pass
    max_batch: int = Field(8, ge=1, le=256)
    defaults: dict[str, Any] = Field(default_factory=dict)
    limits: Limits = Field(default_factory=Limits)

    _accepted: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="after")
    def _complete(self) -> ModelEntry:
        accepted = list(spec_class(self.backend).model_fields)
        sources = [s for s in (self.folder, self.hub, self.hosted) if s is not None]
        if len(sources) != (0 if self.backend == "fake" else 1):
            raise ValueError("needs exactly one of folder, hub, hosted")
        self._accepted.extend(accepted)
        return self

    @property
    def revision(self) -> str:
        """What pins the weights: the hub commit, or the vendor's name of the model."""
        return self.hub.revision if self.hub else self.hosted.model if self.hosted else "local"

    def parameters(self) -> dict[str, dict[str, Any]]:
        """JSON schema of each parameter that jobs of this model accept, with this model's ranges and defaults."""
        found = accepted_fields(self.backend, self.limits)
        for name in self.defaults.keys() & found.keys():
            found[name]["default"] = self.defaults[name]
        return found

    def resolve(self, parameters: Mapping[str, Any], pointer: str = "") -> RenderSpec:
        """The full spec of one job: the model's defaults under `parameters`.

        Raises `InvalidInput` with a JSON pointer (below `pointer`) for each wrong field.
        """
        try:
            spec = spec_class(self.backend).model_validate({**self.defaults, **parameters})
        except ValidationError as error:
            raise InvalidInput(faults_of(error, self._accepted, of=self.name, base=pointer)) from None
        found = spec.faults(self.limits)
        if not spec.TAKES_SEED and "seed" in parameters:
            found.append(Fault("/seed", "not-accepted", "this model draws its own seeds; leave it out"))
        if found:
            raise InvalidInput([Fault(pointer + f.pointer, f.code, f.detail) for f in found])
        return spec


class Catalogue(Mapping[str, ModelEntry]):
    """All models by name."""

    def __init__(self, entries: Mapping[str, ModelEntry]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> ModelEntry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, name: str, pointer: str = "/model") -> ModelEntry:
        """The model of this name. Raises `UnknownModel` with the nearest names."""
        if name in self._entries:
            return self._entries[name]
        close = difflib.get_close_matches(name, self._entries, n=3) or list(self._entries)
        raise UnknownModel([Fault(pointer, "unknown-model", f"there is no such model here; try {', '.join(close)}")])


def load_catalogue(path: Path) -> Catalogue:
    """Read and check a catalogue file. Raises `CatalogueError` that names the file, the model and the field."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CatalogueError(f"{path}: no such file; set IMAGEFARM_CATALOGUE to a catalogue file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CatalogueError(f"{path}: cannot be read: {error}") from None
    models = raw.get("models", {})
    if not isinstance(models, dict) or not all(isinstance(table, dict) for table in models.values()):
        raise CatalogueError(f"{path}: every model is a table [models.NAME]")
    if unknown := set(raw) - {"models"}:
        raise CatalogueError(f"{path}: unknown table {sorted(unknown)[0]!r}; every model is a table [models.NAME]")
    entries = {}
    for name, table in models.items():
        if not NAME.fullmatch(name):
            raise CatalogueError(f"{path}: {name!r} is not a model name; use a-z, 0-9, '.', '_' and '-'")
        try:
            if "name" in table:
                raise CatalogueError("its name stands in [models.NAME]; leave the field out")
            entry = ModelEntry(name=name, **table)
            if entry.folder is not None:
                entry = entry.model_copy(update={"folder": (path.parent / entry.folder.expanduser()).resolve()})
            sample = {"class_index": 0} if entry.limits.num_classes else {}
            entry.resolve({"prompt": "sample", **sample}, pointer="/defaults")
        except (ValidationError, CatalogueError, InvalidInput) as error:
            reason = error.detail if not isinstance(error, ValidationError) else "; ".join(
                f"{'.'.join(map(str, f['loc'])) or 'entry'}: {f['msg'].removeprefix('Value error, ')}"
                for f in error.errors(include_url=False)
            )  # fmt: skip
            raise CatalogueError(f"{path}: model {name}: {reason}") from None
        entries[name] = entry
    if not entries:
        raise CatalogueError(f"{path}: holds no models")
    return Catalogue(entries)
