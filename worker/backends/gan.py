"""Generators of generative adversarial networks: the textbook MLP (100→128→784) and DCGAN, in plain PyTorch.

A model folder holds `config.json` (the architecture) and `model.safetensors` (its weights, loaded strictly).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from shared.catalogue import ModelEntry
from shared.errors import OutOfMemory, Permanent
from shared.settings import Settings
from shared.specs import RenderSpec
from shared.specs.gan import Spec
from worker.backends import OnStep, Rendered
from worker.gan_networks import build_generator


class Backend:
    """One generator in memory."""

    def __init__(self, entry: ModelEntry, settings: Settings) -> None:
        self._entry = entry
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._generator: torch.nn.Module | None = None
        self._z_dim = 0

    def load(self) -> None:
        folder = self._entry.folder
        if folder is None or not (folder / "config.json").is_file():
            raise Permanent(f"no GAN in {folder}: expected config.json and model.safetensors", code="model_missing")
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            generator = build_generator(config)
            generator.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
            self._z_dim = int(config["z_dim"])
        except FileNotFoundError as error:
            raise Permanent(f"weights are missing: {error.filename}", code="model_missing") from error
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise Permanent(f"{folder} cannot be loaded: {error}", code="model_corrupt") from error
        self._generator = generator.eval().requires_grad_(False).to(self._device)

    def render(self, specs: Sequence[RenderSpec], on_step: OnStep) -> list[Rendered]:
        assert self._generator is not None, "load() comes first"
        jobs = [spec for spec in specs if isinstance(spec, Spec)]
        on_step(0, 1)
        # z from NumPy's legacy generator: the field's convention, so that a known seed means a known picture
        latents = np.stack([np.random.RandomState(_seed32(job.seed)).randn(self._z_dim) for job in jobs])
        psi = np.array([[job.truncation_psi] for job in jobs])
        z = torch.from_numpy((latents * psi).astype(np.float32)).to(self._device)
        classes = None
        if jobs[0].class_index is not None:
            classes = torch.tensor([job.class_index for job in jobs], device=self._device)
        try:
            with torch.inference_mode():
                images = self._generator(z, classes)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise OutOfMemory(str(error)) from error
        pixels = (images * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        on_step(1, 1)
        return [
            Rendered(Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture)) for picture in pixels
        ]

    def unload(self) -> None:
        self._generator = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def max_batch(self, spec: RenderSpec) -> int:
        return self._entry.max_batch


def _seed32(seed: int) -> int:
    """NumPy's legacy generator takes 32 bits; larger seeds are folded, so that all bits still count."""
    return (seed ^ (seed >> 32)) & 0xFFFFFFFF
