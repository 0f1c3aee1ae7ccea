"""Generator and discriminator networks of the GAN backend: plain modules, no training and no file access.

Every generator maps (z float [N, z_dim], class_index int64 [N] or None) to pictures float [N, C, H, W] in -1..1; every
discriminator maps (pictures of that shape, class_index) to logits float [N], higher meaning more real.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class MlpGenerator(nn.Module):
    """The textbook generator: z -> hidden, ReLU -> pixels, tanh (Goodfellow et al. 2014); one class."""

    def __init__(self, z_dim: int = 100, hidden: int = 128, resolution: int = 28, image_channels: int = 1) -> None:
        super().__init__()
        self.z_dim = z_dim
        self.num_classes = 0
        self.shape = (image_channels, resolution, resolution)
        self.layers = nn.Sequential(
            nn.Linear(z_dim, hidden),
            nn.ReLU(),
            nn.Linear(hidden, math.prod(self.shape)),
            nn.Tanh(),
        )

    def forward(self, z: torch.Tensor, class_index: torch.Tensor | None = None) -> torch.Tensor:
        """float [N, z_dim] -> float [N, C, H, W] in -1..1; class_index must be None."""
        if class_index is not None:
            raise ValueError("this generator has no classes")
        images: torch.Tensor = self.layers(z)
        return images.view(-1, *self.shape)


def pixel_norm(features: torch.Tensor) -> torch.Tensor:
    """Each position scaled to unit mean square over its channels (Karras et al. 2018); float [N, C, ...]."""
    return features * torch.rsqrt(features.square().mean(dim=1, keepdim=True) + 1e-6)


class ModulatedUpsample(nn.Module):
    """Transposed convolution to twice the size, pixel norm, then a scale and shift from the code (FiLM)."""

    def __init__(self, into: int, out: int, code: int) -> None:
        super().__init__()
        self.convolution = nn.ConvTranspose2d(into, out, 4, stride=2, padding=1)
        self.modulation = nn.Linear(code, 2 * out)

    def forward(self, features: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        """float [N, into, H, W] and float [N, code] -> float [N, out, 2H, 2W]."""
        features = pixel_norm(self.convolution(features))
        scale, shift = self.modulation(code)[:, :, None, None].chunk(2, dim=1)
        return F.leaky_relu(features * (1 + scale) + shift, 0.2)


class DcganGenerator(nn.Module):
    """Transposed convolutions from 4x4 up (Radford et al. 2016), modulated at each size by latent and class.

    channels holds the width at 4x4, 8x8, ... up to the resolution. A layered generator draws a mask and mixes two
    plain colours by it, object over background (LR-GAN, Yang et al. 2017), instead of drawing pixel colours.
    """

    def __init__(
        self,
        z_dim: int,
        num_classes: int,
        channels: Sequence[int],
        resolution: int,
        image_channels: int = 3,
        layered: bool = False,
    ) -> None:
        super().__init__()
        _check_widths(channels, resolution)
        self.z_dim = z_dim
        self.num_classes = num_classes
        code = 2 * z_dim if num_classes else z_dim
        self.embedding = nn.Embedding(num_classes, z_dim) if num_classes else None
        self.mapping = nn.Sequential(nn.Linear(code, code), nn.LeakyReLU(0.2), nn.Linear(code, code), nn.LeakyReLU(0.2))
        self.first = nn.Linear(code, channels[0] * 16)
        self.blocks = nn.ModuleList(ModulatedUpsample(into, out, code) for into, out in itertools.pairwise(channels))
        self.last = nn.Conv2d(channels[-1], 1 if layered else image_channels, 3, padding=1)
        self.colours: nn.Sequential | None = None
        if layered:
            width = 2 * z_dim
            hidden = [nn.Linear(z_dim, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2)]
            self.colours = nn.Sequential(*hidden, nn.Linear(width, 2 * image_channels), nn.Tanh())

    def forward(self, z: torch.Tensor, class_index: torch.Tensor | None = None) -> torch.Tensor:
        """float [N, z_dim] and int64 [N] -> float [N, image_channels, resolution, resolution] in -1..1."""
        if (class_index is None) != (self.embedding is None):
            raise ValueError("class_index is needed exactly when the generator has classes")
        code = z if self.embedding is None else torch.cat([z, pixel_norm(self.embedding(class_index))], dim=1)
        code = self.mapping(code)
        features = F.leaky_relu(pixel_norm(self.first(code).view(len(z), -1, 4, 4)), 0.2)
        for block in self.blocks:
            features = block(features, code)
        drawn: torch.Tensor = self.last(features)
        if self.colours is None:
            return torch.tanh(drawn)
        ground, paint = self.colours(z)[:, :, None, None].chunk(2, dim=1)
        mixed: torch.Tensor = ground + torch.sigmoid(drawn) * (paint - ground)
        return mixed


class ResidualDownsample(nn.Module):
    """Two convolutions beside a shortcut, then half the size by averaging (He et al. 2016, before activation)."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(into, into, 3, padding=1)
        self.second = nn.Conv2d(into, out, 3, padding=1)
        self.shortcut = nn.Conv2d(into, out, 1, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """float [N, into, H, W] -> float [N, out, H/2, W/2]."""
        deep = F.leaky_relu(self.first(F.leaky_relu(features, 0.2)), 0.2)
        deep = self.second(F.avg_pool2d(deep, 2))
        joined: torch.Tensor = deep + self.shortcut(F.avg_pool2d(features, 2))
        return joined * math.sqrt(0.5)


class DcganDiscriminator(nn.Module):
    """Residual blocks down to 4x4 and a projection of the class (Miyato & Koyama 2018).

    channels holds the width from the resolution down to 4x4. No layer looks across the batch, so the logit of a
    picture does not depend on its neighbours.
    """

    def __init__(self, num_classes: int, channels: Sequence[int], resolution: int, image_channels: int = 3) -> None:
        super().__init__()
        _check_widths(channels, resolution)
        self.num_classes = num_classes
        self.entry = nn.Conv2d(image_channels, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList(ResidualDownsample(into, out) for into, out in itertools.pairwise(channels))
        self.summary = nn.Linear(channels[-1] * 16, channels[-1])
        self.logit = nn.Linear(channels[-1], 1)
        self.projection = nn.Embedding(num_classes, channels[-1]) if num_classes else None

    def forward(self, images: torch.Tensor, class_index: torch.Tensor | None = None) -> torch.Tensor:
        """float [N, C, H, W] in -1..1 and int64 [N] (or None: realism without regard to class) -> float [N]."""
        features = self.entry(images)
        for block in self.blocks:
            features = block(features)
        summary = F.leaky_relu(self.summary(F.leaky_relu(features, 0.2).flatten(1)), 0.2)
        logit: torch.Tensor = self.logit(summary)[:, 0]
        if self.projection is not None and class_index is not None:
            logit = logit + (self.projection(class_index) * summary).sum(dim=1) / math.sqrt(summary.shape[1])
        return logit


def _check_widths(channels: Sequence[int], resolution: int) -> None:
    if resolution != 4 * 2 ** (len(channels) - 1):
        raise ValueError(f"{len(channels)} widths make {4 * 2 ** (len(channels) - 1)} pixels, not {resolution}")


def build_generator(config: dict[str, Any]) -> nn.Module:
    """The generator that a model's config.json describes; ValueError for an architecture there is not."""
    arch = config.get("arch")
    if arch == "mlp":
        return MlpGenerator(
            config.get("z_dim", 100),
            config.get("hidden", 128),
            config.get("resolution", 28),
            config.get("image_channels", 1),
        )
    if arch == "dcgan":
        return DcganGenerator(
            config["z_dim"],
            config["num_classes"],
            config["channels"],
            config["resolution"],
            config["image_channels"],
            config.get("layered", False),
        )
    raise ValueError(f"unknown generator architecture {arch!r}; known: dcgan, mlp")


def build_discriminator(config: dict[str, Any]) -> nn.Module:
    """The discriminator that a model's config.json describes; ValueError for an architecture without one."""
    arch = config.get("arch")
    if arch == "dcgan":
        return DcganDiscriminator(
            config["num_classes"], config["discriminator_channels"], config["resolution"], config["image_channels"]
        )
    raise ValueError(f"no discriminator for architecture {arch!r}; known: dcgan")
