"""Which models a worker on this machine can serve, and the command that serves them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec

from imagefarm.children import python_command
from shared.catalogue import Catalogue, ModelEntry
from shared.errors import FarmError
from shared.queue import queue_name
from shared.settings import PROJECT_ROOT, Settings, environment_of, variable

_WORKER_EXTRA = 'install the worker\'s libraries: pip install "imagefarm[worker]"'


def obstacle(entry: ModelEntry, settings: Settings) -> str | None:
    """Why this machine cannot render with a model, with the remedy; None where it can."""
    if entry.backend == "fake":
        return None
    if entry.hosted is not None:
        if find_spec("openai") is None:
            return _WORKER_EXTRA
        if settings.provider_key(entry.hosted.provider) is None:
            return f"no key for {entry.hosted.provider}: set {_key_variable(entry.hosted.provider)}"
        return None
    if find_spec("torch") is None:
        return _WORKER_EXTRA
    if entry.folder is not None and not any(entry.folder.rglob("*.safetensors")):
        return f"its weights (*.safetensors) are not in {entry.folder}"
    if entry.hub is not None and not settings.allow_downloads:
        return "its weights come from the hub: set IMAGEFARM_ALLOW_DOWNLOADS=true (or use a model with a folder)"
    return None


def _key_variable(provider: str) -> str:
    known = {"openai": "OPENAI_API_KEY", "cometapi": "COMETAPI_API_KEY"}
    return known.get(provider, f'IMAGEFARM_PROVIDER_KEYS={{"{provider}": "…"}}')


def choose_models(catalogue: Catalogue, settings: Settings, wanted: Sequence[str]) -> list[str]:
    """The models to serve: those that are `wanted`, else all that this machine can render.

    The fake engine, whose jobs may ask for crashes, is left out unless it is wanted or nothing else is there.

    Raises `FarmError` where a wanted model is unknown or cannot be rendered here, or where nothing can.
    """
    if not wanted:
        chosen = [name for name, entry in catalogue.items() if obstacle(entry, settings) is None]
        if not chosen:
            reasons = "\n".join(f"  {name}: {obstacle(entry, settings)}" for name, entry in catalogue.items())
            raise FarmError(f"this machine can render none of the catalogue's models:\n{reasons}")
        return [name for name in chosen if catalogue[name].backend != "fake"] or chosen
    for name in wanted:
        if reason := obstacle(catalogue.find(name, pointer="--models"), settings):
            raise FarmError(f"{name} cannot be rendered here: {reason}")
    return list(dict.fromkeys(wanted))


def worker_command(models: Sequence[str], name: str) -> list[str]:
    """The command of a worker: Celery with one process that renders."""
    return python_command(
        *("-m", "celery", "--workdir", str(PROJECT_ROOT), "-A", "worker.app", "worker"),
        *("--pool", "prefork", "--concurrency", "1", "--prefetch-multiplier", "1"),
        *("-Q", ",".join(queue_name(model) for model in models), "-n", f"{name}@%h"),
        *("--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "warning"),
    )


def api_command() -> list[str]:
    """The command of the API."""
    return python_command("-m", "api.serve")


def keeper_command() -> list[str]:
    """The command of the keeper."""
    return python_command("-m", "worker.keeper")


def child_environment(settings: Settings) -> dict[str, str]:
    """The environment in which a process of the farm loads these settings, whatever folder it runs in."""
    return environment_of(settings.model_copy(update={"catalogue": settings.catalogue.resolve()}))


def worker_environment(settings: Settings, models: Sequence[str], gpu: int | None) -> dict[str, str]:
    """The environment of a worker; `gpu` is the one GPU that it sees."""
    environment = {**child_environment(settings), "IMAGEFARM_WORKER_MODELS": ",".join(models)}
    # By default the threads of an engine on the CPU wait by spinning. As soon as anything else runs on the machine,
    # they then burn the time that the one they wait for would need: rendering was measured to take 7 times as long.
    environment["OMP_WAIT_POLICY"] = variable("OMP_WAIT_POLICY") or "PASSIVE"
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    return environment


def gpu_count() -> int:
    """NVIDIA GPUs of this machine, counted without loading an engine."""
    visible = variable("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() and part.strip() != "-1"])
    try:
        return sum(1 for name in os.listdir("/proc/driver/nvidia/gpus"))  # noqa: PTH208
    except OSError:
        return 0
