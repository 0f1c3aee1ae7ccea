"""Planning a submission: seeds, overrides, batch keys, and the faults of each item."""

from __future__ import annotations

from typing import Any

import pytest

from shared.catalogue import Catalogue, load_catalogue
from shared.errors import InvalidInput
from shared.plan import Plan, plan
from shared.settings import PROJECT_ROOT
from shared.specs import MAX_SEED


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return load_catalogue(PROJECT_ROOT / "models" / "catalogue.toml")


def planned(catalogue: Catalogue, parameters: dict[str, Any], **items: Any) -> Plan:
    return plan(catalogue["demo-diffusion"], parameters, **{"max_jobs": 1000, **items})


def faults(catalogue: Catalogue, parameters: dict[str, Any], **items: Any) -> list[tuple[str, str]]:
    with pytest.raises(InvalidInput) as caught:
        planned(catalogue, parameters, **items)
    return [(fault.pointer, fault.code) for fault in caught.value.faults]


def test_image_k_of_a_prompt_uses_seed_plus_k(catalogue: Catalogue) -> None:
    jobs = list(planned(catalogue, {"seed": 5}, prompts=["a", "b"], num_images=3).jobs())
    assert [(job.prompt, job.seed) for job in jobs] == [("a", 5), ("a", 6), ("a", 7), ("b", 5), ("b", 6), ("b", 7)]


def test_without_a_seed_every_image_draws_its_own(catalogue: Catalogue) -> None:
    seeds = [job.seed for job in planned(catalogue, {}, prompts=["a"], num_images=100).jobs()]
    assert len(set(seeds)) > 95
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_the_shared_parameters_hold_the_models_defaults(catalogue: Catalogue) -> None:
    parameters = planned(catalogue, {"guidance_scale": 5}, prompts=["a"]).parameters
    assert (parameters["width"], parameters["guidance_scale"]) == (64, 5.0)
    assert "prompt" not in parameters
    assert "seed" not in parameters


def test_jobs_keep_only_what_differs(catalogue: Catalogue) -> None:
    jobs = list(
        planned(
            catalogue,
            {"width": 64},
            jobs=[{"prompt": "a"}, {"prompt": "b", "negative_prompt": "blue"}, {"prompt": "c", "width": 96, "seed": 9}],
        ).jobs()
    )
    assert [job.overrides for job in jobs] == [None, {"negative_prompt": "blue"}, {"width": 96}]
    assert jobs[0].batch_key == jobs[1].batch_key != jobs[2].batch_key
    assert jobs[2].seed == 9
    assert jobs[2].work > jobs[0].work


def test_each_wrong_item_is_named(catalogue: Catalogue) -> None:
    prompts = ["fine", "", "a\0", "\ud800", "x" * 2001, 7, None]
    assert faults(catalogue, {}, prompts=prompts) == [
        ("/prompts/1", "empty"),
        ("/prompts/2", "invalid-text"),
        ("/prompts/3", "invalid-text"),
        ("/prompts/4", "too-long"),
        ("/prompts/5", "string-type"),
        ("/prompts/6", "string-type"),
    ]
    jobs = [{"prompt": "a", "width": 65}, "text", {"width": 64}, {"prompt": "a", "colour": 1}]
    assert faults(catalogue, {}, jobs=jobs) == [
        ("/jobs/0/width", "off-grid"),
        ("/jobs/1", "object-type"),
        ("/jobs/2/prompt", "empty"),
        ("/jobs/3/colour", "unknown-field"),
    ]


def test_a_wrong_shared_parameter_is_said_once(catalogue: Catalogue) -> None:
    assert faults(catalogue, {"width": 65}, prompts=["a"] * 50) == [("/parameters/width", "off-grid")]
    assert faults(catalogue, {"width": 65}, jobs=[{"prompt": "a"}] * 50) == [("/parameters/width", "off-grid")]


def test_at_most_a_hundred_faults_are_listed(catalogue: Catalogue) -> None:
    assert len(faults(catalogue, {}, prompts=[""] * 500)) == 100
    assert len(faults(catalogue, {}, jobs=[{"prompt": ""}] * 500)) == 100


def test_nothing_and_too_much_are_refused(catalogue: Catalogue) -> None:
    assert faults(catalogue, {}, prompts=[]) == [("/prompts", "empty")]
    assert faults(catalogue, {}, jobs=[]) == [("/jobs", "empty")]
    assert faults(catalogue, {}, prompts=["a"] * 400, num_images=3) == [("/prompts", "too-many")]


def test_seeds_stay_in_range(catalogue: Catalogue) -> None:
    assert faults(catalogue, {"seed": MAX_SEED}, prompts=["a"], num_images=2) == [("/parameters/seed", "out-of-range")]
    assert next(iter(planned(catalogue, {"seed": MAX_SEED}, prompts=["a"]).jobs())).seed == MAX_SEED


def test_a_gan_takes_its_class_from_each_job(catalogue: Catalogue) -> None:
    made = plan(catalogue["demo-gan"], {}, jobs=[{"class_index": i} for i in range(7)], max_jobs=10)
    jobs = list(made.jobs())
    assert [{**made.parameters, **(job.overrides or {})}["class_index"] for job in jobs] == list(range(7))
    assert len({job.batch_key for job in jobs}) == 1, "classes share a pass"


def test_a_prompt_of_whitespace_and_marks_is_kept_as_it_is(catalogue: Catalogue) -> None:
    prompt = "\u202ea red\u200b circle\t\\n\n\u0301"
    assert next(planned(catalogue, {}, prompts=[prompt]).jobs()).prompt == prompt
