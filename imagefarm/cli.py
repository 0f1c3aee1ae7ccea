"""The command `imagefarm`. Each command is loaded when it is used, so that the light ones start at once."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

import click

from imagefarm.console import FarmGroup

#: commands by what a person wants: name, and where it is
SECTIONS: dict[str, dict[str, str]] = {
    "Start here": {
        "demo": "demo",
        "up": "up",
    },
    "Use a farm": {
        "submit": "submit",
        "watch": "batches",
        "status": "batches",
        "download": "batches",
        "cancel": "batches",
        "pause": "control",
        "resume": "control",
        "prioritize": "control",
        "retry": "control",
        "models": "inventory",
        "workers": "inventory",
        "queues": "inventory",
    },
    "Run a farm": {
        "worker": "processes",
        "keeper": "processes",
        "api": "processes",
        "migrate": "processes",
        "drain": "operate",
        "undrain": "operate",
        "tenants": "operate",
        "cap": "operate",
        "key": "keys",
        "doctor": "doctor",
    },
}
_MODULES = {name: module for commands in SECTIONS.values() for name, module in commands.items()}


class _Commands(FarmGroup):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _MODULES:
            return None
        module = importlib.import_module(f"imagefarm.commands.{_MODULES[cmd_name]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section, names in SECTIONS.items():
            found = [(name, self.get_command(ctx, name)) for name in names]
            with formatter.section(section):
                formatter.write_dl([(name, command.get_short_help_str(70)) for name, command in found if command])


def _version() -> str:
    try:
        return version("imagefarm")
    except PackageNotFoundError:
        return "from a checkout that is not installed"


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(_version(), message="imagefarm %(version)s")
def cli() -> None:
    """A render farm for AI images, on your own machines.

    \b
    imagefarm demo                      see it work, from nothing, in one go
    imagefarm up                        start a farm on this machine
    imagefarm submit "a red circle" --watch --download pictures

    A farm on another machine is named by IMAGEFARM_URL and IMAGEFARM_API_KEY.
    """


def main() -> NoReturn:
    """Entry point."""
    cli(prog_name="imagefarm")
    raise AssertionError("click exits")
