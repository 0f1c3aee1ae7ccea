"""`imagefarm submit`: prompts from arguments, files and standard input."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from imagefarm.client import Farm
from imagefarm.commands.batches import watch_to_end
from imagefarm.connection import FarmRequestError, pointer_text
from imagefarm.console import open_farm, say
from imagefarm.download import FileNames
from imagefarm.following import fetch
from imagefarm.prompt_files import ARGUMENT, PromptRow, convert, parameter_name, read_arguments
from imagefarm.records import DEFAULT_TEMPLATE, Batch, Model
from shared.errors import FarmError
from shared.states import Priority

#: a farm that was just started has its worker after a few seconds
_WORKER_SECONDS = 15.0
_ITEM = re.compile(r"/(?:jobs|prompts)/(\d+)(/.*)?")


@click.command()
@click.argument("prompts", nargs=-1, required=True)
@click.option("--model", help="Model to use.  [default: the first one that the farm serves]")
@click.option("-n", "--num-images", type=click.IntRange(1), default=1, show_default=True, help="Images of each prompt.")
@click.option("--name", help="Name of the batch.  [default: the file's name]")
@click.option("--priority", type=click.Choice([str(p) for p in Priority]), default="normal", show_default=True)
@click.option("-p", "--param", "params", metavar="KEY=VALUE", multiple=True, help="Any parameter of the model.")
@click.option("--width", type=int, help="Pixels.")
@click.option("--height", type=int, help="Pixels.")
@click.option("--steps", "num_inference_steps", type=int, help="Denoising steps.")
@click.option("--guidance-scale", type=float, help="How closely to follow the prompt.")
@click.option("--negative-prompt", help="What not to show.")
@click.option("--seed", type=int, help="Seed; image k of a prompt gets seed + k.  [default: random]")
@click.option("--scheduler", help="Sampler, such as ddim or euler.")
@click.option("--class-index", type=int, help="Class of a class-conditional GAN.")
@click.option("--keep", metavar="DAYS", type=click.FloatRange(0, min_open=True), help="Delete all of it so long after.")
@click.option("--watch", is_flag=True, help="Show the progress until all images are done.")
@click.option("--download", "folder", type=click.Path(file_okay=False, path_type=Path), help="Fetch the images there.")
@click.option("--template", default=DEFAULT_TEMPLATE, show_default=True, help="Name of each downloaded file.")
@click.pass_context
def submit(
    ctx: click.Context,
    /,
    prompts: tuple[str, ...],
    model: str | None,
    num_images: int,
    name: str | None,
    priority: str,
    params: tuple[str, ...],
    keep: float | None,
    watch: bool,
    folder: Path | None,
    template: str,
    **options: Any,
) -> None:
    """Submit prompts, or files of them, as a batch.

    Each of PROMPTS is one prompt, or a .txt, .csv or .jsonl file of prompts, or - for standard input.

    \b
    imagefarm submit "a red circle on a white background" -n 4 --watch --download pictures
    imagefarm submit prompts.txt --model demo-diffusion --steps 30 --seed 7
    imagefarm submit prompts.csv --priority low        columns: prompt, seed, width … model
    generate-prompts | imagefarm submit - -p guidance_scale=5

    Prints the id of the batch (one for each model that a file names) on standard output.
    """
    with open_farm() as farm:
        known = _models(farm, patient=model is None)
        default = model or farm.default_model()
        rows = read_arguments(prompts, sys.stdin.buffer.read, lambda asked: _parameters_of(known, asked or default))
        given = {key: value for key, value in options.items() if value is not None}
        if name is None:
            name = prompts[0] if len(prompts) == 1 and not rows[0].where.startswith(ARGUMENT) else ""
            name = Path(name).name.removeprefix("-")
        if model is None and any(row.model is None for row in rows):
            say(f"using the model {default} (another one: --model; all: imagefarm models)", "dim")
        if folder is not None:  # what could keep the pictures from being saved is told before they are rendered
            FileNames(folder, template)
            folder.mkdir(parents=True, exist_ok=True)
        batches = []
        for asked, group in _by_model(rows, default).items():
            shared = {**given, **_shared_parameters(params, _parameters_of(known, asked))}
            options = {"num_images": num_images, "name": name, "priority": priority}
            if keep is not None:
                options["retention_seconds"] = max(1, round(keep * 86_400))
            batches.append(_submit(farm, asked, group, shared, options))
            click.echo(batches[-1].id)
            if asked in known and not known[asked].served:
                say(f"no worker serves {asked} now; the batch waits (`imagefarm worker --models {asked}`)", "yellow")
        code = _afterwards(farm, batches, watch or folder is not None, folder, template)
    ctx.exit(code)


def _models(farm: Farm, patient: bool) -> dict[str, Model]:
    """The farm's models by name; where one is to be chosen, a worker that is just starting is waited for."""
    deadline = time.monotonic() + _WORKER_SECONDS
    while True:
        models = {model.name: model for model in farm.models()}
        if not patient or any(model.served for model in models.values()) or time.monotonic() > deadline:
            return models
        time.sleep(0.25)


def _parameters_of(known: Mapping[str, Model], model: str) -> Mapping[str, Mapping[str, Any]]:
    if model not in known:
        raise FarmError(f"the farm has no model {model!r}; it has {', '.join(known)}")
    return known[model].parameters


def _shared_parameters(params: Sequence[str], known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    found = {}
    for param in params:
        key, equals, text = param.partition("=")
        if not equals:
            raise click.BadParameter(f"{param!r} is not KEY=VALUE", param_hint="--param")
        try:
            key = parameter_name(key, known)
            found[key] = convert(text, known[key])
        except ValueError as error:
            raise click.BadParameter(f"{param}: {error}", param_hint="--param") from None
    return found


def _by_model(rows: Sequence[PromptRow], default: str) -> dict[str, list[PromptRow]]:
    groups: dict[str, list[PromptRow]] = {}
    for row in rows:
        groups.setdefault(row.model or default, []).append(row)
    return groups


def _submit(
    farm: Farm,
    model: str,
    rows: Sequence[PromptRow],
    parameters: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Batch:
    if any(row.parameters for row in rows):
        content: dict[str, Any] = {"jobs": [{"prompt": row.prompt, **row.parameters} for row in rows]}
    else:
        content = {"prompts": [row.prompt for row in rows]}
    try:
        return farm.submit(**content, model=model, parameters=parameters, **options)
    except FarmRequestError as error:
        raise FarmError(_by_line(error, rows)) from None


def _by_line(error: FarmRequestError, rows: Sequence[PromptRow]) -> str:
    """The farm's faults with the lines of the files in the place of positions in the request."""
    if not any(_ITEM.fullmatch(fault.pointer) for fault in error.errors):
        return error.detail
    lines = []
    for fault in error.errors:
        where, match = pointer_text(fault.pointer), _ITEM.fullmatch(fault.pointer)
        if match:
            with suppress(IndexError):
                where = rows[int(match[1])].where + (f", {match[2][1:]}" if match[2] else "")
        lines.append(f"{where}: {fault.detail}")
    return "\n".join(lines)


def _afterwards(farm: Farm, batches: Sequence[Batch], watch: bool, folder: Path | None, template: str) -> int:
    if not watch:
        if sys.stderr.isatty():
            say(f"follow it: imagefarm watch {' '.join(batch.id for batch in batches)}", "dim")
        return 0
    ended, code = watch_to_end(farm, batches)
    if folder is not None:
        for batch in ended:
            # pictures of several batches would have the same numbers
            target = folder / batch.model if len(ended) > 1 else folder
            fetch(farm, batch, target, template=template)
    return code
