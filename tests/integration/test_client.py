"""The Python client against a real farm: API, keeper, worker, PostgreSQL, Redis."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from imagefarm import Batch, Farm, FarmError, FarmRequestError, FarmUnreachable, Job
from imagefarm.connection import read_client_file
from imagefarm.download import FileNames
from tests.farm import free_port, wait_for


def test_submit_wait_and_look(farm: Farm) -> None:
    seen: list[int] = []
    batch = farm.submit(
        ["a", "b"],
        model="fake",
        parameters={"seed": 7, "width": 32},
        num_images=2,
        name="two",
        priority="high",
    )
    assert (batch.job_count, batch.name, batch.model, batch.priority) == (4, "two", "fake", "high")
    done = batch.wait(30, on_progress=lambda now: seen.append(now.ended))
    assert done.done
    assert (done.succeeded, done.failed, done.ended) == (4, 0, 4)
    assert seen[-1] == 4
    jobs = list(batch.jobs())
    assert [(job.index, job.prompt, job.seed) for job in jobs] == [(0, "a", 7), (1, "a", 8), (2, "b", 7), (3, "b", 8)]
    assert all(job.done and job.image and job.image.width == 32 for job in jobs)
    assert jobs[0].refresh().id == jobs[0].id
    assert farm.batch(batch.id).parameters["width"] == 32
    assert next(farm.batches()).id == batch.id


def test_jobs_bring_their_own_parameters(farm: Farm) -> None:
    batch = farm.submit(jobs=[{"prompt": "a", "width": 16}, {"prompt": "b", "fault": "permanent"}], model="fake").wait(
        30
    )
    (good,) = batch.jobs(["succeeded"])
    (bad,) = batch.jobs(["failed", "canceled"])
    assert good.image
    assert good.image.width == 16
    assert bad.error
    assert "permanent fault" in bad.error.detail
    with pytest.raises(FarmError, match="has no picture: it is failed"):
        bad.read()


def test_lists_are_read_page_by_page(farm: Farm) -> None:
    batch = farm.submit(["p"] * 2100, model="fake", parameters={"width": 1, "height": 1})
    assert [job.index for job in farm.jobs(batch)] == list(range(2100)), "a page holds at most a thousand"
    batch.cancel()


def test_waiting_for_a_job(farm: Farm) -> None:
    batch = farm.submit("slow", model="fake", parameters={"step_seconds": 0.5})
    (job,) = batch.jobs()
    began = time.monotonic()
    assert farm.job(job, wait=0.05).state in {"queued", "rendering"}
    assert job.wait(30).state == "succeeded"
    assert 0.2 < time.monotonic() - began < 10
    with pytest.raises(TimeoutError):
        farm.submit("slower", model="fake", parameters={"step_seconds": 1.0}).wait(0.1)


def test_the_same_idempotency_key_submits_once(farm: Farm) -> None:
    first = farm.submit("once", model="fake", idempotency_key="a-key-of-mine")
    assert farm.submit("once", model="fake", idempotency_key="a-key-of-mine").id == first.id
    with pytest.raises(FarmRequestError):
        farm.submit("twice", model="fake", idempotency_key="a-key-of-mine")
    assert farm.submit("once", model="fake").id != first.id


def test_cancel(farm: Farm) -> None:
    batch = farm.submit(["p"] * 200, model="fake", parameters={"step_image_seconds": 0.05})
    first = next(batch.jobs())
    farm.cancel(batch)
    farm.cancel(batch.id)
    ended = batch.wait(30)
    assert ended.state == "canceled"
    assert ended.canceled > 100
    farm.cancel(first)
    assert first.refresh().done


def test_refusals_are_readable(farm: Farm) -> None:
    with pytest.raises(FarmRequestError) as caught:
        farm.submit(jobs=[{"prompt": "a"}, {"prompt": "b", "width": -1, "stepps": 1}], model="fake")
    assert caught.value.status == 422
    assert {fault.pointer for fault in caught.value.errors} == {"/jobs/1/width", "/jobs/1/stepps"}
    assert "jobs[1].stepps: stepps is not a parameter of fake" in str(caught.value)
    with pytest.raises(FarmRequestError, match="there is no such model here; try"):
        farm.submit("a", model="fakke")
    with pytest.raises(FarmRequestError, match="There is no such batch"):
        farm.batch("batch_" + "0" * 32)
    with pytest.raises(FarmRequestError, match="IMAGEFARM_API_KEY"):
        Farm(farm.url, "imf_wrong").models()
    with pytest.raises(ValueError, match="one of the two"):
        farm.submit()


def test_a_port_where_no_farm_is(farm: Farm) -> None:
    with pytest.raises(FarmUnreachable, match="is a farm running"):
        Farm(f"http://127.0.0.1:{free_port()}", "imf_x").models()
    with pytest.raises(FarmRequestError):
        Farm(farm.url + "/elsewhere", "imf_x").models()


def test_models_and_workers(farm: Farm) -> None:
    (worker,) = wait_for(farm.workers, what="a worker that says hello")
    assert worker.alive
    assert worker.models == ["fake"]
    models = {model.name: model for model in farm.models()}
    assert models["fake"].served
    assert models["fake"].parameters["width"]["type"] == "integer"
    assert farm.default_model() == "fake"


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_download_checks_names_and_resumes(farm: Farm, finished: Batch, tmp_path: Path) -> None:
    expected = {f"{job.index:06d}.png": job.image.sha256 for job in finished.jobs() if job.image}
    progress: list[tuple[int, int]] = []
    done = farm.download(finished, tmp_path / "p", on_progress=lambda count, total: progress.append((count, total)))
    assert (done.saved, done.present) == (12, 0)
    assert progress == [(n, 12) for n in range(1, 13)]
    assert digests(tmp_path / "p") == expected
    with Image.open(tmp_path / "p" / "000003.png") as picture:
        picture.verify()

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "p").iterdir()}
    (tmp_path / "p" / "000001.png").unlink()
    cut = tmp_path / "p" / "000002.png"
    cut.write_bytes(cut.read_bytes()[:100])
    (tmp_path / "p" / "000003.png").write_bytes(b"")
    again = finished.download(tmp_path / "p")
    assert (again.saved, again.present) == (3, 9)
    assert digests(tmp_path / "p") == expected
    untouched = [path for path in times if path.stem not in {"000001", "000002", "000003"}]
    assert all(path.stat().st_mtime_ns == times[path] for path in untouched)


def test_download_does_not_replace_other_pictures(farm: Farm, finished: Batch, tmp_path: Path) -> None:
    mine = tmp_path / "000004.png"
    mine.write_bytes(b"something of mine")
    with pytest.raises(FarmError, match=r"000004\.png exists and is not the picture of job_"):
        finished.download(tmp_path)
    assert mine.read_bytes() == b"something of mine"
    farm.download(finished, tmp_path, overwrite=True)
    assert mine.read_bytes() != b"something of mine"


def test_download_templates(finished: Batch, tmp_path: Path) -> None:
    finished.download(tmp_path / "a", "{model}/{prompt}-{seed}.{ext}")
    assert sorted(digests(tmp_path / "a"))[:2] == ["fake/picture-0-5.png", "fake/picture-1-5.png"]
    with pytest.raises(FarmError, match=r"would both become '5\.png'"):
        finished.download(tmp_path / "b", "{seed}.{ext}")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("../{index}.png", "is not a file inside the folder"),
        ("/tmp/{index}.png", "is not a file inside the folder"),
        ("a/../../{index}.png", "is not a file inside the folder"),
        ("out/{index}.png", "would leave the folder"),
        ("{nope}.png", "{nope} is not known; the fields are batch, ext, index, job, model, prompt, seed"),
        ("{index.__class__}.png", "is not known"),
        ("{index", "is not right"),
        ("{index:zz}", "is not right"),
        ("{}", "is not known"),
    ],
)
def test_no_template_leaves_the_folder(finished: Batch, tmp_path: Path, template: str, said: str) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "out").symlink_to(tmp_path)
    with pytest.raises(FarmError) as caught:
        finished.download(tmp_path / "p", template)
    assert said in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*.png")] == []


def test_no_prompt_leaves_the_folder(farm: Farm, tmp_path: Path) -> None:
    prompts = ["../../etc/passwd", "a/b\\c", "..", "\u202e x", "星 ★", "w" * 5000]
    batch = farm.submit(prompts, model="fake").wait(30)
    batch.download(tmp_path, "{prompt}.{ext}")
    assert sorted(digests(tmp_path)) == sorted(
        ["etc-passwd.png", "a-b-c.png", "untitled.png", "x.png", "星.png", "w" * 100 + ".png"]
    )


def test_what_arrives_damaged_is_not_kept(
    farm: Farm, finished: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = farm._connection.fetch
    calls: dict[str, int] = {}

    def damaged(path: str) -> bytes:
        calls[path] = calls.get(path, 0) + 1
        data = fetch(path)
        broken = path.endswith("_3/image") or (path.endswith("_4/image") and calls[path] == 1)
        return data[:-1] + b"x" if broken else data

    monkeypatch.setattr(farm._connection, "fetch", damaged)
    with pytest.raises(FarmError, match="1 of 12 pictures were not downloaded") as caught:
        farm.download(finished, tmp_path)
    assert "did not arrive as it was stored" in str(caught.value)
    assert len(digests(tmp_path)) == 11
    assert not (tmp_path / "000003.png").exists()


def test_file_names_of_a_job_without_seed_or_known_type(farm: Farm, tmp_path: Path) -> None:
    body = {
        "id": "job_1",
        "batch_id": "batch_1",
        "index": 3,
        "model": "m",
        "state": "succeeded",
        "image": {"url": "u", "sha256": "0", "content_type": "image/avif"},
    }
    assert FileNames(tmp_path, "{index}-{seed}.{ext}").path(Job.of(farm, body)).name == "3-0.bin"


def test_numbers_that_no_request_can_hold(farm: Farm) -> None:
    with pytest.raises(FarmError, match="NaN"):
        farm.submit("a", model="fake", parameters={"step_seconds": float("nan")})


def test_the_url_may_name_the_api_itself(farm: Farm, data: Path) -> None:
    address = read_client_file(data)
    assert address is not None
    with Farm(f"{address.url}/api/v1/", address.api_key) as same:
        assert same.url == farm.url
        assert same.models()


def test_threads_share_a_farm(farm: Farm, finished: Batch) -> None:
    jobs = list(finished.jobs())
    pictures: list[bytes] = []
    threads = [threading.Thread(target=lambda job=job: pictures.append(farm.image(job))) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pictures) == len(jobs)
    assert all(Image.open(io.BytesIO(data)).size == (64, 64) for data in pictures)
