"""Writes trained parts as a Stable Diffusion pipeline folder: float16 safetensors and a model card."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

CARD = Path(__file__).with_name("demo-diffusion.card.md")


def export(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    tokenizer: Any,
    scheduler: Any,
    folder: Path,
) -> None:
    """Replace folder by a complete new one, or leave it as it was."""
    vae, text_encoder, unet = (copy.deepcopy(part).eval().cpu().half() for part in (vae, text_encoder, unet))
    pipeline = StableDiffusionPipeline(
        vae=vae.to(memory_format=torch.contiguous_format),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet.to(memory_format=torch.contiguous_format),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    pipeline.save_pretrained(fresh, safe_serialization=True)
    if CARD.exists():
        shutil.copyfile(CARD, fresh / "README.md")
    for file in fresh.rglob("*.safetensors"):
        file.chmod(0o644)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
