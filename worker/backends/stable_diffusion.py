"""Diffusion pipelines through diffusers: any folder or pinned hub revision that its auto pipelines load.

Each image has its own generator on the CPU, so its noise depends on its seed alone and not on its mates or the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError

from shared.catalogue import ModelEntry
from shared.errors import DeviceLost, OutOfMemory, Permanent, Transient
from shared.settings import Settings
from shared.specs import RenderSpec
from shared.specs.stable_diffusion import Spec
from worker.backends import OnStep, Rendered

#: the field's names of samplers → diffusers' class and what else defines them
SCHEDULERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_sde": ("DPMSolverSinglestepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


class Backend:
    """One pipeline in memory."""

    def __init__(self, entry: ModelEntry, settings: Settings) -> None:
        self._entry = entry
        self._allow_downloads = settings.allow_downloads
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._pipeline: Any = None
        self._accepted: frozenset[str] = frozenset()
        self._scheduler: Any = None

    def load(self) -> None:
        try:
            pipeline = self._open().to(self._device)
        except FileNotFoundError as error:
            raise Permanent(str(error), code="model_missing") from error
        except OSError as error:
            code, reason = "model_corrupt", "cannot be loaded"
            if self._entry.hub is not None and not self._allow_downloads:
                code, reason = "model_missing", "is not on this machine, and IMAGEFARM_ALLOW_DOWNLOADS is off"
            raise Permanent(f"{self._entry.name} {reason}: {_short(error)}", code=code) from error
        except (ValueError, KeyError, RuntimeError, SafetensorError) as error:
            # RuntimeError holds NotImplementedError: weights of other names leave the network empty
            raise Permanent(f"{self._entry.name} cannot be loaded: {_short(error)}", code="model_corrupt") from error
        pipeline.set_progress_bar_config(disable=True)
        self._pipeline = pipeline
        self._accepted = frozenset(inspect.signature(pipeline.__call__).parameters)
        self._scheduler = pipeline.scheduler

    def _open(self) -> Any:
        source: dict[str, Any]
        if self._entry.folder is not None:
            if not (self._entry.folder / "model_index.json").is_file():
                raise FileNotFoundError(f"no diffusers model in {self._entry.folder}: model_index.json is missing")
            where, source = str(self._entry.folder), {"local_files_only": True}
        else:
            assert self._entry.hub is not None
            where = self._entry.hub.repo
            source = {"revision": self._entry.hub.revision, "local_files_only": not self._allow_downloads}
        # pickles can run code: without use_safetensors=True, diffusers would fall back to them silently
        source |= {"use_safetensors": True, "variant": self._entry.variant, "dtype": self._dtype()}
        try:
            return diffusers.AutoPipelineForText2Image.from_pretrained(where, **source)
        except ValueError as error:
            if "AutoPipeline" not in str(error):
                raise
            return diffusers.DiffusionPipeline.from_pretrained(where, **source)

    def _dtype(self) -> torch.dtype:
        if self._entry.dtype == "auto":
            return torch.bfloat16 if self._device == "cuda" else torch.float32
        dtype: torch.dtype = getattr(torch, self._entry.dtype)
        return dtype

    def render(self, specs: Sequence[RenderSpec], on_step: OnStep) -> list[Rendered]:
        assert self._pipeline is not None, "load() comes first"
        jobs = [spec for spec in specs if isinstance(spec, Spec)]
        first = jobs[0]
        arguments: dict[str, Any] = {
            "prompt": [job.prompt for job in jobs],
            "width": first.width,
            "height": first.height,
            "num_inference_steps": first.num_inference_steps,
            "guidance_scale": first.guidance_scale,
            "generator": [torch.Generator("cpu").manual_seed(job.seed) for job in jobs],
        }
        if any(job.negative_prompt for job in jobs):
            arguments["negative_prompt"] = [job.negative_prompt for job in jobs]
        if unknown := sorted(set(arguments) - self._accepted):
            raise Permanent(f"{self._entry.name} does not take {', '.join(unknown)}", code="unsupported_parameter")
        if "callback_on_step_end" in self._accepted:
            arguments["callback_on_step_end"] = _reporter(on_step, first.num_inference_steps)
        self._pipeline.scheduler = self._scheduler_for(first.scheduler)
        on_step(0, first.num_inference_steps)
        try:
            output = self._pipeline(**arguments)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise OutOfMemory(_short(error)) from error
        except RuntimeError as error:
            if "allocate memory" in str(error):
                raise OutOfMemory(_short(error)) from error
            if "CUDA error" in str(error):
                raise DeviceLost(_short(error)) from error
            raise Transient(f"the engine failed: {_short(error)}") from error
        on_step(first.num_inference_steps, first.num_inference_steps)
        flagged = getattr(output, "nsfw_content_detected", None) or [False] * len(jobs)
        for image in output.images:
            # not-a-number becomes 0, so a network that overflowed draws in black
            if all(high == 0 for _, high in image.convert("RGB").getextrema()):
                raise Permanent("the model drew nothing but black; a wider dtype may help", code="invalid_image")
            if image.size != (first.width, first.height):
                raise Permanent(
                    f"asked for {first.width}×{first.height}, the model drew {image.width}×{image.height}",
                    code="unsupported_size",
                )
        return [
            Rendered(image, {"nsfw_content_detected": True} if nsfw else {})
            for image, nsfw in zip(output.images, flagged, strict=True)
        ]

    def _scheduler_for(self, name: str | None) -> Any:
        """A fresh scheduler: they keep state, which must not pass from one render to the next."""
        if name is None:
            return type(self._scheduler).from_config(self._scheduler.config)
        class_name, extra = SCHEDULERS[name]
        found = getattr(diffusers, class_name)
        if found not in self._scheduler.compatibles:
            raise Permanent(f"{self._entry.name} cannot be sampled with {name}", code="unsupported_parameter")
        try:
            return found.from_config(self._scheduler.config, **extra)
        except (ImportError, ValueError) as error:
            raise Permanent(f"scheduler {name}: {_short(error)}", code="unsupported_parameter") from error

    def unload(self) -> None:
        self._pipeline = self._scheduler = None
        if self._device == "cuda":
            torch.cuda.empty_cache()

    def max_batch(self, spec: RenderSpec) -> int:
        return self._entry.max_batch


def _reporter(on_step: OnStep, steps: int) -> Any:
    def report(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(min(step + 1, steps), steps)
        return {}

    return report


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
