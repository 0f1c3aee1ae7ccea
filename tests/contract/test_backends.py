"""What every engine promises, checked on every file of the folder; then what the single engines add."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shared.catalogue import ModelEntry
from shared.errors import Canceled, Interrupted, OutOfMemory, Permanent, Transient
from shared.settings import Settings, load_settings
from shared.specs import RenderSpec, spec_class
from tests.fakes import tiny_models
from tests.fakes.openai_server import KEY, ImagesServer
from worker.backends import Backend, backends, open_backend
from worker.backends.stable_diffusion import SCHEDULERS


@pytest.fixture(scope="session")
def settings(_own_environment: None) -> Settings:
    return load_settings(
        database_url="postgresql://nowhere/x", redis_url="redis://nowhere", storage_url="file:///nowhere",
        openai_api_key=KEY,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models as small as these only lose time by sharing their work among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Subject:
    """An engine with a model for it, and what to ask of it."""

    entry: ModelEntry
    parameters: dict[str, Any]
    size: tuple[int, int]


@pytest.fixture(scope="session")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Subject]]:
    """One subject for each engine."""
    folder = tmp_path_factory.mktemp("models")
    diffusion = tiny_models.stable_diffusion(folder / "sd")
    dcgan = tiny_models.gan(folder / "dcgan", **tiny_models.SMALL_DCGAN)
    with ImagesServer() as vendor:
        hosted = {"provider": "openai", "base_url": vendor.base_url, "model": "gpt-image-2"}
        yield {
            "fake": Subject(ModelEntry(name="m", backend="fake"), {"num_inference_steps": 3}, (64, 64)),
            "gan": Subject(
                ModelEntry(name="m", backend="gan", folder=dcgan, limits={"num_classes": 3}),
                {"class_index": 1},
                (16, 16),
            ),
            "stable_diffusion": Subject(
                ModelEntry(
                    name="m", backend="stable_diffusion", folder=diffusion, dtype="float32", limits={"min_size": 16}
                ),
                {"width": 64, "height": 48, "num_inference_steps": 4, "guidance_scale": 3.0},
                (64, 48),
            ),
            "openai_images": Subject(ModelEntry(name="m", backend="openai_images", hosted=hosted), {}, (64, 48)),
        }


@pytest.fixture(params=backends())
def subject(request: pytest.FixtureRequest, subjects: dict[str, Subject]) -> Subject:
    return subjects[request.param]


@pytest.fixture
def open_model(settings: Settings) -> Iterator[Callable[[ModelEntry], Backend]]:
    """Opens and loads engines, and unloads them at the end."""
    opened: list[Backend] = []

    def load(entry: ModelEntry) -> Backend:
        backend = open_backend(entry, settings)
        backend.load()
        opened.append(backend)
        return backend

    yield load
    for backend in opened:
        backend.unload()


@pytest.fixture
def engine(subject: Subject, open_model: Callable[[ModelEntry], Backend]) -> Backend:
    return open_model(subject.entry)


def specs(subject: Subject, *seeds: int, **more: Any) -> list[RenderSpec]:
    takes_seed = spec_class(subject.entry.backend).TAKES_SEED
    return [
        subject.entry.resolve(
            {"prompt": "a red circle", **subject.parameters, **({"seed": s} if takes_seed else {}), **more}
        )
        for s in seeds
    ]


def render(engine: Backend, wanted: Sequence[RenderSpec]) -> list[NDArray[np.int16]]:
    return [np.asarray(one.image, np.int16) for one in engine.render(wanted, lambda done, total: None)]


#: a hosted model draws its own seeds
seeded = pytest.mark.parametrize("subject", [b for b in backends() if spec_class(b).TAKES_SEED], indirect=True)
#: PyTorch's own generator takes the low 32 bits of a seed; a known seed must mean what it means elsewhere
seeded_by_63_bits = pytest.mark.parametrize("subject", ["fake", "gan"], indirect=True)


def test_picture_i_belongs_to_spec_i(engine: Backend, subject: Subject) -> None:
    rendered = engine.render(specs(subject, 1, 2), lambda done, total: None)
    assert [one.image.size for one in rendered] == [subject.size] * 2


def test_steps_are_reported_in_order_up_to_the_end(engine: Backend, subject: Subject) -> None:
    seen: list[tuple[int, int]] = []
    engine.render(specs(subject, 1), lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    assert len({total for _, total in seen}) == 1


@pytest.mark.parametrize("stop", [Canceled, Interrupted])
def test_a_pass_can_be_left_and_the_next_one_works(engine: Backend, subject: Subject, stop: type[Exception]) -> None:
    def leave(done: int, total: int) -> None:
        raise stop

    before = render(engine, specs(subject, 1))
    with pytest.raises(stop):
        engine.render(specs(subject, 1), leave)
    assert np.array_equal(render(engine, specs(subject, 1))[0], before[0])


@seeded
def test_the_seed_decides(engine: Backend, subject: Subject) -> None:
    one, again, other = render(engine, specs(subject, 1))[0], *render(engine, specs(subject, 1, 2))
    assert np.abs(one - again).max() <= 1
    assert np.abs(one - other).max() > 1


@seeded
def test_mates_and_place_change_nothing_at_equal_size(engine: Backend, subject: Subject) -> None:
    first = render(engine, specs(subject, 5, 1, 2, 3))[0]
    assert np.array_equal(first, render(engine, specs(subject, 7, 8, 9, 5))[3])


@seeded_by_63_bits
def test_seeds_of_63_bits_count_whole(engine: Backend, subject: Subject) -> None:
    low, high = render(engine, specs(subject, 3, 3 + 2**40))
    assert np.abs(low - high).max() > 1


def test_a_pass_has_a_largest_size(engine: Backend, subject: Subject) -> None:
    assert 1 <= engine.max_batch(specs(subject, 1)[0]) <= subject.entry.max_batch


def test_an_unloaded_engine_can_be_loaded_again(engine: Backend, subject: Subject) -> None:
    before = render(engine, specs(subject, 1))[0]
    engine.unload()
    engine.load()
    assert np.array_equal(render(engine, specs(subject, 1))[0], before)


@pytest.mark.parametrize("backend", ["gan", "stable_diffusion"])
@pytest.mark.parametrize("damage", ["no folder", "no weights", "cut", "rubbish", "other shapes"])
def test_weights_that_are_not_right_are_named(
    settings: Settings, subjects: dict[str, Subject], tmp_path: Path, backend: str, damage: str
) -> None:
    import shutil

    folder = tmp_path / "model"
    source = subjects[backend].entry.folder
    assert source is not None
    if damage != "no folder":
        shutil.copytree(source, folder)
        weights = folder / ("model.safetensors" if backend == "gan" else "unet/diffusion_pytorch_model.safetensors")
        match damage:
            case "no weights":
                weights.unlink()
            case "cut":
                weights.write_bytes(weights.read_bytes()[:-100])
            case "rubbish":
                weights.write_bytes(b"\xff" * 1000)
            case "other shapes":
                wrong = tiny_models.gan(tmp_path / "other", z_dim=7) / "model.safetensors"
                shutil.copy(wrong, weights)
    entry = subjects[backend].entry.model_copy(update={"folder": folder})
    with pytest.raises(Permanent) as caught:
        open_backend(entry, settings).load()
    assert caught.value.reason in {"model_missing", "model_corrupt"}
    assert len(str(caught.value)) > 20


def test_a_pickle_is_never_opened(settings: Settings, subjects: dict[str, Subject], tmp_path: Path) -> None:
    import shutil

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    source = subjects["stable_diffusion"].entry.folder
    assert source is not None
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(Permanent):
        open_backend(subjects["stable_diffusion"].entry.model_copy(update={"folder": folder}), settings).load()
    assert not (tmp_path / "sprung").exists()


def test_a_hub_model_is_not_downloaded_unless_allowed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ModelEntry(name="m", backend="stable_diffusion", hub={"repo": "nobody/nothing", "revision": "0" * 40})
    with pytest.raises(Permanent, match="IMAGEFARM_ALLOW_DOWNLOADS") as caught:
        open_backend(entry, settings).load()
    assert caught.value.reason == "model_missing"


# ----------------------------------------------------------------------------------------------- stable_diffusion


@pytest.fixture
def diffusion(subjects: dict[str, Subject], open_model: Callable[[ModelEntry], Backend]) -> Backend:
    return open_model(subjects["stable_diffusion"].entry)


#: of another family than this pipeline
_NOT_HERE = {"flow_euler", "lcm", "tcd"}


@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - _NOT_HERE))
def test_schedulers_by_name(diffusion: Backend, subjects: dict[str, Subject], name: str) -> None:
    subject = subjects["stable_diffusion"]
    picture = render(diffusion, specs(subject, 1, scheduler=name))[0]
    assert picture.std() > 0
    assert np.array_equal(picture, render(diffusion, specs(subject, 1, scheduler=name))[0]), "it keeps no state"


@pytest.mark.parametrize("name", sorted(_NOT_HERE))
def test_a_scheduler_that_does_not_fit_is_refused(diffusion: Backend, subjects: dict[str, Subject], name: str) -> None:
    with pytest.raises(Permanent) as caught:
        render(diffusion, specs(subjects["stable_diffusion"], 1, scheduler=name))
    assert caught.value.reason == "unsupported_parameter"


def test_a_network_that_overflows_gives_no_image(diffusion: Backend, subjects: dict[str, Subject]) -> None:
    pipeline: Any = vars(diffusion)["_pipeline"]
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.weight.fill_(float("nan"))
    with pytest.warns(RuntimeWarning, match="invalid value"), pytest.raises(Permanent) as caught:
        render(diffusion, specs(subjects["stable_diffusion"], 1))
    assert caught.value.reason == "invalid_image"


def test_every_scheduler_of_the_spec_is_known_to_the_engine() -> None:
    from typing import get_args

    from shared.specs.stable_diffusion import Scheduler

    assert set(get_args(Scheduler)) == set(SCHEDULERS)


@pytest.mark.parametrize("change", [{"negative_prompt": "blue"}, {"guidance_scale": 9.0}, {"num_inference_steps": 9}])
def test_parameters_have_an_effect(diffusion: Backend, subjects: dict[str, Subject], change: dict[str, Any]) -> None:
    subject = subjects["stable_diffusion"]
    plain, changed = render(diffusion, specs(subject, 1))[0], render(diffusion, specs(subject, 1, **change))[0]
    assert np.abs(plain - changed).max() > 0


def test_mates_may_differ_in_prompt_and_negative_prompt(diffusion: Backend, subjects: dict[str, Subject]) -> None:
    subject = subjects["stable_diffusion"]
    one = specs(subject, 1, negative_prompt="blue")
    two = specs(subject, 1, prompt="x y z")
    together = render(diffusion, [*one, *two])
    assert np.abs(together[0] - render(diffusion, one)[0]).max() <= 1
    assert np.abs(together[1] - render(diffusion, two)[0]).max() <= 1


# ------------------------------------------------------------------------------------------------------------ gan


def test_the_textbook_generator_draws_grey_digits_size(
    tmp_path: Path, open_model: Callable[[ModelEntry], Backend]
) -> None:
    entry = ModelEntry(name="m", backend="gan", folder=tiny_models.gan(tmp_path / "mlp"))
    image = open_model(entry).render([entry.resolve({"seed": 1})], lambda done, total: None)[0].image
    assert (image.size, image.mode) == ((28, 28), "L")


def test_the_latent_is_numpys_for_that_seed(tmp_path: Path, open_model: Callable[[ModelEntry], Backend]) -> None:
    folder = tiny_models.gan(tmp_path / "mlp")
    entry = ModelEntry(name="m", backend="gan", folder=folder)
    picture = render(open_model(entry), [entry.resolve({"seed": 42})])[0]
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    z = torch.from_numpy(np.random.RandomState(42).randn(100)).float()
    hidden = torch.relu(weights["layers.0.weight"] @ z + weights["layers.0.bias"])
    expected = torch.tanh(weights["layers.2.weight"] @ hidden + weights["layers.2.bias"]).reshape(28, 28)
    assert np.abs(picture - (expected * 127.5 + 128).numpy()).max() < 1.01


def test_truncation_zero_gives_one_picture_for_all_seeds(
    subjects: dict[str, Subject], open_model: Callable[[ModelEntry], Backend]
) -> None:
    subject = subjects["gan"]
    one, two = render(open_model(subject.entry), specs(subject, 1, 2, truncation_psi=0.0))
    assert np.array_equal(one, two)


def test_the_class_decides_too(subjects: dict[str, Subject], open_model: Callable[[ModelEntry], Backend]) -> None:
    subject = subjects["gan"]
    engine = open_model(subject.entry)
    zero, two = (render(engine, specs(subject, 1, class_index=index))[0] for index in (0, 2))
    assert np.abs(zero - two).max() > 1


# ----------------------------------------------------------------------------------------------------------- fake


@pytest.mark.parametrize(
    ("fault", "error"), [("transient", Transient), ("permanent", Permanent), ("out_of_memory", OutOfMemory)]
)
def test_the_fake_engine_fails_as_asked(
    subjects: dict[str, Subject], open_model: Callable[[ModelEntry], Backend], fault: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        render(open_model(subjects["fake"].entry), specs(subjects["fake"], 1, fault=fault))
