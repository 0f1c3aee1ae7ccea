"""Every error that imagefarm raises on purpose.

FarmError
├── SettingsError          a variable is missing or wrong (names it)
├── CatalogueError         the model catalogue is wrong (names the model and the field)
├── InvalidInput           a request that can never be right; carries one `Fault` per field
│   └── UnknownModel
├── Unauthenticated        no API key, or one that is not (or no longer) known
├── Forbidden              a known key that may not do this
├── NotFound               no such thing for this tenant
├── Conflict               right in itself, but not in the present state
│   ├── InProgress            an equal request is being handled right now
│   └── NotReady              there is no image (yet)
├── Throttled              this tenant asks for too much at once
├── Unavailable            a part of the farm is out of reach; try again later
├── Lost                   the lease is gone: somebody else owns the job now
├── StorageError
│   ├── StorageUnavailable    may pass by itself
│   ├── StorageMisconfigured  bucket, keys or folder are wrong: an operator must act
│   └── ObjectMissing
├── LinkRefused            a signed link to a stored file was altered
│   └── LinkExpired           … or is too old
├── RenderError            how an attempt ended; `outcome` selects the policy
│   ├── Transient          (retry_after)
│   ├── OutOfMemory
│   ├── DeviceLost         the process must end
│   ├── Permanent          (code)
│   └── OverBudget
└── Stopped                raised by `on_step` to leave a running pass
    ├── Canceled          nobody wants these images any more
    └── Interrupted        the worker must stop now

`code` is stable and is what API clients and dashboards test for. Only `api.problems` knows HTTP status codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shared.states import Outcome


@dataclass(frozen=True)
class Fault:
    """One wrong field of a request: where (JSON pointer), what kind, and what would be right."""

    pointer: str
    code: str
    detail: str


class FarmError(Exception):
    """Something went wrong in the farm."""

    code: ClassVar[str] = "farm-error"

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail or (self.__doc__ or self.code).strip().splitlines()[0])

    @property
    def detail(self) -> str:
        return str(self.args[0])


class SettingsError(FarmError):
    """The settings are not complete or not right."""

    code = "settings"


class CatalogueError(FarmError):
    """The model catalogue is not right."""

    code = "catalogue"


class InvalidInput(FarmError):
    """The request is not valid."""

    code = "invalid"

    def __init__(self, faults: list[Fault], detail: str | None = None) -> None:
        self.faults = faults
        super().__init__(detail or "; ".join(f"{f.pointer or 'body'}: {f.detail}" for f in faults[:3]))


class UnknownModel(InvalidInput):
    """No model of this name is in the catalogue."""

    code = "unknown-model"


class Unauthenticated(FarmError):
    """This needs a valid API key, sent as `Authorization: Bearer imf_…`."""

    code = "unauthenticated"


class Forbidden(FarmError):
    """This needs an operator's key."""

    code = "forbidden"


class NotFound(FarmError):
    """There is no such thing here."""

    code = "not-found"


class Conflict(FarmError):
    """The request does not fit the present state."""

    code = "conflict"


class InProgress(Conflict):
    """An equal request is being handled. Try again in a moment."""

    code = "idempotency-in-progress"


class NotReady(Conflict):
    """This job has no image."""

    code = "not-ready"


class Throttled(FarmError):
    """Too many requests of this tenant are being handled at once. Try again in a moment."""

    code = "too-many-requests"


class Unavailable(FarmError):
    """A part of the farm is out of reach. Try again in a moment."""

    code = "unavailable"


class Lost(FarmError):
    """The lease on this job is gone; its result is not wanted."""

    code = "lost"


class StorageError(FarmError):
    """The object storage failed."""

    code = "storage"


class StorageUnavailable(StorageError):
    """The object storage does not answer."""

    code = "storage-unavailable"


class StorageMisconfigured(StorageError):
    """The object storage refuses us: check the bucket, the keys and the endpoint."""

    code = "storage-misconfigured"


class ObjectMissing(StorageError):
    """There is no object under this key."""

    code = "object-missing"


class LinkRefused(FarmError):
    """This link was not made by this farm, or was altered."""

    code = "link-refused"


class LinkExpired(LinkRefused):
    """This link is too old; ask the farm for a new one."""

    code = "link-expired"


class RenderError(FarmError):
    """An attempt to render failed."""

    outcome: ClassVar[Outcome] = Outcome.PERMANENT


class Transient(RenderError):
    """Rendering failed in a way that may pass."""

    code = "transient"
    outcome = Outcome.TRANSIENT

    def __init__(self, detail: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(detail)
        #: seconds that the other side asked us to wait
        self.retry_after = retry_after


class OutOfMemory(RenderError):
    """The device has not enough memory for this job."""

    code = "out-of-memory"
    outcome = Outcome.RESOURCE


class DeviceLost(RenderError):
    """The device is in a state from which this process cannot bring it back."""

    code = "device-lost"
    outcome = Outcome.WORKER_LOST


class Permanent(RenderError):
    """Rendering will fail the same way every time."""

    code = "permanent"
    outcome = Outcome.PERMANENT

    def __init__(self, detail: str | None = None, code: str = "permanent") -> None:
        super().__init__(detail)
        #: finer than the class: `content_policy`, `model_missing`, `invalid_image` …
        self.reason = code


class OverBudget(RenderError):
    """The budget for hosted models is used up."""

    code = "over-budget"
    outcome = Outcome.BUDGET


class Stopped(FarmError):
    """A running pass was told to end."""

    code = "stopped"


class Canceled(Stopped):
    """Every job of this pass was called off."""

    code = "canceled"


class Interrupted(Stopped):
    """The worker must stop before this pass is done."""

    code = "interrupted"
