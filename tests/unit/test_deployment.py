"""The container files: complete, without secrets, and understood by Compose itself."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.settings import PROJECT_ROOT, Settings, variable_of
from tests.conftest import missing

COMPOSE = PROJECT_ROOT / "docker-compose.yml"
REQUIRED = {"POSTGRES_PASSWORD", "REDIS_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY"}


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]
    return found


def test_every_part_of_the_farm_has_a_service(services: dict[str, Any]) -> None:
    parts = {"postgres", "redis", "objectstore", "migrate", "api", "keeper", "worker-cpu", "worker-gpu"}
    assert parts <= services.keys()
    assert {name: service["profiles"] for name, service in services.items() if "profiles" in service} == {
        "worker-cpu": ["cpu"],
        "worker-gpu": ["gpu"],
    }


def test_services_that_run_on_are_watched(services: dict[str, Any]) -> None:
    images = re.findall(
        r"^FROM source AS (\w+)\n(.*?)(?=^FROM|\Z)", (PROJECT_ROOT / "Dockerfile").read_text(), re.M | re.S
    )
    watched = {name for name, text in images if "HEALTHCHECK" in text}
    for name, service in services.items():
        assert "healthcheck" in service or service["build"]["target"] in watched, name


def test_redis_never_evicts(services: dict[str, Any]) -> None:
    assert "--maxmemory-policy noeviction" in " ".join(services["redis"]["command"])


def test_no_secret_is_baked_in(services: dict[str, Any]) -> None:
    text = COMPOSE.read_text()
    assert set(re.findall(r"\$\{(\w+):\?", text)) == REQUIRED
    for name, service in services.items():
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|KEY|SECRET", variable):
                assert str(value).startswith("${"), (name, variable)
    example = dict(
        line.split("=", 1) for line in (PROJECT_ROOT / ".env.example").read_text().splitlines() if "=" in line
    )
    assert all(example[name] == "" for name in REQUIRED)


def test_the_farm_is_given_settings_that_exist(services: dict[str, Any]) -> None:
    known = {variable_of(Settings, field) for field in Settings.model_fields}
    assert services["api"]["environment"].keys() <= known
    assert {"DATABASE_URL", "REDIS_URL", "STORAGE_URL"} <= services["worker-gpu"]["environment"].keys()


def test_the_images_hold_every_package_they_need() -> None:
    copied = set(re.findall(r"^COPY (\w+) ", (PROJECT_ROOT / "Dockerfile").read_text(), re.M))
    assert {"api", "imagefarm", "migrations", "models", "shared", "worker"} <= copied


@pytest.mark.parametrize("set_up", [True, False])
def test_compose_reads_the_file(tmp_path: Path, set_up: bool) -> None:
    command = compose_command()
    environment = {"PATH": "/usr/bin:/bin:/usr/local/bin", "HOME": str(tmp_path)}
    environment |= dict.fromkeys(REQUIRED, "x") if set_up else {}
    done = subprocess.run(
        [*command, "-f", str(COMPOSE), "--profile", "cpu", "--profile", "gpu", "config"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    if set_up:
        assert done.returncode == 0, done.stderr
        assert "worker-gpu" in done.stdout
    else:
        assert done.returncode != 0
        assert "in .env" in done.stderr


def compose_command() -> list[str]:
    """`docker compose`, or the stand-alone `docker-compose`."""
    if shutil.which("docker"):
        plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
        if plugin.returncode == 0:
            return ["docker", "compose"]
    if not shutil.which("docker-compose"):
        missing("neither `docker compose` nor `docker-compose` is installed; only they can check docker-compose.yml")
    return ["docker-compose"]
