"""First stage of the demo diffusion model: an AutoencoderKL with eight times smaller latents.

Kingma & Welling, "Auto-Encoding Variational Bayes" (2013), with an L1 + MSE reconstruction term, as latent diffusion
uses it (Rombach et al. 2022). Most steps see 32x32 crops, which cost a quarter; the last ones see whole scenes, so
that the group normalisation meets the statistics it will have in use.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_parallel import Member
from diffusers import AutoencoderKL
from scenes import RESOLUTION, draw, sample
from torch.nn import functional as F
from tqdm import tqdm

LATENT_CHANNELS = 8
CROP = 32
KL_WEIGHT = 5e-4


def build_vae() -> AutoencoderKL:
    """64x64x3 pictures in -1..1 <-> 8x8x8 latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[16, 16, 32, 64],
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=RESOLUTION,
        scaling_factor=1.0,
        force_upcast=False,
    )


def pictures(rng: np.random.Generator, number: int, crop: int = RESOLUTION) -> torch.Tensor:
    """Freshly drawn training scenes: float32 [number, 3, crop, crop] in -1..1."""
    batch = np.empty((number, crop, crop, 3), dtype=np.uint8)
    for index in range(number):
        top, left = rng.integers(0, RESOLUTION - crop + 1, size=2)
        batch[index] = draw(sample(rng))[top : top + crop, left : left + crop]
    return torch.from_numpy(batch).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def update_average(average: torch.nn.Module, module: torch.nn.Module, decay: float) -> None:
    """Exponential moving average of the weights, in place."""
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1.0 - decay)


def train_vae(member: Member, options: Any, log: Any) -> None:
    """Train and leave work/vae.pt; continues from its own checkpoint."""
    done = Path(options.work) / "vae.pt"
    checkpoint = Path(options.work) / "vae.checkpoint.pt"
    if options.resume and done.exists():
        return
    torch.manual_seed(options.seed)
    vae = build_vae().to(member.device, memory_format=torch.channels_last)
    average = copy.deepcopy(vae).requires_grad_(False)
    steps = options.vae_steps
    crops = int(steps * 0.7)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 2e-3, total_steps=steps + 1, pct_start=0.03, cycle_momentum=False, final_div_factor=100
    )
    start = 0
    if options.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["vae"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]
    rng = np.random.default_rng([options.seed, member.rank, start])
    torch.manual_seed(options.seed + 1000 * member.rank + start)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="vae", disable=not member.leads, mininterval=10)
    began, seen = time.time(), 0
    for step in bar:
        whole = step >= crops
        number = max(1, (options.vae_batch // 3 if whole else options.vae_batch) // member.size)
        images = pictures(rng, number, RESOLUTION if whole else CROP)
        images = images.to(member.device, memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        rebuilt = vae.decode(posterior.sample()).sample
        absolute = F.l1_loss(rebuilt, images)
        loss = absolute + F.mse_loss(rebuilt, images) + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        optimiser.zero_grad(set_to_none=False)
        loss.backward()
        member.average(vae.parameters())
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        update_average(average, vae, min(0.998, (step + 1) / (step + 20)))
        seen += number * member.size
        if member.leads and step % 20 == 0:
            rate = seen / (time.time() - began)
            log("vae", step, loss.item(), rate)
            bar.set_postfix(l1=f"{absolute.item():.4f}", loss=f"{loss.item():.4f}", img_s=f"{rate:.0f}")
        if member.leads and (step + 1) % 250 == 0:
            state = {"vae": vae.state_dict(), "average": average.state_dict(), "step": step + 1}
            state |= {"optimiser": optimiser.state_dict(), "schedule": schedule.state_dict()}
            torch.save(state, checkpoint)
    if member.leads:
        torch.save(normalised(average).state_dict(), done)
    member.wait()


@torch.no_grad()
def normalised(vae: AutoencoderKL, number: int = 1024) -> AutoencoderKL:
    """The same autoencoder with latents of mean 0 and standard deviation 1 in every channel.

    The change of units is folded into the two 1x1 convolutions beside the latents, so scaling_factor is 1.
    """
    vae = copy.deepcopy(vae).float().eval()
    device = next(vae.parameters()).device
    rng = np.random.default_rng(7)
    latents = torch.cat([vae.encode(pictures(rng, 64).to(device)).latent_dist.sample() for _ in range(number // 64)])
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    into, out = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    into.weight[:channels] /= deviation[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / deviation
    into.bias[channels:] -= 2 * deviation.log()
    out.bias += (out.weight[:, :, 0, 0] * mean).sum(dim=1)
    out.weight *= deviation[None, :, None, None]
    return vae
