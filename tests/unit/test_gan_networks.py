"""The GAN backend's networks, and the demo GAN that is made of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from worker.gan_networks import MlpGenerator, build_discriminator, build_generator  # noqa: E402

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo-gan"
SMALL = {
    "arch": "dcgan",
    "z_dim": 8,
    "num_classes": 3,
    "channels": [8, 8, 4],
    "discriminator_channels": [4, 8, 8],
    "resolution": 16,
    "image_channels": 3,
}


@pytest.mark.parametrize("layered", [False, True])
def test_dcgan_shapes_range_and_class(layered):
    torch.manual_seed(0)
    generator = build_generator({**SMALL, "layered": layered}).eval()
    z = torch.randn(4, 8)
    with torch.no_grad():
        one = generator(z, torch.zeros(4, dtype=torch.long))
        other = generator(z, torch.ones(4, dtype=torch.long))
        alone = generator(z[2:3], torch.zeros(1, dtype=torch.long))
    assert one.shape == (4, 3, 16, 16)
    assert one.abs().max() <= 1
    assert (one - other).abs().max() > 1e-4
    assert torch.allclose(one[2:3], alone, atol=1e-6)


def test_mlp_is_the_textbook_generator():
    generator = build_generator({"arch": "mlp"})
    assert isinstance(generator, MlpGenerator)
    shapes = [tuple(parameter.shape) for parameter in generator.parameters()]
    assert shapes == [(128, 100), (128,), (784, 128), (784,)]
    images = generator(torch.randn(2, 100), None)
    assert images.shape == (2, 1, 28, 28)
    assert images.abs().max() <= 1
    with pytest.raises(ValueError, match="no classes"):
        generator(torch.randn(1, 100), torch.zeros(1, dtype=torch.long))


def test_logit_depends_on_class_but_not_on_the_batch():
    torch.manual_seed(0)
    discriminator = build_discriminator(SMALL)
    images = torch.randn(5, 3, 16, 16)
    classes = torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad():
        together = discriminator(images, classes)
        alone = discriminator(images[1:2], classes[1:2])
        elsewhere = discriminator(images, (classes + 1) % 3)
        unconditional = discriminator(images)
    assert together.shape == unconditional.shape == (5,)
    assert torch.allclose(together[1:2], alone, atol=1e-5)
    assert (together - elsewhere).abs().min() > 0


def test_a_class_is_asked_for_exactly_when_there_are_some():
    with pytest.raises(ValueError, match="class_index"):
        build_generator(SMALL)(torch.randn(1, 8), None)


@pytest.mark.parametrize("build", [build_generator, build_discriminator])
def test_unknown_architecture_is_refused_by_name(build):
    with pytest.raises(ValueError, match="hypergan"):
        build({"arch": "hypergan"})


def test_widths_must_make_the_resolution():
    with pytest.raises(ValueError, match="16 pixels, not 32"):
        build_generator({**SMALL, "resolution": 32})


def test_demo_gan_draws_the_class_it_is_asked_for():
    from PIL import Image
    from safetensors.torch import load_file

    judge = pytest.importorskip("models.training.judge").judge
    config = json.loads((DEMO / "config.json").read_text())
    generator = build_generator(config).eval()
    generator.load_state_dict(load_file(DEMO / "model.safetensors"), strict=True)
    build_discriminator(config).load_state_dict(load_file(DEMO / "discriminator.safetensors"), strict=True)
    assert sum(file.stat().st_size for file in DEMO.iterdir()) <= 5_000_000
    z = np.concatenate([np.random.RandomState(seed).randn(1, config["z_dim"]) for seed in range(6)])
    right = []
    for index, name in enumerate(config["class_names"]):
        with torch.no_grad():
            images = generator(torch.from_numpy(z).float(), torch.full((len(z),), index))
        assert len({image.numpy().tobytes() for image in images}) == len(z)
        pixels = (images * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        right += [judge(Image.fromarray(picture)).shape == name for picture in pixels]
    assert np.mean(right) >= 0.8
