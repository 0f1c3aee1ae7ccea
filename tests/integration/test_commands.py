"""The command line against a real farm: API, keeper, worker, PostgreSQL, Redis."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from imagefarm import Batch, Farm, FarmRequestError
from tests.farm import free_port, wait_for
from tests.integration.conftest import Run


def test_submit_files_watch_and_download(run: Run, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("\ufeffprompt;seed;width\na red circle;3;16\na star;;\n", encoding="utf-8")
    result = run("submit", "p.csv", "--model", "fake", "--height", "24", "--watch", "--download", "pictures")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("batch_")
    assert len(result.stdout.splitlines()) == 1
    assert "✔ p.csv · fake: 2 succeeded" in result.stderr
    with Image.open(tmp_path / "pictures" / "000000.png") as picture:
        assert picture.size == (16, 24)


def test_submit_standard_input_and_the_model_is_chosen(run: Run) -> None:
    result = run("submit", "-", "-n", "2", "-p", "width=16", stdin='{"prompt": "a", "seed": 1}\n"b"\n')
    assert result.exit_code == 0, result.output
    assert "using the model fake" in result.stderr
    assert run("watch", result.stdout.strip()).exit_code == 0
    assert "4/4" in run("status").stdout


def test_a_model_column_makes_a_batch_for_each_model(run: Run, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(
        '{"prompt":"a","model":"fake"}\n{"prompt":"b","model":"demo-gan","class_index":1}\n'
    )
    result = run("submit", "p.jsonl")
    assert result.exit_code == 0, result.output
    ids = result.stdout.split()
    assert len(ids) == 2
    assert "no worker serves demo-gan now" in result.stderr
    assert run("cancel", *ids).exit_code == 0


def test_faults_of_the_farm_name_the_line_of_the_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,width\n\na,16\nb,99999\n")
    result = run("submit", "p.csv", "--model", "fake")
    assert result.exit_code == 1
    assert "p.csv line 4, width: " in result.stderr
    assert "'x' is not a whole number" in run("submit", "a", "--model", "fake", "-p", "width=x").stderr
    assert "the farm has no model 'nope'" in run("submit", "a", "--model", "nope").stderr


def test_watch_ends_with_3_where_images_failed(run: Run) -> None:
    result = run("submit", "a", "b", "--model", "fake", "-p", "fault=permanent", "--watch")
    assert result.exit_code == 3
    assert "2 failed" in result.stderr
    assert "permanent fault" in result.stderr


def test_the_other_commands(run: Run, finished: Batch, tmp_path: Path) -> None:
    assert "12 succeeded" in run("status", finished.id).stdout
    assert "✔ 12 pictures saved in p" in run("download", finished.id, "p").stderr
    assert "12 were there already" in run("download", finished.id, "p").stderr
    assert "fake" in run("models").stdout
    assert "step_seconds" in run("models", "fake").stdout
    assert "fake" in run("workers").stdout
    assert "12 of 12 images were done" in run("cancel", finished.id).stderr
    assert "is not an id" in run("cancel", "nonsense").stderr
    assert "nothing to do" in run("migrate").stdout


def test_what_others_wrote_is_shown_as_it_is(run: Run) -> None:
    name = "[/red] [cat] :heart: \x1b[31m 日本\u3000語"
    batch = run("submit", "a", "--model", "fake", "--name", name, "--watch").stdout.strip()
    for result in (run("status"), run("status", batch)):
        assert result.exit_code == 0, result.output
        assert "[/red] [cat] :heart: �[31m 日本\u3000語" in result.stdout
    assert run("watch", batch).stderr.startswith("✔ [/red] [cat] :heart: �[31m")


def test_an_id_stays_in_the_list_on_a_narrow_terminal(
    run: Run, finished: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    assert finished.id in run("status").stdout


@pytest.mark.parametrize("id_", ["../models", "a b?c#d", "%2e%2e/models", "batch_1", "batch_\udcff"])
def test_an_id_that_is_none(run: Run, id_: str) -> None:
    result = run("status", id_)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.exception is None or isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("options", [("--download", "/dev/null/x"), ("--download", "x", "--template", "{nope}")])
def test_a_download_that_cannot_work_is_refused_before_anything_is_submitted(run: Run, options: tuple[str]) -> None:
    result = run("submit", "a", "--model", "fake", *options)
    assert result.exit_code == 1
    assert result.stdout == ""


def test_a_proxy_has_no_part_in_reaching_this_machine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    assert run("status").exit_code == 0
    assert "✘ API" not in run("doctor").stdout


@pytest.mark.parametrize(
    "options",
    [
        ("--tenant", "w", "--weight", "nan"), ("--tenant", "w", "--weight", "inf"), ("--tenant", "w", "--weight", "0"),
        ("--tenant", " "), ("--tenant", "x" * 5000), ("--tenant", "\udcff"), ("--tenant", "w", "--name", "\udcff"),
    ],
)  # fmt: skip
def test_tenants_and_keys_that_would_harm_are_refused(run: Run, options: tuple[str, ...]) -> None:
    result = run("key", "create", *options)
    assert result.exit_code in (1, 2)
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


def test_keys(run: Run, farm: Farm) -> None:
    made = run("key", "create", "--tenant", "alice", "--name", "laptop")
    key = made.stdout.strip()
    with Farm(farm.url, key) as alice:
        assert list(alice.batches()) == []
        assert "laptop" in run("key", "list").stdout
        assert run("key", "revoke", key).exit_code == 0
        with pytest.raises(FarmRequestError) as caught:
            list(alice.batches())
        assert caught.value.status == 401
    assert "there is no key" in run("key", "revoke", "imf_nothing").stderr


def test_doctor_finds_the_farm_well(run: Run) -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    marks = {line.split()[1]: line.split()[0] for line in result.stdout.splitlines()}
    assert {marks[name] for name in ("PostgreSQL", "Redis", "storage", "catalogue", "API")} == {"✔"}
    assert "1 worker(s) alive" in result.stdout


def test_control(run: Run, farm: Farm) -> None:
    slow = farm.submit(["p"] * 200, model="fake", parameters={"step_image_seconds": 0.05}, name="slow")
    batch = farm.submit(["p"] * 3, model="fake", priority="low", retention_seconds=86_400)
    assert "is paused: its batch is paused" in run("pause", batch.id).stderr
    assert "waits       its batch is paused" in run("status", batch.id).stdout
    assert batch.refresh().retention_seconds == 86_400
    assert run("prioritize", batch.id, "high").exit_code == 0
    assert batch.refresh().priority == "high"
    assert "goes on" in run("resume", batch.id).stderr
    assert batch.wait(30).succeeded == 3
    assert "is called off" in run("cancel", slow.id).stderr
    canceled = slow.wait(30)
    again = next(canceled.jobs(["canceled"]))
    assert run("pause", "--model", "fake").exit_code == 0
    assert "1 job is queued again" in run("retry", again.id).stderr
    wait_for(lambda: again.refresh().state_reason == "the model fake is paused", what="the reason")
    assert "fake" in run("queues").stdout
    assert run("resume", "--model", "fake").exit_code == 0
    assert again.wait(30).state == "succeeded"
    failed = farm.submit(jobs=[{"prompt": "x", "fault": "permanent"}], model="fake").wait(30)
    assert "0 jobs are queued again" in run("retry", failed.id, "--error-class", "other").stderr
    assert "1 job is queued again" in run("retry", failed.id, "--error-class", "asked_for").stderr
    for wrong in (("pause",), ("retry", "nonsense"), ("prioritize", batch.id, "urgent")):
        assert run(*wrong).exit_code in (1, 2)


def test_operating(run: Run, farm: Farm) -> None:
    [worker] = [one for one in farm.workers() if one.alive]
    assert "claims nothing more" in run("drain", worker.host).stderr
    wait_for(lambda: farm.workers()[0].state == "draining", what="the drain to be noticed")
    batch = farm.submit("p", model="fake")
    assert batch.refresh().state_reason == "no live worker serves fake"
    assert "claims again" in run("undrain", worker.id).stderr
    assert batch.wait(30).succeeded == 1
    assert "no worker or machine is called" in run("drain", "nobody").stderr
    assert "local" in run("tenants").stdout
    assert run("cap", "local", "5").exit_code == 0
    assert "at most 5" in run("tenants").stdout
    assert farm.submit(["p"] * 40, model="fake").wait(30).succeeded == 40
    assert run("cap", "local", "none").exit_code == 0
    assert run("cap", "local", "0").exit_code == 2
    assert "no tenant" in run("cap", "nobody", "3").stderr
