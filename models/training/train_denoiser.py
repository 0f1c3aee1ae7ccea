"""Second stage of the demo diffusion model: text encoder and UNet, trained together on cached latents.

Latent diffusion (Rombach et al. 2022) with v-prediction (Salimans & Ho 2022), betas rescaled to zero terminal SNR (Lin
et al. 2023), classifier-free guidance (Ho & Salimans 2022) and time steps drawn toward the middle of the noise range
(logit-normal, Esser et al. 2024), where the shape of a thing is decided. The prompt also modulates every residual
block through the time embedding (addition_embed_type "text"; FiLM, Perez et al. 2018).
"""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from caption_tokenizer import MAX_LENGTH, build_tokenizer
from data_parallel import Member
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from export_pipeline import export
from scenes import EVERY_WORD, RADII, captions, draw, sample, triples
from tqdm import tqdm
from train_vae import LATENT_CHANNELS, build_vae, update_average
from transformers import CLIPTextConfig, CLIPTextModel

TEXT_WIDTH = 128
DROPPED = 0.1
#: Shapes with fine detail are learned last, so they are shown more often than the others (1.0).
HARDER = {"star": 2.2, "ring": 1.7, "heart": 1.2}


def build_text_encoder(tokenizer: Any) -> CLIPTextModel:
    """Two causal layers of width 128: int64 [N, 32] token ids -> float [N, 32, 128]."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            hidden_act="gelu",
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """Predicts v of noisy latents [N, 8, 8, 8]; cross-attention only at 4x4, where it is cheap."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=[96, 144],
        layers_per_block=1,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=24,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of training, which is also the default sampler."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


