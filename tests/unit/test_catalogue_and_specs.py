"""The catalogue and the specs: what a model takes, and how precisely a wrong parameter is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shared.catalogue import Catalogue, load_catalogue
from shared.errors import CatalogueError, InvalidInput, UnknownModel
from shared.settings import PROJECT_ROOT
from shared.specs import backends, spec_class
from worker.backends import backends as engines


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return load_catalogue(PROJECT_ROOT / "models" / "catalogue.toml")


def test_every_engine_has_a_spec() -> None:
    assert engines() == backends()


@pytest.mark.parametrize("backend", backends())
def test_per_image_fields_exist_and_do_not_change_the_batch_key(backend: str) -> None:
    spec_type = spec_class(backend)
    assert spec_type.model_fields.keys() >= spec_type.PER_IMAGE
    one = spec_type.model_validate({"prompt": "a", "seed": 1})
    other = spec_type.model_validate({"prompt": "b", "seed": 2, "output_format": "webp"})
    assert one.batch_key("m", "r") == other.batch_key("m", "r")
    assert one.batch_key("m", "r") != one.batch_key("m", "r2") != one.batch_key("m2", "r")
    assert -(2**63) <= one.batch_key("m", "r") < 2**63


def test_what_changes_the_pass_changes_the_batch_key() -> None:
    spec_type = spec_class("stable_diffusion")
    keys = {
        spec_type.model_validate({"prompt": "a", **fields}).batch_key("m", "r")
        for fields in ({}, {"width": 64}, {"num_inference_steps": 5}, {"guidance_scale": 1.0}, {"scheduler": "ddim"})
    }
    assert len(keys) == 5


@pytest.mark.parametrize(
    ("parameters", "pointer", "code", "words"),
    [
        ({"width": 65}, "/width", "off-grid", "64 or 72"),
        ({"width": "64"}, "/width", "int-type", "integer"),
        ({"width": 64.5}, "/width", "int-type", "integer"),
        ({"width": True}, "/width", "int-type", "integer"),
        ({"width": 0}, "/width", "out-of-range", "8"),
        ({"width": 512}, "/width", "out-of-range", "32 to 256"),
        ({"num_inference_steps": -1}, "/num_inference_steps", "out-of-range", "1"),
        ({"num_inference_steps": 999}, "/num_inference_steps", "out-of-range", "150"),
        ({"guidance_scale": float("nan")}, "/guidance_scale", "not-finite", "finite"),
        ({"guidance_scale": float("inf")}, "/guidance_scale", "not-finite", "finite"),
        ({"guidance_scale": "7"}, "/guidance_scale", "float-type", "number"),
        ({"seed": 2**63}, "/seed", "out-of-range", "9223372036854775807"),
        ({"seed": -1}, "/seed", "out-of-range", "0"),
        ({"scheduler": "magic"}, "/scheduler", "literal-error", "ddim"),
        ({"prompt": "a\0b"}, "/prompt", "invalid-text", "NUL"),
        ({"prompt": "\ud800"}, "/prompt", "invalid-text", "surrogate"),
        ({"prompt": "   "}, "/prompt", "empty", "empty"),
        ({"prompt": "x" * 2001}, "/prompt", "too-long", "2000"),
        ({"negative_prompt": "\0"}, "/negative_prompt", "invalid-text", "NUL"),
        ({"num_inference_step": 3}, "/num_inference_step", "unknown-field", "did you mean num_inference_steps"),
        ({"class_index": 3}, "/class_index", "unknown-field", "known are"),
    ],
)
def test_a_wrong_parameter_is_named(
    catalogue: Catalogue, parameters: dict[str, Any], pointer: str, code: str, words: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        catalogue["demo-diffusion"].resolve({"prompt": "a circle", **parameters})
    fault = caught.value.faults[0]
    assert (fault.pointer, fault.code) == (pointer, code)
    assert words in fault.detail


def test_a_class_conditional_gan_needs_a_known_class(catalogue: Catalogue) -> None:
    gan = catalogue["demo-gan"]
    assert gan.resolve({"class_index": 6}).model_dump()["truncation_psi"] == 1.0
    for parameters in ({}, {"class_index": 7}, {"class_index": 1, "truncation_psi": 2.5}):
        with pytest.raises(InvalidInput):
            gan.resolve(parameters)


def test_a_hosted_model_refuses_a_seed_and_what_its_vendor_does_not_take(catalogue: Catalogue) -> None:
    hosted = catalogue["gpt-image-2"]
    assert hosted.resolve({"prompt": "a", "quality": "low"})
    for parameters in ({"seed": 1}, {"quality": "hd"}, {"style": "vivid"}, {"size": "big"}):
        with pytest.raises(InvalidInput):
            hosted.resolve({"prompt": "a", **parameters})


def test_published_ranges_are_those_that_are_enforced(catalogue: Catalogue) -> None:
    checked = 0
    for entry in catalogue.values():
        classes = {"class_index": 0} if entry.limits.num_classes else {}
        for name, published in entry.parameters().items():
            schema = next((form for form in published.get("anyOf", []) if form["type"] != "null"), published)
            step = schema.get("multipleOf", 1)
            good = [schema[word] for word in ("minimum", "maximum") if word in schema] + schema.get("enum", [])
            bad: list[Any] = [schema["minimum"] - step] if "minimum" in schema else []
            bad += [schema["maximum"] + step] if "maximum" in schema else []
            bad += ["x" * (schema["maxLength"] + 1)] if "maxLength" in schema else []
            bad += ["magic"] if "enum" in schema else []
            for value in good:
                entry.resolve({"prompt": "a", **classes, name: value})
            for value in bad:
                with pytest.raises(InvalidInput):
                    entry.resolve({"prompt": "a", **classes, name: value})
                checked += 1
    assert checked > 50


def test_parameters_that_a_model_does_not_take_are_not_published(catalogue: Catalogue) -> None:
    hosted = catalogue["gpt-image-2"].parameters()
    assert not {"seed", "style"} & hosted.keys()
    assert hosted["quality"]["anyOf"][0]["enum"] == ["auto", "low", "medium", "high"]
    assert catalogue["demo-diffusion"].parameters()["guidance_scale"]["default"] == 3.0


@pytest.mark.parametrize("name", ["demo-difusion", "../../etc/passwd", "/etc/passwd", "http://x", "%2e%2e", ""])
def test_an_unknown_model_is_refused_with_names_that_exist(catalogue: Catalogue, name: str) -> None:
    with pytest.raises(UnknownModel, match=r"try .*\w"):
        catalogue.find(name)


GOOD_ENTRY = '[models.m]\nbackend = "stable_diffusion"\nfolder = "m"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[models", "cannot be read"),
        ("", "holds no models"),
        ("[model.m]\n", "unknown table 'model'"),
        ("models = 3\n", "every model is a table"),
        ("[models]\nx = 3\n", "every model is a table"),
        ('[models.m]\nname = "n"\nbackend = "fake"\n', "leave the field out"),
        ('[models.m]\nbackend = "magic"\n', "backend 'magic' is unknown"),
        ('[models."../m"]\nbackend = "fake"\n', "not a model name"),
        ('[models.m]\nbackend = "magic"\nfolder = "m"\n', "backend 'magic' is unknown"),
        ('[models.m]\nbackend = "stable_diffusion"\n', "exactly one of folder, hub, hosted"),
        (GOOD_ENTRY + "typo = 1\n", "typo"),
        (GOOD_ENTRY + "defaults = { width = 65 }\n", "/defaults/width"),
        (GOOD_ENTRY + "defaults = { steps = 5 }\n", "steps is not a parameter"),
        (
            '[models.m]\nbackend = "stable_diffusion"\nhub = { repo = "a/b", revision = "main" }\n',
            "full 40-digit commit",
        ),
    ],
)
def test_a_wrong_catalogue_names_the_file_and_the_fault(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "catalogue.toml"
    path.write_text(text)
    with pytest.raises(CatalogueError) as caught:
        load_catalogue(path)
    assert words in caught.value.detail
    assert str(path) in caught.value.detail


def test_folders_are_relative_to_the_catalogue(tmp_path: Path) -> None:
    (tmp_path / "catalogue.toml").write_text(GOOD_ENTRY)
    assert load_catalogue(tmp_path / "catalogue.toml")["m"].folder == tmp_path / "m"
