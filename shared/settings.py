"""The settings of a process: read once from the environment, validated, frozen. Nothing else reads the environment.

The three URLs keep their customary names (`DATABASE_URL`, `REDIS_URL`, `STORAGE_URL`), the S3 variables too; everything
else is `IMAGEFARM_<FIELD>`. Secrets are `SecretStr`, so neither a log nor a traceback shows them.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared import failpoints
from shared.errors import SettingsError

S = TypeVar("S", bound=BaseSettings)

PREFIX = "IMAGEFARM_"
PROJECT_ROOT = Path(__file__).resolve().parent.parent


def _url(schemes: tuple[str, ...], example: str) -> AfterValidator:
    def check(value: Any) -> Any:
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        if urlsplit(text).scheme not in schemes:
            raise ValueError(f"expected a URL such as {example}")
        try:
            _ = urlsplit(text).port
        except ValueError:  # its text would show a part of the password
            raise ValueError("the port is not a number up to 65535; write a / in the password as %2F") from None
        return value

    return AfterValidator(check)


def _listen(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError("expected HOST:PORT, such as 127.0.0.1:8000")
    return value


def _failpoints(value: str) -> str:
    failpoints.parse(value)
    return value


PostgresUrl = Annotated[
    SecretStr,
    _url(("postgresql", "postgres", "postgresql+psycopg"), "postgresql://user:password@host:5432/imagefarm"),
]
RedisUrl = Annotated[SecretStr, _url(("redis", "rediss", "unix", "redis+socket"), "redis://:password@host:6379/0")]
StorageUrl = Annotated[str, _url(("s3", "file"), "s3://bucket/prefix or file:///srv/imagefarm/objects")]
HttpUrl = Annotated[str, _url(("http", "https"), "https://host:port")]


class Settings(BaseSettings):
    """What one process of the farm needs to know. Immutable."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore", env_ignore_empty=True)

    #: the truth: PostgreSQL 15 or newer
    database_url: PostgresUrl = Field(validation_alias="DATABASE_URL")
    #: the bells: Redis 6.2 or newer with `maxmemory-policy noeviction`
    redis_url: RedisUrl = Field(validation_alias="REDIS_URL")
    #: where images go: `s3://bucket/prefix` or `file:///folder`
    storage_url: StorageUrl = Field(validation_alias="STORAGE_URL")

    #: endpoint of an S3-compatible server; empty means AWS
    s3_endpoint_url: HttpUrl | None = Field(None, validation_alias="S3_ENDPOINT_URL")
    #: endpoint that clients reach, where it differs from the one that workers reach; used in presigned links
    s3_public_endpoint_url: HttpUrl | None = Field(None, validation_alias="S3_PUBLIC_ENDPOINT_URL")
    s3_region: str = Field("us-east-1", validation_alias="S3_REGION")
    #: empty means the usual AWS credential chain (environment, profile, instance role)
    s3_access_key: SecretStr | None = Field(None, validation_alias="S3_ACCESS_KEY")
    s3_secret_key: SecretStr | None = Field(None, validation_alias="S3_SECRET_KEY")
    #: seconds that a link to an image stays valid
    link_seconds: int = Field(3600, ge=60, le=604_800)

    #: the model catalogue (TOML); model folders are relative to it
    catalogue: Path = PROJECT_ROOT / "models" / "catalogue.toml"
    #: let workers download pinned hub revisions; off means offline
    allow_downloads: bool = False
    openai_api_key: SecretStr | None = Field(None, validation_alias="OPENAI_API_KEY")
    cometapi_api_key: SecretStr | None = Field(None, validation_alias="COMETAPI_API_KEY")
    #: keys of further hosted vendors by the provider name of the catalogue, as JSON: `{"mygateway": "sk-…"}`
    provider_keys: dict[str, SecretStr] = Field(default_factory=dict)

    #: address of the API
    listen: Annotated[str, AfterValidator(_listen)] = "127.0.0.1:8000"
    #: threads of one API process; each held long-poll takes one
    api_threads: int = Field(64, ge=2, le=1024)
    #: largest request body in bytes
    max_body_bytes: int = Field(256 * 1024 * 1024, ge=1024)
    #: most jobs in one batch
    max_batch_jobs: int = Field(1_000_000, ge=1, le=1_000_000)

    #: how long a worker's claim lasts without a heartbeat, in seconds
    lease_seconds: float = Field(30.0, gt=0, le=3600)
    #: seconds between two heartbeats
    heartbeat_seconds: float = Field(10.0, gt=0)
    #: seconds between two looks for cancel requests of the jobs being rendered
    cancel_poll_seconds: float = Field(1.0, gt=0)
    #: seconds without a denoising step after which a worker counts as hung and exits
    stall_seconds: float = Field(300.0, gt=0)
    #: seconds that loading a model may take, downloads included, before the worker counts as hung
    load_seconds: float = Field(3600.0, gt=0)
    #: seconds between two rounds of the keeper
    keeper_seconds: float = Field(5.0, gt=0)
    #: seconds after which a priority class that nobody has come to gets a turn; 0 switches that off
    ageing_seconds: float = Field(1800.0, ge=0)
    #: seconds between two searches of the whole storage for images that no row knows
    sweep_seconds: float = Field(86_400.0, gt=0)
    #: images without a row are left alone for so long
    orphan_grace_seconds: float = Field(86_400.0, gt=0)
    #: seconds in which the waiting work should be done; decides how many workers are wanted
    scale_seconds: float = Field(300.0, gt=0)
    #: equal failures in a row after which a worker stops pulling a model for a while
    breaker_failures: int = Field(5, ge=1)
    #: seconds of the first such rest; each further one is twice as long, up to 16 times
    breaker_seconds: float = Field(60.0, gt=0)
    #: seconds that an idle worker keeps looking for rows before it waits for a bell
    linger_seconds: float = Field(60.0, ge=0)
    #: seconds between two looks of a lingering worker
    linger_poll_seconds: float = Field(0.25, gt=0)
    #: seconds that a worker told to stop may still use to finish its pass
    grace_seconds: float = Field(20.0, ge=0)
    #: encode-and-upload threads of one worker
    upload_threads: int = Field(4, ge=1, le=64)

    #: models that this worker serves, separated by commas; empty means all of the catalogue
    worker_models: str = ""
    #: seconds that a worker stays with one model while other models have work
    affinity_seconds: float = Field(30.0, ge=0)

    #: places where this process breaks on purpose, for chaos runs only (`shared/failpoints.py`)
    failpoints: Annotated[str, AfterValidator(_failpoints)] = ""

    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$")

    @model_validator(mode="after")
    def _figures_fit(self) -> Settings:
        if self.heartbeat_seconds * 2 > self.lease_seconds:
            raise ValueError("IMAGEFARM_HEARTBEAT_SECONDS must be at most half of IMAGEFARM_LEASE_SECONDS")
        if (self.s3_access_key is None) != (self.s3_secret_key is None):
            raise ValueError("S3_ACCESS_KEY and S3_SECRET_KEY go together: set both or neither")
        return self

    def provider_key(self, provider: str) -> SecretStr | None:
        """The API key for a hosted vendor, by its name in the catalogue."""
        own = {"openai": self.openai_api_key, "cometapi": self.cometapi_api_key}
        return self.provider_keys.get(provider) or own.get(provider)

    @property
    def served_models(self) -> list[str]:
        """The models that `worker_models` names."""
        return [name.strip() for name in self.worker_models.split(",") if name.strip()]

    @property
    def listen_address(self) -> tuple[str, int]:
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)


