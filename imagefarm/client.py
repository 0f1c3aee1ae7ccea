"""The Python client: `Farm` speaks to a farm over HTTP."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

from imagefarm.connection import Connection, find_farm
from imagefarm.download import Downloaded, Progress, download
from imagefarm.records import DEFAULT_TEMPLATE, Batch, Job, Model, Queue, Tenant, Worker
from shared.errors import FarmError
from shared.states import State

#: longest time that the farm holds one call
_HELD_SECONDS = 60
_PAGE = 1000
#: checking and storing a million prompts takes its time
_SUBMIT_SECONDS = 600.0
_FIRST_POLL, _LAST_POLL = 0.1, 1.0
_BUSY_POLL = 0.5


class Farm:
    """A render farm.

    Without arguments it is the one named by `IMAGEFARM_URL` and `IMAGEFARM_API_KEY`, else the one that `imagefarm up`
    started in this folder. May be shared by threads; usable as a context manager.

        farm = Farm()
        batch = farm.submit(["a red circle on a white background"], model="demo-diffusion", num_images=4)
        batch.wait().download("pictures")

    Raises `FarmUnreachable` where no farm answers, `FarmRequestError` where it refuses.
    """

    def __init__(self, url: str | None = None, api_key: str | None = None, *, timeout: float = 60.0) -> None:
        self._connection = Connection(find_farm(url, api_key), timeout)

    @property
    def url(self) -> str:
        """Base URL of the farm."""
        return self._connection.url

    def close(self) -> None:
        """Close the pooled connections."""
        self._connection.close()

    def __enter__(self) -> Farm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        jobs: Sequence[Mapping[str, Any]] | None = None,
        model: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        num_images: int = 1,
        name: str = "",
        priority: str = "normal",
        idempotency_key: str | None = None,
        retention_seconds: int | None = None,
    ) -> Batch:
        """Submit a batch: `prompts` that share `parameters`, or `jobs` that bring their own.

            farm.submit(["a red circle", "a blue star"], model="demo-diffusion", parameters={"seed": 7})
            farm.submit(jobs=[{"prompt": "a red circle", "guidance_scale": 5.0}], model="demo-diffusion")

        Each prompt gives `num_images` images. Without `model` it is the first one that the farm serves. A call that
        is cut off is repeated safely; with an `idempotency_key` of your own even after a crash of your program. Rows
        and images are kept, or deleted `retention_seconds` after the end.
        """
        if (prompts is None) == (jobs is None):
            raise ValueError("pass prompts or jobs, one of the two")
        body: dict[str, Any] = {"model": model or self.default_model(), "num_images": num_images, "priority": priority}
        if name:
            body["name"] = name
        if retention_seconds is not None:
            body["retention_seconds"] = retention_seconds
        if parameters:
            body["parameters"] = dict(parameters)
        if prompts is not None:
            body["prompts"] = [prompts] if isinstance(prompts, str) else list(prompts)
        else:
            body["jobs"] = [dict(job) for job in jobs or ()]
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        answer = self._connection.call("POST", "/batches", body=body, headers=headers, patience=_SUBMIT_SECONDS)
        return Batch.of(self, answer)

    def default_model(self) -> str:
        """The first model that a living worker serves, in the catalogue's order; the test engine comes last."""
        models = sorted(self.models(), key=lambda model: (not model.served, model.backend == "fake"))
        return models[0].name

    def batch(self, batch: Batch | str) -> Batch:
        """A batch as it stands now."""
        return Batch.of(self, self._connection.call("GET", f"/batches/{_id(batch)}"))

    def batches(self) -> Iterator[Batch]:
        """Your batches, newest first."""
        return (Batch.of(self, body) for body in self._pages("/batches", {"limit": 100}))

    def jobs(self, batch: Batch | str, states: Iterable[str] = ()) -> Iterator[Job]:
        """The jobs of a batch in order, optionally only those in `states`.

            for job in farm.jobs(batch, ["failed"]):
                print(job.prompt, job.error)

        They are fetched page by page while you iterate.
        """
        query: dict[str, Any] = {"limit": _PAGE}
        if wanted := ",".join(states):
            query["state"] = wanted
        return (Job.of(self, body) for body in self._pages(f"/batches/{_id(batch)}/jobs", query))

    def job(self, job: Job | str, wait: float = 0.0) -> Job:
        """A job as it stands now; with `wait`, as soon as it has ended or after so many seconds."""
        deadline = time.monotonic() + wait
        while True:
            asked_at = time.monotonic()
            held = round(min(_HELD_SECONDS, max(0.0, deadline - asked_at)), 2)
            query = {"wait": held} if held else None
            found = Job.of(self, self._connection.call("GET", f"/jobs/{_id(job)}", query=query, patience=held))
            now = time.monotonic()
            if found.done or now >= deadline:
                return found
            if now - asked_at < _FIRST_POLL:  # a busy farm answers at once
                time.sleep(min(_BUSY_POLL, deadline - now))

    def wait(
        self, batch: Batch | str, timeout: float | None = None, on_progress: Callable[[Batch], None] | None = None
    ) -> Batch:
        """The batch once no job is open any more; `on_progress` sees it on the way.

        Raises `TimeoutError` after `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        pause = _FIRST_POLL
        while True:
            found = self.batch(batch)
            if on_progress:
                on_progress(found)
            if found.done:
                return found
            if deadline is not None and time.monotonic() + pause > deadline:
                raise TimeoutError(f"{found.id}: {found.ended} of {found.job_count} jobs have ended after {timeout} s")
            time.sleep(pause)
            pause = min(_LAST_POLL, pause * 1.3)

    def cancel(self, what: Batch | Job | str) -> None:
        """Call off a batch or a job. Doing it twice is harmless."""
        kind = "jobs" if _id(what).startswith("job_") else "batches"
        self._connection.call("DELETE", f"/{kind}/{_id(what)}")

    def pause(self, batch: Batch | str) -> Batch:
        """Set the waiting jobs of a batch aside; what is being rendered is finished."""
        return self._change_batch(batch, {"paused": True})

    def resume(self, batch: Batch | str) -> Batch:
        """Let a paused batch go on."""
        return self._change_batch(batch, {"paused": False})

    def set_priority(self, batch: Batch | str, priority: str) -> Batch:
        """Put a batch into another class: high, normal or low."""
        return self._change_batch(batch, {"priority": priority})

    def _change_batch(self, batch: Batch | str, change: Mapping[str, Any]) -> Batch:
        return Batch.of(self, self._connection.call("PATCH", f"/batches/{_id(batch)}", body=dict(change)))

    def retry(
        self, what: Batch | Job | str, error_classes: Iterable[str] = (), states: Iterable[str] = ("failed",)
    ) -> int:
        """Render a job again, or the failed jobs of a batch, with a clean record. Returns how many.

            farm.retry(batch, error_classes=["out_of_memory"])

        `error_classes` narrows it; `states` may name canceled jobs too.
        """
        if _id(what).startswith("job_"):
            self._connection.call("POST", f"/jobs/{_id(what)}/retry")
            return 1
        body = {"states": list(states), "error_classes": list(error_classes)}
        answer = self._connection.call("POST", f"/batches/{_id(what)}/retry", body=body, patience=_SUBMIT_SECONDS)
        return int(answer["retried"])

    def queues(self) -> list[Queue]:
        """What each model has waiting, and how many workers that calls for."""
        return [Queue.of(body) for body in self._connection.call("GET", "/queues")["data"]]

    def drain(self, worker: Worker | str, draining: bool = True) -> None:
        """Let a worker claim nothing more, or again. Needs an operator's key."""
        name = worker if isinstance(worker, str) else worker.id
        self._connection.call("PATCH", f"/workers/{quote(name, safe='')}", body={"draining": draining})

    def pause_model(self, model: str, paused: bool = True) -> None:
        """Stop or go on rendering with a model, everywhere. Needs an operator's key."""
        self._connection.call("PATCH", f"/models/{quote(model, safe='')}", body={"paused": paused})

    def tenants(self) -> list[Tenant]:
        """All tenants. Needs an operator's key."""
        return [Tenant.of(body) for body in self._connection.call("GET", "/tenants")["data"]]

    def change_tenant(self, tenant: str, **changes: Any) -> Tenant:
        """Change a tenant: `paused`, `max_in_flight` (None lifts the cap). Needs an operator's key."""
        return Tenant.of(self._connection.call("PATCH", f"/tenants/{quote(tenant, safe='')}", body=changes))

    def models(self) -> list[Model]:
        """The models that the farm knows."""
        return [Model.of(body) for body in self._connection.call("GET", "/models")["data"]]

    def workers(self) -> list[Worker]:
        """The farm's workers, the living ones first."""
        return [Worker.of(body) for body in self._connection.call("GET", "/workers")["data"]]

    def image(self, job: Job | str) -> bytes:
        """The picture of a job, checked against its SHA-256."""
        if isinstance(job, str) or job.image is None:
            job = self.job(job)
        if job.image is None:
            reason = f"; {job.error}" if job.error else ""
            raise FarmError(f"{job.id} has no picture: it is {job.state}{reason}")
        data = self._connection.fetch(f"/api/v1/jobs/{job.id}/image")
        if hashlib.sha256(data).hexdigest() != job.image.sha256:
            raise FarmError(f"{job.id}: the picture did not arrive as it was stored; try again")
        return data

    def download(
        self,
        batch: Batch | str,
        folder: str | Path,
        template: str = DEFAULT_TEMPLATE,
        *,
        parallel: int = 8,
        overwrite: bool = False,
        on_progress: Progress | None = None,
    ) -> Downloaded:
        """Fetch the pictures of a batch that are ready. Call it again to go on: complete files are left alone.

            farm.download(batch, "pictures", "{prompt}-{seed}.{ext}")

        The template's fields are index, seed, prompt (made fit for a file name), job, batch, model and ext; it may
        make subfolders, never leave `folder`. Every picture is checked against its SHA-256 and appears whole or not
        at all. A file that holds another picture is not touched unless `overwrite` is given: `FarmError`.
        """
        jobs = self.jobs(batch, [State.SUCCEEDED])
        total = (batch if isinstance(batch, Batch) else self.batch(batch)).succeeded
        return download(
            jobs,
            self.image,
            Path(folder),
            template,
            total=total,
            parallel=parallel,
            overwrite=overwrite,
            on_progress=on_progress,
        )

    def _pages(self, path: str, query: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        cursor: str | None = None
        while True:
            page = self._connection.call("GET", path, query={**query, **({"cursor": cursor} if cursor else {})})
            yield from page["data"]
            cursor = page.get("next_cursor")
            if not cursor:
                return


def _id(what: Batch | Job | str) -> str:
    return quote(what, safe="", errors="replace") if isinstance(what, str) else what.id
