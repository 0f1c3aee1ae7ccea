"""Puts one process together: settings, catalogue, database, storage and bell, opened once and handed around."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from sqlalchemy import Engine

from shared import failpoints
from shared.catalogue import Catalogue, load_catalogue
from shared.database import open_engine
from shared.queue import Bell
from shared.settings import Settings, load_settings
from shared.storage import Storage, open_storage


@dataclass(frozen=True)
class Services:
    """The parts that a process of the farm works with. Nothing is connected before it is used."""

    settings: Settings
    catalogue: Catalogue
    engine: Engine
    bell: Bell

    @cached_property
    def storage(self) -> Storage:
        return open_storage(self.settings)


def open_services(application_name: str, settings: Settings | None = None, pool_size: int = 5) -> Services:
    """Build the parts from the settings (by default from the environment).

    Raises `SettingsError` or `CatalogueError`. `application_name` is what PostgreSQL shows for our connections.
    """
    settings = settings or load_settings()
    failpoints.arm(settings.failpoints)
    return Services(
        settings=settings,
        catalogue=load_catalogue(settings.catalogue),
        engine=open_engine(settings, application_name, pool_size),
        bell=Bell(settings),
    )
