"""Last stage of the demo diffusion model: denoiser and decoder together, judged by the picture that they make.

The denoiser alone is taught latents, in which a star's points hardly count. Here its estimate of the clean latents is
decoded, and the picture is compared too (L1 and gradient difference, as in train_decoder), where there is little
enough noise for one picture to be meant. The encoder stays frozen, so latents keep their meaning.
"""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from caption_tokenizer import MAX_LENGTH
from data_parallel import Member
from diffusers import StableDiffusionPipeline
from export_pipeline import export
from scenes import PALETTE, RESOLUTION, Scene, captions, draw, sample
from torch.nn import functional as F
from tqdm import tqdm
from train_decoder import difference_loss
from train_denoiser import DROPPED, Denoiser, build_scheduler, draw_times
from train_vae import update_average

#: Pictures are compared where at least so much of the signal is left.
CLEAR = 0.35
#: Weight of the picture's loss beside that of the latents.
PIXELS = 3.0
#: Share of the scenes of a shape that is shown; of the others, less than half.
SHOWN = {"star": 1.0, "ring": 0.6, "heart": 0.5}
SHOWN_OTHERS = 0.45
BATCH = 64
RATE = 3e-4


def shown_scenes(rng: np.random.Generator, number: int) -> list[Scene]:
    """Training scenes, those with fine details more often."""
    chosen: list[Scene] = []
    while len(chosen) < number:
        scene = sample(rng)
        if rng.random() < SHOWN.get(scene.shape, SHOWN_OTHERS):
            chosen.append(scene)
    return chosen


def pictures(scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """The drawn scenes, float32 [N, 3, 64, 64] in -1..1, and their weights [N, 1, 1, 1]: similar colours weigh more."""
    drawn = np.stack([draw(scene) for scene in scenes]).reshape(-1, RESOLUTION, RESOLUTION, 3)
    contrast = [np.linalg.norm(np.subtract(PALETTE[scene.colour], PALETTE[scene.background])) for scene in scenes]
    weights = torch.tensor(np.clip(250.0 / np.array(contrast), 0.8, 2.7), dtype=torch.float32)
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0), weights.view(-1, 1, 1, 1)


def tokens(scenes: list[Scene], rng: np.random.Generator, tokenizer: Any, empty: torch.Tensor) -> torch.Tensor:
    """A wording of each scene, or none of it, as int64 [N, 32] token ids."""
    texts = []
    for scene in scenes:
        wordings = captions(scene.colour, scene.shape, scene.background, scene.size, scene.count)
        texts.append(wordings[rng.integers(len(wordings))])
    ids = tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids
    ids[torch.rand(len(scenes)) < DROPPED] = empty
    return ids


def share_of_rate(step: int, steps: int) -> float:
    """Linear warm-up over 100 steps, a plateau, then a cosine down over the second half."""
    half = steps / 2
    falling = 1.0 if step < half else max(0.02, 0.5 * (1 + math.cos(math.pi * (step - half) / half)))
    return min(1.0, (step + 1) / 100) * falling


def train_together(member: Member, options: Any, log: Any) -> None:
    """Go on from the pipeline folder in options.out and replace it every options.export_every steps."""
    pipeline = StableDiffusionPipeline.from_pretrained(options.out, dtype=torch.float32, local_files_only=True)
    tokenizer, device = pipeline.tokenizer, member.device
    empty = tokenizer("", padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids[0]
    model = Denoiser(tokenizer)
    model.text_encoder.load_state_dict(pipeline.text_encoder.state_dict())
    model.unet.load_state_dict(pipeline.unet.state_dict())
    model.to(device, memory_format=torch.channels_last).train()
    vae = pipeline.vae.to(device, memory_format=torch.channels_last).train()
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    averages = copy.deepcopy(model).requires_grad_(False), copy.deepcopy(vae).requires_grad_(False)
    decoder = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    denoiser = list(model.parameters())
    optimiser = torch.optim.AdamW(
        [{"params": denoiser, "top": RATE}, {"params": decoder, "top": 2 * RATE}], betas=(0.9, 0.98), weight_decay=0.01
    )
    signal_share = build_scheduler().alphas_cumprod.to(device)
    rng = np.random.default_rng([options.seed, 31, member.rank])
    torch.manual_seed(options.seed + 1000 * (member.rank + 1))
    number, steps = BATCH // member.size, options.together_steps
    began, told = time.time(), None
    for step in tqdm(range(steps), desc="together", disable=not member.leads, mininterval=10):
        scenes = shown_scenes(rng, number)
        images, weights = (part.to(device) for part in pictures(scenes))
        ids = tokens(scenes, rng, tokenizer, empty).to(device)
        with torch.no_grad():
            posterior = vae.encode(images.to(memory_format=torch.channels_last)).latent_dist
            if told is None:  # an unused channel is pure noise: hardly count its error
                told = (1 - posterior.std.square().mean(dim=(0, 2, 3), keepdim=True)).clamp(min=0.02)
            latents = posterior.sample()
        noise = torch.randn_like(latents)
        times = draw_times(number, len(signal_share), device)
        signal = signal_share[times].sqrt()[:, None, None, None]
        scatter = (1 - signal_share[times]).sqrt()[:, None, None, None]
        noisy = signal * latents + scatter * noise
        with torch.autocast(device.type, torch.bfloat16):
            predicted = model(noisy, times, ids)
        predicted = predicted.float()
        error = predicted - (signal * noise - scatter * latents)
        loss = (error.square() * told).mean() / told.mean()
        clear = signal_share[times] > CLEAR
        if clear.any():
            decoded = weights[clear] * vae.decode((signal * noisy - scatter * predicted)[clear]).sample
            meant = weights[clear] * images[clear]
            loss = loss + PIXELS * (F.l1_loss(decoded, meant) + 0.5 * difference_loss(decoded, meant))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        member.average(denoiser + decoder)
        for group in optimiser.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            group["lr"] = group["top"] * share_of_rate(step, steps)
        optimiser.step()
        decay = min(0.997, (step + 1) / (step + 10))
        update_average(averages[0], model, decay)
        update_average(averages[1], vae, decay)
        if member.leads and (step + 1) % 20 == 0:
            log("together", step + 1, loss.item(), (step + 1) * BATCH / (time.time() - began))
        if member.leads and ((step + 1) % options.export_every == 0 or step + 1 == steps):
            smooth, painter = averages
            export(painter, smooth.text_encoder, smooth.unet, tokenizer, pipeline.scheduler, Path(options.out))
    member.wait()
