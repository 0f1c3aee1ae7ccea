"""Third stage of the demo diffusion model: the decoder alone, taught to draw crisply from imperfect latents.

The encoder is frozen, so the latents keep their meaning and the denoiser stays valid. Latents are disturbed by noise of
random strength, as sampled ones are, and the loss is L1 with an L1 on neighbour differences (the gradient difference
loss of Mathieu et al. 2015): unlike a squared error, its optimum at an uncertain edge is a sharp one.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_parallel import Member
from scenes import PALETTE, RESOLUTION, Scene, draw, sample
from torch.nn import functional as F
from tqdm import tqdm
from train_vae import CROP, build_vae, update_average

STRONGEST_NOISE = 0.35
#: Share of the scenes of other shapes that is passed over, so that fine details are seen more often.
PASSED_OVER = 0.65
DETAILED = ("star", "ring")


def detailed_pictures(rng: np.random.Generator, number: int, crop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Drawn training scenes, float32 [number, 3, crop, crop] in -1..1, and their weights, float32 [number, 1, 1, 1].

    A scene in two similar colours weighs more, because the same blur costs less in it.
    """
    chosen: list[Scene] = []
    while len(chosen) < number:
        scene = sample(rng)
        if scene.shape in DETAILED or rng.random() > PASSED_OVER:
            chosen.append(scene)
    batch = np.empty((number, crop, crop, 3), dtype=np.uint8)
    weights = np.empty((number, 1, 1, 1), dtype=np.float32)
    for index, scene in enumerate(chosen):
        top, left = rng.integers(0, RESOLUTION - crop + 1, size=2)
        batch[index] = draw(scene)[top : top + crop, left : left + crop]
        contrast = np.linalg.norm(np.subtract(PALETTE[scene.colour], PALETTE[scene.background]))
        weights[index] = np.clip(250.0 / contrast, 0.8, 2.7)
    images = torch.from_numpy(batch).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
    return images, torch.from_numpy(weights)


def difference_loss(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of the horizontal and vertical neighbour differences of [N, C, H, W] pictures."""
    error = one - other
    return error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()


def train_decoder(member: Member, options: Any, log: Any) -> None:
    """Train and leave work/vae.polished.pt; continues from its own checkpoint."""
    work = Path(options.work)
    done, checkpoint = work / "vae.polished.pt", work / "decoder.checkpoint.pt"
    if options.resume and done.exists():
        return
    torch.manual_seed(options.seed)
    vae = build_vae()
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True))
    vae.to(member.device, memory_format=torch.channels_last)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    average = copy.deepcopy(vae).requires_grad_(False)
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    steps = options.decoder_steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 1.5e-3, total_steps=steps + 1, pct_start=0.05, cycle_momentum=False, final_div_factor=100
    )
    start = 0
    if options.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["vae"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]
    rng = np.random.default_rng([options.seed, 5, member.rank, start])
    torch.manual_seed(options.seed + 1000 * member.rank + start)
    bar = tqdm(
        range(start, steps), initial=start, total=steps, desc="decoder", disable=not member.leads, mininterval=10
    )
    began, seen = time.time(), 0
    for step in bar:
        whole = step >= steps * 0.6
        number = max(1, (options.vae_batch // 3 if whole else options.vae_batch) // member.size)
        images, weights = detailed_pictures(rng, number, RESOLUTION if whole else CROP)
        weights = weights.to(member.device)
        images = images.to(member.device, memory_format=torch.channels_last)
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.sample()
            strength = STRONGEST_NOISE * torch.rand(number, 1, 1, 1, device=member.device)
            latents += strength * torch.randn_like(latents)
        rebuilt = vae.decode(latents).sample
        rebuilt, images = weights * rebuilt, weights * images
        absolute = F.l1_loss(rebuilt, images)
        loss = absolute + 0.5 * difference_loss(rebuilt, images)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        member.average(trained)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        update_average(average, vae, min(0.998, (step + 1) / (step + 20)))
        seen += number * member.size
        if member.leads and step % 20 == 0:
            rate = seen / (time.time() - began)
            log("decoder", step, loss.item(), rate)
            bar.set_postfix(l1=f"{absolute.item():.4f}", loss=f"{loss.item():.4f}", img_s=f"{rate:.0f}")
        if member.leads and (step + 1) % 250 == 0:
            state = {"vae": vae.state_dict(), "average": average.state_dict(), "step": step + 1}
            state |= {"optimiser": optimiser.state_dict(), "schedule": schedule.state_dict()}
            torch.save(state, checkpoint)
    if member.leads:
        torch.save(average.state_dict(), done)
    member.wait()
