"""Settings: every wrong or missing value is one readable line, and no secret is ever shown."""

from __future__ import annotations

import pytest

from shared.errors import SettingsError
from shared.settings import Settings, environment_of, load_client_settings, load_settings

GOOD = {"database_url": "postgresql://u:hunter2@h/d", "redis_url": "redis://:hunter2@h", "storage_url": "file:///x"}


def test_missing_urls_are_named_with_an_example() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings()
    lines = caught.value.detail.splitlines()
    assert [line.split(":")[0] for line in lines] == ["DATABASE_URL", "REDIS_URL", "STORAGE_URL"]
    assert "postgresql://" in lines[0]


@pytest.mark.parametrize(
    ("field", "value", "variable", "expected"),
    [
        ("database_url", "mysql://u:hunter2@h/d", "DATABASE_URL", "postgresql://"),
        ("redis_url", "amqp://h:hunter2", "REDIS_URL", "redis://"),
        ("database_url", "postgresql://u:hunter2/x@h/d", "DATABASE_URL", "%2F"),
        ("redis_url", "redis://:hunter2@h:port/0", "REDIS_URL", "port"),
        ("storage_url", "/srv/images", "STORAGE_URL", "s3://bucket/prefix"),
        ("listen", "8000", "IMAGEFARM_LISTEN", "HOST:PORT"),
        ("lease_seconds", "soon", "IMAGEFARM_LEASE_SECONDS", "number"),
        ("lease_seconds", -1, "IMAGEFARM_LEASE_SECONDS", "greater than 0"),
        ("api_threads", 1, "IMAGEFARM_API_THREADS", "greater than or equal to 2"),
        ("log_level", "LOUD", "IMAGEFARM_LOG_LEVEL", "DEBUG"),
        ("s3_endpoint_url", "localhost:9000", "S3_ENDPOINT_URL", "https://"),
    ],
)
def test_a_wrong_value_names_the_variable_and_what_was_expected(
    field: str, value: object, variable: str, expected: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(**{**GOOD, field: value})
    assert caught.value.detail.startswith(f"{variable}: ")
    assert expected in caught.value.detail
    assert "hunter2" not in caught.value.detail


def test_figures_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(SettingsError, match="half of IMAGEFARM_LEASE_SECONDS"):
        load_settings(**GOOD, lease_seconds=10, heartbeat_seconds=9)
    with pytest.raises(SettingsError, match="go together"):
        load_settings(**GOOD, s3_access_key="a")


def test_a_misspelled_variable_is_refused_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEFARM_LEASE_SECOND", "3")
    with pytest.raises(SettingsError, match="did you mean IMAGEFARM_LEASE_SECONDS"):
        load_settings(**GOOD)


def test_secrets_are_not_shown() -> None:
    settings = load_settings(**GOOD, openai_api_key="hunter2", provider_keys={"x": "hunter2"})
    assert "hunter2" not in repr(settings) + str(settings) + settings.model_dump_json()


def test_settings_cannot_be_changed() -> None:
    settings = load_settings(**GOOD)
    with pytest.raises(ValueError, match="frozen"):
        settings.listen = "0.0.0.0:1"  # type: ignore[misc]


def test_the_environment_of_a_child_loads_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(**GOOD, lease_seconds=62.5, provider_keys={"gateway": "k"}, catalogue="/c.toml")
    for name, value in environment_of(settings).items():
        monkeypatch.setenv(name, value)
    assert load_settings() == settings


def test_provider_keys_are_found_by_name() -> None:
    settings = load_settings(**GOOD, openai_api_key="a", provider_keys={"mine": "b"})
    found = {name: settings.provider_key(name) for name in ("openai", "mine", "other")}
    assert {name: key.get_secret_value() for name, key in found.items() if key} == {"openai": "a", "mine": "b"}


def test_client_settings_need_nothing() -> None:
    assert load_client_settings().url is None


def test_every_setting_says_what_it_is() -> None:
    assert Settings.model_fields.keys() >= {"database_url", "redis_url", "storage_url", "catalogue", "listen"}
