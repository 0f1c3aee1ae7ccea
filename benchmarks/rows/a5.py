"""a5: demo-diffusion end to end through the farm, against a loop of `pipe(prompt).images[0].save()`.

Both render the same prompts and seeds on the same cores; the farm's time is from the POST of the batch to its last
recorded image. The row fails where an image differs by more than 1/255 from the loop's, or by anything from the bare
pipeline's at the batch shape that the farm recorded.
"""

from __future__ import annotations

import io
import tempfile
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.farm import RunningFarm, running_farm
from benchmarks.measure import Row, interleave, median
from imagefarm.records import Job

MODEL = "demo-diffusion"
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "circle")
COLOURS = ("red", "green", "blue", "yellow")
PROMPTS = [f"a {colour} {shape} on a white background" for colour in COLOURS for shape in SHAPES]
REPEATS = 5


def measure() -> Row:
    """Images per second; ratio = farm ÷ loop."""
    with running_farm(MODEL) as farm, tempfile.TemporaryDirectory() as folder:
        entry = farm.services.catalogue[MODEL]
        pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(entry.folder, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        options = {name: entry.defaults[name] for name in ("width", "height", "num_inference_steps", "guidance_scale")}
        _loop(pipeline, options, Path(folder), PROMPTS[:2])  # warm up
        jobs: list[Job] = []

        def through_the_farm() -> float:
            nonlocal jobs
            seconds, jobs = _through_the_farm(farm)
            return len(PROMPTS) / seconds

        def by_the_loop() -> float:
            return len(PROMPTS) / _loop(pipeline, options, Path(folder), PROMPTS)

        samples = interleave({"farm": through_the_farm, "loop": by_the_loop}, REPEATS)
        images = [_pixels(farm.client.image(job)) for job in jobs]
        loop_difference = max(
            int(np.abs(image - _pixels((Path(folder) / f"{index}.png").read_bytes())).max())
            for index, image in enumerate(images)
        )
        shape_difference = _difference_at_recorded_shape(pipeline, options, jobs, images)
    if loop_difference > 1 or shape_difference > 0:
        raise RuntimeError(f"images differ: {loop_difference}/255 from the loop, {shape_difference}/255 at equal shape")
    farm_rate, loop_rate = median(samples["farm"]), median(samples["loop"])
    return Row(
        id="a5",
        title=f"{len(PROMPTS)} images of {MODEL} through the farm",
        value=farm_rate,
        unit="images/s",
        baseline=loop_rate,
        ratio=farm_rate / loop_rate,
        samples=samples,
        extra={
            "max_difference_to_loop": float(loop_difference),
            "max_difference_at_equal_shape": float(shape_difference),
            "batch_sizes": " ".join(map(str, sorted({_shape(job) for job in jobs}))),
        },
    )


def _through_the_farm(farm: RunningFarm) -> tuple[float, list[Job]]:
    started = time.perf_counter()
    jobs = [{"prompt": prompt, "seed": seed} for seed, prompt in enumerate(PROMPTS)]
    batch = farm.client.submit(jobs=jobs, model=MODEL)
    while not batch.done:
        time.sleep(0.02)
        batch = batch.refresh()
    seconds = time.perf_counter() - started
    if batch.succeeded != len(PROMPTS):
        raise RuntimeError(f"{batch.failed} of {len(PROMPTS)} jobs failed")
    return seconds, list(batch.jobs())


def _loop(pipeline: Any, options: dict[str, Any], folder: Path, prompts: list[str]) -> float:
    started = time.perf_counter()
    for seed, prompt in enumerate(prompts):
        generator = torch.Generator("cpu").manual_seed(seed)
        pipeline(prompt, generator=generator, **options).images[0].save(folder / f"{seed}.png")
    return time.perf_counter() - started


def _difference_at_recorded_shape(
    pipeline: Any, options: dict[str, Any], jobs: list[Job], images: list[NDArray[np.int16]]
) -> int:
    """Largest pixel difference to the bare pipeline called with passes of the size that each image records."""
    worst = 0
    for size in sorted({_shape(job) for job in jobs}):
        mine = [index for index, job in enumerate(jobs) if _shape(job) == size]
        for start in range(0, len(mine), size):
            group = mine[start : start + size]
            padded = (group * size)[:size]  # mates do not matter, the shape does
            output = pipeline(
                [jobs[index].prompt for index in padded],
                generator=[torch.Generator("cpu").manual_seed(jobs[index].seed) for index in padded],
                **options,
            )
            for index, image in zip(group, output.images, strict=False):
                worst = max(worst, int(np.abs(np.asarray(image, np.int16) - images[index]).max()))
    return worst


def _shape(job: Job) -> int:
    assert job.image is not None
    assert job.image.batch_size is not None
    return job.image.batch_size


def _pixels(data: bytes) -> NDArray[np.int16]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int16)
