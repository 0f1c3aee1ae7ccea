"""Train the demo GAN from nothing: one drawn shape a picture, its class chosen by class_index.

    python models/training/train_gan.py

Relativistic pairing loss with zero-centred gradient penalties on real and generated pictures (R3GAN, Huang et al. 2024;
Mescheder et al. 2018), applied lazily; Adam(0, 0.99) and a moving average of the generator. Pictures are drawn as
they are needed, so the discriminator never sees one twice and has nothing to memorise.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import shutil
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from judge import judge  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from scenes import PALETTE, ROTATION, SHAPES, Placement, coverage  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from tqdm import tqdm  # noqa: E402

NETWORKS = HERE.parent.parent / "worker" / "gan_networks.py"
_spec = importlib.util.spec_from_file_location("gan_networks", NETWORKS)
gan_networks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gan_networks)

CONFIG = {
    "arch": "dcgan",
    "z_dim": 64,
    "num_classes": len(SHAPES),
    "class_names": list(SHAPES),
    "resolution": 32,
    "image_channels": 3,
    "layered": True,
    "channels": [96, 64, 32, 16],
    "discriminator_channels": [12, 24, 48, 96],
}
PENALTY = 1.0
PENALTY_EVERY = 4
LEAST_CONTRAST = 150
#: Shapes with sharp corners are learned last, so they are shown more often than the others (1.0).
HARDER = {"star": 2.0, "triangle": 1.3, "cross": 1.3, "heart": 1.2, "ring": 1.2}
NAMED = np.array(list(PALETTE.values()), dtype=float)


def two_colours(rng: np.random.Generator) -> np.ndarray:
    """Two well apart RGB colours that the judge gives different names: float64 [2, 3] in 0..255."""
    while True:
        pair = rng.uniform(0, 255, size=(2, 3))
        names = np.linalg.norm(pair[:, None] - NAMED, axis=2).argmin(axis=1)
        if np.linalg.norm(pair[0] - pair[1]) > LEAST_CONTRAST and names[0] != names[1]:
            return pair


def drawn(rng: np.random.Generator, classes: np.ndarray, resolution: int) -> torch.Tensor:
    """One shape a picture in two colours: float32 [N, 3, resolution, resolution] in -1..1."""
    pictures = np.empty((len(classes), resolution, resolution, 3), dtype=np.float32)
    for index, number in enumerate(classes):
        shape = SHAPES[number]
        radius = resolution * rng.uniform(0.28, 0.40)
        room = resolution / 2 - radius - 1
        x, y = resolution / 2 + rng.uniform(-room, room, size=2)
        turn = rng.uniform(-ROTATION[shape], ROTATION[shape])
        alpha = coverage(shape, (Placement(x, y, radius, turn),), resolution)[:, :, None]
        ground, colour = two_colours(rng)
        pictures[index] = ground + alpha * (colour - ground)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1.0


def gradient_penalty(logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Mean squared norm of the logits' gradient at the images (Mescheder et al. 2018)."""
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


