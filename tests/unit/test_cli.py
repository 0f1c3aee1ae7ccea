"""The command line without a farm: help, usage errors, and errors that say what to do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from imagefarm import connection, prompt_files
from imagefarm.cli import SECTIONS, cli
from imagefarm.connection import FarmRequestError, FarmUnreachable, find_farm
from imagefarm.farm_files import lock_folder, process_settings, write_join_file, write_private
from imagefarm.serving import choose_models
from shared.catalogue import Catalogue, load_catalogue
from shared.errors import FarmError, Fault, SettingsError
from shared.settings import PROJECT_ROOT, Settings, load_settings

COMMANDS = [name for names in SECTIONS.values() for name in names]


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def settings() -> Settings:
    urls = {"database_url": "postgresql:///x", "redis_url": "redis://x", "storage_url": "file:///x"}
    return load_settings(**urls, openai_api_key=None, cometapi_api_key=None)


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, list(arguments), input=stdin)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0, result.output
    assert len(result.output.splitlines()) > 4


def test_help_lists_every_command_with_a_whole_sentence() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert f"  {command} " in result.output
    assert not any(line.endswith("...") for line in result.output.splitlines()[1:])


@pytest.mark.parametrize("name", ["create", "list", "revoke"])
def test_key_commands_have_help(name: str) -> None:
    assert run("key", name, "--help").exit_code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("submit",),
        ("submit", "a", "--num-images", "0"),
        ("submit", "a", "--priority", "urgent"),
        ("download", "batch_1"),
        ("cancel",),
        ("up", "--workers", "-1"),
        ("key", "create"),
    ],
)
def test_bad_usage_ends_with_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


@pytest.mark.parametrize("arguments", [("status",), ("submit", "a"), ("watch",), ("models",), ("workers",)])
def test_without_a_farm_the_remedy_is_told(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: no farm is known here: start one with `imagefarm up`, or set IMAGEFARM_URL")
    assert len(result.stderr.splitlines()) == 1


def test_a_farm_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    monkeypatch.setenv("IMAGEFARM_URL", url)
    monkeypatch.setenv("IMAGEFARM_API_KEY", "imf_x")
    result = run("status")
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: {url} does not answer (Connection refused); is a farm running? "
        "Start one with `imagefarm up`, or set IMAGEFARM_URL\n"
    )


def test_a_mistyped_variable_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEFARM_ULR", "http://127.0.0.1:1")
    result = run("status")
    assert result.exit_code == 1
    assert "IMAGEFARM_ULR: there is no such setting; did you mean IMAGEFARM_URL?" in result.stderr


def test_a_url_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEFARM_URL", "http://127.0.0.1:1")
    assert "IMAGEFARM_API_KEY: is not set" in run("status").stderr


def test_the_address_comes_from_arguments_then_environment_then_the_data_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("farm-data").mkdir()
    write_private(Path("farm-data/client.json"), {"url": "http://127.0.0.1:1", "api_key": "imf_local"})
    assert Path("farm-data/client.json").stat().st_mode & 0o777 == 0o600
    assert find_farm() == connection.Address("http://127.0.0.1:1", "imf_local")
    assert find_farm(url="http://127.0.0.1:1/").api_key == "imf_local"
    with pytest.raises(SettingsError, match="IMAGEFARM_API_KEY"):
        find_farm(url="http://elsewhere")  # the local key must not be sent to another host
    monkeypatch.setenv("IMAGEFARM_URL", "http://other:2")
    monkeypatch.setenv("IMAGEFARM_API_KEY", "imf_other")
    assert find_farm() == connection.Address("http://other:2", "imf_other")
    assert find_farm("http://third", "imf_third") == connection.Address("http://third", "imf_third")


def test_a_damaged_client_file_is_told() -> None:
    Path("farm-data").mkdir()
    Path("farm-data/client.json").write_text("{")
    assert "client.json: is damaged" in run("status").stderr


@pytest.mark.parametrize("key", ["imf_secret\r\nX-Evil: 1", "imf_sécret"])
def test_a_key_that_no_header_can_hold_is_told_and_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEFARM_URL", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("IMAGEFARM_API_KEY", key)
    assert run("status").stderr == "error: IMAGEFARM_API_KEY: holds characters that no key has\n"


def test_a_database_that_does_not_answer_is_told_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", f"postgresql://u:secret@127.0.0.1:{closed_port()}/x")
    result = run("migrate")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the database is out of reach")
    assert "Connection refused" in result.stderr
    assert "secret" not in result.stderr


def test_up_refuses_a_storage_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_URL", "file:///proc/version/objects")
    result = run("up", "--listen", f"127.0.0.1:{closed_port()}", "--models", "fake")
    assert result.exit_code == 1
    assert "/proc/version/objects" in result.stderr
    assert not (tmp_path / "farm-data" / "postgres").exists()


def test_up_refuses_a_folder_that_cannot_be_made() -> None:
    result = run("up", "--data", "/proc/version/x", "--models", "fake")
    assert result.exit_code == 1
    assert "/proc/version/x: no farm can be kept there (Not a directory)" in result.stderr


def test_the_fake_engine_is_served_only_where_it_is_wanted(settings: Settings) -> None:
    catalogue = load_catalogue(settings.catalogue)
    assert choose_models(catalogue, settings, []) == ["demo-diffusion", "demo-gan"]
    assert choose_models(catalogue, settings, ["fake"]) == ["fake"]
    assert choose_models(Catalogue({"fake": catalogue["fake"]}), settings, []) == ["fake"]


@pytest.mark.parametrize("command", ["worker", "keeper", "api", "migrate"])
def test_processes_need_their_settings(command: str) -> None:
    result = run(command)
    assert result.exit_code == 1
    assert "DATABASE_URL: is not set; expected a URL such as postgresql://" in result.stderr


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ("nope", "there is no such model here; try"),
        ("gpt-image-2", "gpt-image-2 cannot be rendered here: no key for openai: set OPENAI_API_KEY"),
    ],
)
def test_a_worker_for_what_it_cannot_serve(models: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, url in {"DATABASE_URL": "postgresql:///x", "REDIS_URL": "redis://x", "STORAGE_URL": "file:///x"}.items():
        monkeypatch.setenv(name, url)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    result = run("worker", "--models", models)
    assert result.exit_code == 1
    assert said in result.stderr


def test_up_refuses_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(cli, ["up", "--listen", f"127.0.0.1:{port}", "--models", "fake"])
    assert result.exit_code == 1
    assert f"cannot listen on 127.0.0.1:{port} (Address already in use)" in result.stderr
    assert f"--listen 127.0.0.1:{port + 1 if port < 65535 else 8001}" in result.stderr
    assert not (tmp_path / "farm-data" / "postgres").exists()


def test_a_locked_data_folder_is_told_with_its_holder(tmp_path: Path) -> None:
    lock = lock_folder(tmp_path, print, threading.Event())
    try:
        with pytest.raises(FarmError, match=rf"a farm already runs on .* \(process {os.getpid()}\)"):
            lock_folder(tmp_path, print, threading.Event())
    finally:
        os.close(lock)
    os.close(lock_folder(tmp_path, print, threading.Event()))


def test_processes_join_the_farm_of_the_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("farm-data").mkdir()
    joined = {"database_url": "postgresql:///here", "redis_url": "redis://here", "storage_url": "file:///here"}
    write_private(Path("farm-data/farm.json"), {**joined, "catalogue": "c.toml", "listen": "127.0.0.1:9"})
    assert process_settings().database_url.get_secret_value() == "postgresql:///here"
    s3 = {"s3_endpoint_url": "http://s3:9000", "s3_access_key": "a", "s3_secret_key": "b"}
    write_join_file(Path("farm-data"), load_settings(**joined, **s3))
    assert Path("farm-data/farm.json").stat().st_mode & 0o777 == 0o600
    found = process_settings()
    assert (found.s3_endpoint_url, found.s3_region) == ("http://s3:9000", "us-east-1")
    assert found.s3_secret_key
    assert found.s3_secret_key.get_secret_value() == "b"
    monkeypatch.setenv("DATABASE_URL", "postgresql:///there")
    with pytest.raises(SettingsError, match="REDIS_URL: is not set"):
        process_settings()


def test_request_errors_name_field_and_remedy_once() -> None:
    faults = [
        Fault("/jobs/3/width", "off-grid", "must be a multiple of 8"),
        Fault("/model", "unknown-model", "try fake"),
    ]
    error = FarmRequestError(422, "The request is not valid.", "/jobs/3/width: must be a multiple of 8; …", "x", faults)
    assert error.detail == "The request is not valid.\n  jobs[3].width: must be a multiple of 8\n  model: try fake"


def test_doctor_without_a_farm() -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "no farm is named and none runs here" in result.stdout
    assert "all well" in result.stderr


def test_doctor_tells_what_does_not_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    port = closed_port()
    monkeypatch.setenv("DATABASE_URL", f"postgresql://u:secret@127.0.0.1:{port}/x")
    monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{port}/0")
    monkeypatch.setenv("STORAGE_URL", f"file://{tmp_path}/objects")
    result = run("doctor")
    assert result.exit_code == 1
    marks = {line.split()[1]: line.split()[0] for line in result.stdout.splitlines() if line.strip()}
    assert (marks["PostgreSQL"], marks["Redis"], marks["storage"]) == ("✘", "✘", "✔")
    assert "2 to mend" in result.stderr
    assert "secret" not in result.output


def test_our_errors_are_one_red_text_and_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(error: BaseException) -> Result:
        @click.command()
        def broken() -> None:
            raise error

        monkeypatch.setattr(cli, "get_command", lambda *_: broken)
        return run("broken")

    assert raising(FarmUnreachable("gone")).stderr == "error: gone\n"
    denied = raising(PermissionError(13, "Permission denied", "/x"))
    assert (denied.exit_code, denied.stderr) == (1, "error: /x: Permission denied\n")
    assert raising(KeyboardInterrupt()).exit_code == 130


def test_an_interrupt_of_the_real_program_shows_no_traceback() -> None:
    code = "import os, signal\nfrom imagefarm import client, cli\n"
    code += f"client.Farm.__init__ = lambda self: os.kill(os.getpid(), {int(signal.SIGINT)})\ncli.main()"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, "status"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


def test_stdin_is_read_once_and_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> bytes:
        raise AssertionError("not asked for")

    assert prompt_files.read_arguments(["a"], never, lambda _: {})[0].prompt == "a"


def test_the_guardian_needs_nothing_but_python() -> None:
    script = PROJECT_ROOT / "imagefarm" / "guardian.py"
    done = subprocess.run([sys.executable, "-I", "-S", str(script), "1"], input="", text=True, check=False, timeout=10)
    assert done.returncode == 0
