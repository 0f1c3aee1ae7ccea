"""The small files in the data folder of a local farm: who runs it, how to reach it, how to join it."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from imagefarm.connection import CLIENT_FILE
from imagefarm.guardian import is_running
from shared.errors import FarmError, SettingsError
from shared.settings import Settings, load_client_settings, load_settings, variable, variable_of

#: what a further process on this machine needs to join the farm; there while the farm runs
JOIN_FILE = "farm.json"
LOCK_FILE = "farm.lock"

_JOIN_FIELDS = (
    "database_url", "redis_url", "storage_url", "catalogue", "listen", "s3_endpoint_url", "s3_public_endpoint_url",
    "s3_region", "s3_access_key", "s3_secret_key",
)  # fmt: skip
#: a farm that was killed is being ended by its guardian
_HANDOVER_SECONDS = 90.0


def lock_folder(data: Path, say: Callable[[str], None], stop: threading.Event) -> int:
    """Take the folder for this process, for as long as the descriptor is open. Raises `FarmError` where it is taken.

    Waits where the farm that holds it was killed and its processes are still being ended.
    """
    try:
        data.mkdir(parents=True, exist_ok=True)
        lock = os.open(data / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        reason = error.strerror or error
        raise FarmError(f"{data}: no farm can be kept there ({reason}); choose another folder with --data") from None
    deadline: float | None = None
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = os.pread(lock, 20, 0).decode(errors="replace").strip()
            gone = holder.isdigit() and not is_running(int(holder))
            if deadline is None and gone:
                say("waiting for what is left of the farm that was killed here")
                deadline = time.monotonic() + _HANDOVER_SECONDS
            if not gone or stop.is_set() or time.monotonic() > (deadline or 0.0):
                os.close(lock)
                process = f" (process {holder})" if holder.isdigit() else ""
                raise FarmError(
                    f"a farm already runs on {data}{process}: use it, stop it with Ctrl-C, "
                    "or start another one with --data OTHER_FOLDER --listen 127.0.0.1:OTHER_PORT"
                ) from None
            time.sleep(0.1)
    os.truncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock


def write_private(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that only its owner can read, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
    partial.replace(path)


def write_client_file(data: Path, url: str, api_key: str) -> None:
    """Leave the address and the key for the command line and `Farm()`."""
    write_private(data / CLIENT_FILE, {"url": url, "api_key": api_key})


def write_join_file(data: Path, settings: Settings) -> Path:
    """Leave what `imagefarm worker`, `key` and `doctor` need to join this farm."""
    path = data / JOIN_FILE
    values: dict[str, Any] = {name: getattr(settings, name) for name in _JOIN_FIELDS}
    values["catalogue"] = str(settings.catalogue.resolve())
    clear = {n: value.get_secret_value() if isinstance(value, SecretStr) else value for n, value in values.items()}
    write_private(path, {name: value for name, value in clear.items() if value is not None})
    return path


def process_settings(**overrides: Any) -> Settings:
    """Settings for a process of the farm: the environment's, else those of the farm that runs in the data folder.

    Raises `SettingsError`.
    """
    unset = [name for name in _JOIN_FIELDS if not variable(variable_of(Settings, name))]
    if "database_url" not in unset:
        return load_settings(**overrides)
    path = load_client_settings().data / JOIN_FILE
    try:
        joined = json.loads(path.read_text(encoding="utf-8"))
        found = {name: joined[name] for name in unset if name in joined}
    except FileNotFoundError:
        found = {}
    except (OSError, ValueError, TypeError) as error:
        raise SettingsError(f"{path}: cannot be read: {error}; `imagefarm up` writes it anew") from None
    return load_settings(**{**found, **overrides})


def database_settings() -> Settings:
    """Settings for a command that works on the database alone."""
    unused = {"redis_url": "redis://unused", "storage_url": "file:///unused"}
    return process_settings(**{name: url for name, url in unused.items() if not variable(variable_of(Settings, name))})
