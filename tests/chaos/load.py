"""Tenants who submit over HTTP, look how it goes and sometimes change their minds; they write down every answer."""

from __future__ import annotations

import itertools
import queue
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import requests

from tests.chaos.stage import MODELS, TENANTS

#: an answer that takes longer counts as a hang
TOO_LONG_SECONDS = 5.0
_TIMEOUT_SECONDS = 15.0
#: what an API may say instead of doing what it was asked to
_COME_BACK = {409, 429, 503}
_PROBLEM = "application/problem+json"


@dataclass(frozen=True)
class Submission:
    """One batch to submit, under its idempotency key."""

    key: str
    tenant: int
    body: dict[str, Any]
    cancel: bool = False

    @property
    def size(self) -> int:
        return len(self.body.get("prompts") or self.body["jobs"])


@dataclass(frozen=True)
class Answer:
    """How the API answered one request. Status 0: not at all within the time-out."""

    request: str
    status: int
    content_type: str
    seconds: float

    @property
    def fault(self) -> str | None:
        """What is wrong with it, if anything."""
        if self.status == 0 or self.seconds > TOO_LONG_SECONDS:
            return f"{self.request}: {self.status} after {self.seconds:.1f} s"
        if 200 <= self.status < 300:
            return None
        if self.content_type != _PROBLEM or self.status not in _COME_BACK:
            return f"{self.request}: {self.status} {self.content_type}"
        return None


@dataclass
class Ledger:
    """What the tenants know: the batches that the farm said it had taken, and every answer."""

    #: by idempotency key: the public id of the batch
    accepted: dict[str, str] = field(default_factory=dict)
    submitted: dict[str, Submission] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    #: connections that broke before an answer came
    cut_off: int = 0
    #: submits that were answered from an earlier call
    replayed: int = 0
    surprises: list[str] = field(default_factory=list)


def plan(jobs: int, faults: Sequence[str], seed: int, image_seconds: float) -> list[list[Submission]]:
    """What to submit with each fault, and at last without one; `jobs` jobs in all."""
    if jobs < 2 * (len(faults) + 1):
        raise ValueError(f"{len(faults)} faults want at least {2 * (len(faults) + 1)} jobs")
    dice = random.Random(seed)
    shares = [jobs // (len(faults) + 1)] * (len(faults) + 1)
    shares[0] += jobs - sum(shares)
    planned: list[list[Submission]] = []
    numbers = itertools.count()
    for share, fault in zip(shares, [*faults, ""], strict=True):
        kind = fault.removeprefix("job: ") if fault.startswith("job: ") else ""
        sizes = [share] if share < 4 else _split(share, dice)
        planned.append(
            [_submission(f"{seed}-{next(numbers)}", size, "" if n else kind, dice, image_seconds)
             for n, size in enumerate(sizes)]
        )  # fmt: skip
    return planned


def _split(share: int, dice: random.Random) -> list[int]:
    first = dice.randint(1, share - 1)
    return [first, share - first]


def _submission(key: str, size: int, kind: str, dice: random.Random, image_seconds: float) -> Submission:
    steps, side = dice.choice([1, 2, 4]), dice.choice([16, 24, 32])
    body: dict[str, Any] = {
        "model": dice.choice(MODELS),
        "name": key,
        "priority": dice.choice(["high", "normal", "normal", "normal", "low"]),
        "parameters": {
            "width": side,
            "height": side,
            "num_inference_steps": steps,
            "step_image_seconds": round(image_seconds / steps, 4),
        },
    }
    prompts = [f"{key}: picture {n}" for n in range(size)]
    if kind and kind != "cancel":
        body["jobs"] = [{"prompt": prompts[0], "fault": kind}, *({"prompt": prompt} for prompt in prompts[1:])]
    else:
        body["prompts"] = prompts
    return Submission(key, dice.randrange(TENANTS), body, cancel=kind == "cancel")


class Load:
    """One thread for each tenant."""

    def __init__(self, urls: Sequence[str], keys: Sequence[str]) -> None:
        self.ledger = Ledger()
        self._urls = list(urls)
        self._keys = keys
        self._queues: list[queue.Queue[Submission]] = [queue.Queue() for _ in keys]
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._be, args=(n,), daemon=True) for n in range(len(keys))]
        self._lock = threading.Lock()

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join(_TIMEOUT_SECONDS + 5)

    def submit(self, submissions: Sequence[Submission]) -> None:
        """Let the tenants submit these as soon as they can."""
        for submission in submissions:
            with self._lock:
                self.ledger.submitted[submission.key] = submission
            self._queues[submission.tenant].put(submission)

    @property
    def waiting(self) -> int:
        """Batches that the farm has not taken yet."""
        with self._lock:
            return len(self.ledger.submitted) - len(self.ledger.accepted)

    def _be(self, number: int) -> None:
        dice = random.Random(f"tenant {number}")
        mine: list[str] = []
        with requests.Session() as session:
            session.headers["Authorization"] = f"Bearer {self._keys[number]}"
            while not self._closing.is_set():
                try:
                    submission = self._queues[number].get(timeout=dice.uniform(0.2, 0.8))
                except queue.Empty:
                    self._look(session, dice, mine)
                    continue
                if batch_id := self._submit(session, submission):
                    mine.append(batch_id)

    def _submit(self, session: requests.Session, submission: Submission) -> str | None:
        headers = {"Idempotency-Key": submission.key}
        answer = self._insist(session, "POST", "/api/v1/batches", json=submission.body, headers=headers)
        if answer is None:
            return None
        batch_id = str(answer.json()["id"])
        with self._lock:
            self.ledger.accepted[submission.key] = batch_id
            self.ledger.replayed += answer.headers.get("Idempotency-Replayed") == "true"
        if submission.cancel:
            self._closing.wait(0.5)
            self._insist(session, "DELETE", f"/api/v1/batches/{batch_id}")
        return batch_id

    def _look(self, session: requests.Session, dice: random.Random, mine: Sequence[str]) -> None:
        paths = ["/api/v1/batches?limit=5", "/readyz", "/api/v1/workers"]
        if mine:
            batch_id = dice.choice(mine)
            paths += [f"/api/v1/batches/{batch_id}", f"/api/v1/batches/{batch_id}/jobs?limit=50"]
        self._ask(session, "GET", dice.choice(paths))

    def _insist(self, session: requests.Session, method: str, path: str, **options: Any) -> requests.Response | None:
        """Ask until it is done, as the client does; None where the farm refuses for good or the run ends."""
        while not self._closing.is_set():
            answer = self._ask(session, method, path, **options)
            if answer is not None and answer.ok:
                return answer
            if answer is not None and answer.status_code not in _COME_BACK:
                with self._lock:
                    self.ledger.surprises.append(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
                return None
            self._closing.wait(random.uniform(0.1, 0.4))
        return None

    def _ask(self, session: requests.Session, method: str, path: str, **options: Any) -> requests.Response | None:
        url = random.choice(self._urls) + path
        kind = f"{method} {path.partition('?')[0].replace('/api/v1', '')}"
        started = time.monotonic()
        answer, status, content_type = None, 0, ""
        try:
            answer = session.request(method, url, timeout=(5, _TIMEOUT_SECONDS), **options)
            status, content_type = answer.status_code, answer.headers.get("Content-Type", "")
        except requests.exceptions.Timeout:
            pass
        except requests.exceptions.RequestException:
            with self._lock:
                self.ledger.cut_off += 1
            return None
        with self._lock:
            self.ledger.answers.append(Answer(kind, status, content_type, time.monotonic() - started))
        return answer
