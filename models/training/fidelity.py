"""Measures how faithfully a model draws what its prompt says, by looking at the pixels alone.

200 prompts are made from (colour, shape, background) triples that training never saw. Each picture is judged for its
background, the colour, class and number of its shapes. Exits 1 when a figure is below the wanted one. Seconds are
processor seconds on a CPU (one thread, so a busy machine does not matter) and wall seconds on a GPU.

    python models/training/fidelity.py --model models/demo-diffusion
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from judge import judge
from PIL import Image
from rich.console import Console
from rich.table import Table
from scenes import RESOLUTION, SHAPES, Scene, sample
from tqdm import tqdm

#: Percentages below which the script fails; all is every figure right at once.
WANTED = {"background": 99.0, "colour": 97.0, "shape": 90.0, "count": 90.0}
WANTED_SECONDS = 1.0
DEFAULT_STEPS = 20
DEFAULT_GUIDANCE = 3.0


def held_out_scenes(number: int, seed: int = 2024) -> list[Scene]:
    """Scenes of held-out triples only, the same ones every time."""
    rng = np.random.default_rng(seed)
    return [sample(rng, kept_out=True) for _ in range(number)]


def measure(scenes: list[Scene], pictures: list[Image.Image]) -> dict[str, float]:
    """Percentages right: of each property, of all at once, and of each shape class among its own scenes."""
    right: dict[str, list[bool]] = {name: [] for name in (*WANTED, "all", *SHAPES)}
    for scene, picture in zip(scenes, pictures, strict=True):
        verdict = judge(picture)
        marks = {name: getattr(verdict, name) == getattr(scene, name) for name in WANTED}
        for name, mark in marks.items():
            right[name].append(mark)
        right["all"].append(all(marks.values()))
        right[scene.shape].append(marks["shape"])
    return {name: 100.0 * float(np.mean(marks)) for name, marks in right.items() if marks}


def render(pipeline: StableDiffusionPipeline, scenes: list[Scene], steps: int, guidance: float) -> list[Image.Image]:
    """One picture a scene, one at a time, each with its own seed."""
    pictures = []
    for seed, scene in enumerate(tqdm(scenes, desc="rendering", disable=None)):
        generator = torch.Generator("cpu").manual_seed(seed)
        result = pipeline(
            scene.caption,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
            height=RESOLUTION,
            width=RESOLUTION,
        )
        pictures.append(result.images[0])
    return pictures


def contact_sheet(pictures: list[Image.Image], columns: int = 20) -> Image.Image:
    """All pictures in one, row by row."""
    sheet = Image.new("RGB", (columns * RESOLUTION, -(-len(pictures) // columns) * RESOLUTION))
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * RESOLUTION, index // columns * RESOLUTION))
    return sheet


def show(figures: dict[str, float], seconds: float) -> None:
    """The table a person reads."""
    table = Table("property", "right", "wanted", title="fidelity on unseen combinations")
    for name, value in figures.items():
        table.add_row(name, f"{value:.1f} %", f"{WANTED[name]:.0f} %" if name in WANTED else "")
    table.add_row("seconds per image", f"{seconds:.2f}", f"{WANTED_SECONDS:.1f}")
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).resolve().parent.parent / "demo-diffusion"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--guidance", type=float, default=DEFAULT_GUIDANCE)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--sheet", help="also write all pictures to this PNG")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipeline = StableDiffusionPipeline.from_pretrained(
        options.model, dtype=torch.float32, use_safetensors=True, local_files_only=True
    ).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    scenes = held_out_scenes(options.prompts)
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    began = clock()
    pictures = render(pipeline, scenes, options.steps, options.guidance)
    seconds = (clock() - began) / len(pictures)
    figures = measure(scenes, pictures)
    if options.sheet:
        contact_sheet(pictures).save(options.sheet)
    if options.json:
        print(
            json.dumps({**figures, "seconds_per_image": seconds, "steps": options.steps, "guidance": options.guidance})
        )
    else:
        show(figures, seconds)
    reached = all(figures[name] >= least for name, least in WANTED.items()) and seconds <= WANTED_SECONDS
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