class Denoiser(torch.nn.Module):
    """Text encoder and UNet as one module."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(tokenizer)
        self.unet = build_unet()
        # With so few tokens plain products are three times as fast to train on a CPU as the flash kernel in bfloat16.
        self.text_encoder.set_attn_implementation("eager")
        self.unet.set_attn_processor(AttnProcessor())

    def forward(self, noisy: torch.Tensor, times: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """v [N, 8, 8, 8] from noisy latents of that shape, int64 [N] times in 0..999 and int64 [N, 32] token ids."""
        return self.unet(noisy, times, self.text_encoder(ids).last_hidden_state).sample


def caption_table(tokenizer: Any) -> tuple[dict[tuple, int], torch.Tensor]:
    """Row number by (triple, count, size), and token ids int16 [rows, 14, 32] of its wordings.

    Wordings repeat within a row as often as they shall be drawn: whole sentences more than short forms.
    """
    rows: dict[tuple, int] = {}
    texts = []
    for triple in triples(kept_out=False):
        for count, size in RADII:
            rows[triple, count, size] = len(rows)
            wordings = captions(*triple, size, count)
            weighted = [text for text, times in zip(wordings, [3, 2, 1, 1] * 2, strict=False) for _ in range(times)]
            texts += (weighted * 2)[:14]
    ids = tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids
    return rows, ids.to(torch.int16).view(len(rows), 14, MAX_LENGTH)


@torch.no_grad()
def cache_latents(member: Member, options: Any, rows: dict[tuple, int]) -> tuple[torch.Tensor, ...]:
    """Latents of this member's own scenes: mean and deviation, float16 [N, 8, 8, 8], and row numbers int64 [N]."""
    path = Path(options.work) / f"latents.{member.rank}.pt"
    if options.resume and path.exists():
        return torch.load(path, weights_only=True)
    vae = build_vae()
    vae.load_state_dict(torch.load(Path(options.work) / "vae.pt", weights_only=True))
    vae.eval().to(member.device, memory_format=torch.channels_last)
    rng = np.random.default_rng([options.seed, 99, member.rank])
    means, deviations, numbers = [], [], []
    for _ in tqdm(
        range(options.scenes // member.size // 100), desc="latents", disable=not member.leads, mininterval=10
    ):
        batch = [sample(rng) for _ in range(100)]
        images = torch.from_numpy(np.stack([draw(scene) for scene in batch])).permute(0, 3, 1, 2)
        images = images.to(member.device, torch.float32, memory_format=torch.channels_last) / 127.5 - 1
        posterior = vae.encode(images).latent_dist
        means.append(posterior.mean.half().cpu())
        deviations.append(posterior.std.half().cpu())
        numbers += [rows[(scene.colour, scene.shape, scene.background), scene.count, scene.size] for scene in batch]
    cached = torch.cat(means), torch.cat(deviations), torch.tensor(numbers)
    torch.save(cached, path)
    return cached


def draw_times(number: int, steps: int, device: torch.device) -> torch.Tensor:
    """Time steps int64 [number] in 0..steps-1: stratified, 70 % logit-normal toward the middle, 30 % uniform."""
    spread = (torch.arange(number) + torch.rand(number)) / number
    middle = torch.sigmoid(-0.2 + 1.0 * torch.special.ndtri(spread.clamp(1e-4, 1 - 1e-4)))
    uniform = spread[torch.randperm(number)]
    chosen = torch.where(torch.rand(number) < 0.7, middle, uniform)
    return (chosen * steps).long().clamp(0, steps - 1).to(device)


def learning_rate(step: int, steps: int, warmup: int = 300, ending: float = 0.35) -> float:
    """Share of the top rate: linear warm-up, a plateau, then a cosine down over the last third."""
    if step < warmup:
        return (step + 1) / warmup
    left = (steps - step) / (steps * ending)
    return 1.0 if left >= 1 else 0.01 + 0.99 * 0.5 * (1 - math.cos(math.pi * max(left, 0.0)))


def train_denoiser(member: Member, options: Any, log: Any) -> None:
    """Train, exporting the averaged weights every options.export_every steps; continues from its own checkpoint."""
    tokenizer = build_tokenizer(EVERY_WORD)
    rows, wordings = caption_table(tokenizer)
    empty = (
        tokenizer("", padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids[0].to(member.device)
    )
    means, deviations, numbers = cache_latents(member, options, rows)
    member.wait()
    torch.manual_seed(options.seed)
    model = Denoiser(tokenizer).to(member.device, memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=options.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    checkpoint = Path(options.work) / "denoiser.checkpoint.pt"
    start = 0
    if options.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        start = state["step"]
    torch.manual_seed(options.seed + 1000 * (member.rank + 1) + start)
    scheduler = build_scheduler()
    signal_share = scheduler.alphas_cumprod.to(member.device)
    # A channel that the autoencoder leaves unused is pure noise, which nothing predicts: hardly count its error.
    told = (1 - deviations.float().square().mean(dim=(0, 2, 3), keepdim=True)).clamp(min=0.02).to(member.device)
    shapes = [triple[1] for triple, _, _ in rows]
    often = torch.tensor([HARDER.get(shape, 1.0) for shape in shapes])[numbers]
    number = options.batch // member.size
    bar = tqdm(
        range(start, options.steps),
        initial=start,
        total=options.steps,
        desc="unet",
        disable=not member.leads,
        mininterval=20,
    )
    began, recent = time.time(), []
    for step in bar:
        chosen = torch.multinomial(often, number, replacement=True)
        ids = wordings[numbers[chosen], torch.randint(wordings.shape[1], (number,))].long().to(member.device)
        ids = torch.where(torch.rand(number, 1, device=member.device) < DROPPED, empty, ids)
        latents = means[chosen].float() + deviations[chosen].float() * torch.randn(number, LATENT_CHANNELS, 8, 8)
        latents = latents.to(member.device, memory_format=torch.channels_last)
        noise = torch.randn_like(latents)
        times = draw_times(number, len(signal_share), member.device)
        signal = signal_share[times].sqrt()[:, None, None, None]
        scatter = (1 - signal_share[times]).sqrt()[:, None, None, None]
        with torch.autocast(member.device.type, torch.bfloat16):
            predicted = model(signal * latents + scatter * noise, times, ids)
        error = predicted.float() - (signal * noise - scatter * latents)
        loss = (error.square() * told).mean() / told.mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        member.average(trained)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimiser.param_groups:
            group["lr"] = options.rate * learning_rate(step, options.steps)
        optimiser.step()
        update_average(average, model, min(options.ema, (step + 1) / (step + 10)))
        recent.append(loss.item())
        if not member.leads:
            continue
        if (step + 1) % 20 == 0:
            rate = (step + 1 - start) * options.batch / (time.time() - began)
            log("denoiser", step + 1, float(np.mean(recent[-20:])), rate)
            bar.set_postfix(loss=f"{np.mean(recent[-200:]):.4f}", img_s=f"{rate:.0f}", refresh=False)
        if (step + 1) % options.export_every == 0 or step + 1 == options.steps:
            state = {"model": model.state_dict(), "average": average.state_dict(), "step": step + 1}
            partial = checkpoint.with_suffix(".partial")
            torch.save(state | {"optimiser": optimiser.state_dict()}, partial)
            partial.replace(checkpoint)
            export(load_vae(options), average.text_encoder, average.unet, tokenizer, scheduler, Path(options.out))
    member.wait()


def load_vae(options: Any) -> AutoencoderKL:
    """The trained autoencoder, with the polished decoder once there is one; the encoder is the same."""
    vae = build_vae()
    polished, plain = Path(options.work) / "vae.polished.pt", Path(options.work) / "vae.pt"
    vae.load_state_dict(torch.load(polished if polished.exists() else plain, weights_only=True))
    return vae