@torch.no_grad()
def generated(generator: torch.nn.Module, each: int) -> list[Image.Image]:
    """each pictures of every class, class by class, latents from numpy's RandomState as the worker draws them."""
    pictures = []
    for number in range(CONFIG["num_classes"]):
        z = np.concatenate([np.random.RandomState(seed).randn(1, CONFIG["z_dim"]) for seed in range(each)])
        images = generator(torch.from_numpy(z).float(), torch.full((each,), number))
        arrays = (images * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        pictures += [Image.fromarray(array) for array in arrays]
    return pictures


def accuracy(pictures: list[Image.Image]) -> dict[str, float]:
    """Share of each class's pictures (0..1) in which the pixel judge sees exactly one shape, of that class."""
    each = len(pictures) // CONFIG["num_classes"]
    verdicts = [judge(picture) for picture in pictures]
    return {
        shape: float(np.mean([v.shape == shape and v.count == 1 for v in verdicts[n * each : (n + 1) * each]]))
        for n, shape in enumerate(SHAPES)
    }


def export(generator: torch.nn.Module, discriminator: torch.nn.Module, folder: Path) -> None:
    """Replace folder by a complete new one: config.json, two safetensors files and the card."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    (fresh / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    for name, module in (("model", generator), ("discriminator", discriminator)):
        weights = {key: value.cpu().contiguous() for key, value in module.state_dict().items()}
        save_file(weights, fresh / f"{name}.safetensors")
        (fresh / f"{name}.safetensors").chmod(0o644)
    card = HERE / "demo-gan.card.md"
    if card.exists():
        shutil.copyfile(card, fresh / "README.md")
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def train(options: argparse.Namespace) -> None:
    """The training loop; goes on from the checkpoint in options.work with --resume."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    generator = gan_networks.build_generator(CONFIG).to(device, memory_format=torch.channels_last)
    discriminator = gan_networks.build_discriminator(CONFIG).to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(generator).requires_grad_(False)
    adam = {"betas": (0.0, 0.99), "eps": 1e-8}
    optimisers = [
        torch.optim.Adam(generator.parameters(), lr=options.rate, **adam),
        torch.optim.Adam(discriminator.parameters(), lr=options.rate, **adam),
    ]
    checkpoint, start = Path(options.work) / "gan.checkpoint.pt", 0
    if options.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for module, name in ((generator, "generator"), (discriminator, "discriminator"), (average, "average")):
            module.load_state_dict(state[name])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        start = state["step"]
    rng = np.random.default_rng([options.seed, start])
    torch.manual_seed(options.seed + start)
    often = np.array([HARDER.get(shape, 1.0) for shape in SHAPES])
    often /= often.sum()
    began = time.time()
    for step in (bar := tqdm(range(start, options.steps), initial=start, total=options.steps, mininterval=10)):
        fall = min(1.0, 2 * (1 - step / options.steps) + 0.02)
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = options.rate * fall
        classes = rng.choice(CONFIG["num_classes"], size=options.batch, p=often)
        chosen = torch.from_numpy(classes).to(device)
        real = drawn(rng, classes, CONFIG["resolution"]).to(device)
        penalised = step % PENALTY_EVERY == 0

        with torch.no_grad():
            fake = generator(torch.randn(options.batch, CONFIG["z_dim"], device=device), chosen)
        both = torch.cat([real, fake]).requires_grad_(penalised)
        logits = discriminator(both, chosen.repeat(2))
        real_logit, fake_logit = logits.chunk(2)
        loss = F.softplus(fake_logit - real_logit).mean()
        if penalised:
            loss = loss + PENALTY_EVERY * PENALTY / 2 * 2 * gradient_penalty(logits, both)
        optimisers[1].zero_grad()
        loss.backward()
        optimisers[1].step()

        fake = generator(torch.randn(options.batch, CONFIG["z_dim"], device=device), chosen)
        discriminator.requires_grad_(False)
        with torch.no_grad():
            real_logit = discriminator(real, chosen)
        generator_loss = F.softplus(real_logit - discriminator(fake, chosen)).mean()
        optimisers[0].zero_grad()
        generator_loss.backward()
        optimisers[0].step()
        discriminator.requires_grad_(True)
        with torch.no_grad():
            decay = min(0.998, (step + 1) / (step + 20))
            torch._foreach_lerp_(list(average.parameters()), list(generator.parameters()), 1 - decay)

        if step % 50 == 0:
            rate = (step - start + 1) * options.batch / (time.time() - began)
            bar.set_postfix(
                d=f"{loss.item():.3f}", g=f"{generator_loss.item():.3f}", img_s=f"{rate:.0f}", refresh=False
            )
        if (step + 1) % options.export_every == 0 or step + 1 == options.steps:
            state = {"generator": generator.state_dict(), "discriminator": discriminator.state_dict()}
            state |= {"average": average.state_dict(), "step": step + 1}
            torch.save(state | {"optimisers": [optimiser.state_dict() for optimiser in optimisers]}, checkpoint)
            export(average, discriminator, Path(options.out))
            shares = accuracy(generated(copy.deepcopy(average).cpu(), 20))
            tqdm.write(f"step {step + 1}: " + " ".join(f"{shape} {share:.2f}" for shape, share in shares.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(HERE.parent / "demo-gan"), help="model folder to write")
    parser.add_argument("--work", default=".cache/train-gan", help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--steps", type=int, default=7500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="learning rate of both networks")
    parser.add_argument("--export-every", type=int, default=500, help="steps between checkpoints and exports")
    options = parser.parse_args()
    Path(options.work).mkdir(parents=True, exist_ok=True)
    train(options)


if __name__ == "__main__":
    main()