class ClientSettings(BaseSettings):
    """What the client and the command line need: where the farm is, and a key."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore", env_ignore_empty=True)

    #: base URL of the farm's API
    url: HttpUrl | None = None
    api_key: SecretStr | None = None
    #: folder of a farm started by `imagefarm up`; its address and key are found there
    data: Path = Path("farm-data")


def variable_of(settings_class: type[BaseSettings], field: str) -> str:
    """The environment variable that sets `field`."""
    alias = settings_class.model_fields[field].validation_alias
    return str(alias) if alias else f"{PREFIX}{field.upper()}"


def variable(name: str) -> str | None:
    """What the environment says of a variable before, or without, the settings; an empty one counts as unset."""
    return os.environ.get(name) or None


def _reject_typos(environ: Mapping[str, str]) -> None:
    known = {variable_of(cls, field) for cls in (Settings, ClientSettings) for field in cls.model_fields}
    for name in environ:
        if name.startswith(PREFIX) and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise SettingsError(f"{name}: there is no such setting{hint}")


def _load(settings_class: type[S], overrides: dict[str, Any]) -> S:
    _reject_typos(os.environ)
    aliased = {name: field.validation_alias for name, field in settings_class.model_fields.items()}
    named: dict[str, Any] = {str(aliased.get(name) or name): value for name, value in overrides.items()}
    try:
        return settings_class(**named)
    except ValidationError as error:
        lines = []
        for fault in error.errors(include_input=False, include_context=False, include_url=False):
            where = str(fault["loc"][0]) if fault["loc"] else ""
            variable = where if where.isupper() else variable_of(settings_class, where) if where else "settings"
            reason = "is not set" if fault["type"] == "missing" else fault["msg"].removeprefix("Value error, ")
            if fault["type"] == "missing":
                reason += f"; expected a URL such as {_EXAMPLES[variable]}" if variable in _EXAMPLES else ""
            lines.append(f"{variable}: {reason}")
        raise SettingsError("\n".join(lines)) from None


_EXAMPLES = {
    "DATABASE_URL": "postgresql://user:password@host:5432/imagefarm",
    "REDIS_URL": "redis://host:6379/0",
    "STORAGE_URL": "s3://bucket/prefix or file:///srv/imagefarm/objects",
}


def load_settings(**overrides: Any) -> Settings:
    """Settings from the environment; keyword arguments win. Raises `SettingsError`: one line for each variable."""
    return _load(Settings, overrides)


def load_client_settings(**overrides: Any) -> ClientSettings:
    """Client settings from the environment; keyword arguments win. Raises `SettingsError`."""
    return _load(ClientSettings, overrides)


def environment_of(settings: Settings) -> dict[str, str]:
    """The environment that makes a child process load these same settings (secrets in clear)."""
    values: dict[str, str] = {}
    for field in settings.model_fields_set:
        value = getattr(settings, field)
        if isinstance(value, dict):
            value = json.dumps({name: secret.get_secret_value() for name, secret in value.items()})
        elif isinstance(value, SecretStr):
            value = value.get_secret_value()
        if value is not None:
            values[variable_of(Settings, field)] = str(value)
    return values
