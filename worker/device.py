"""What this worker renders with, for the operator's eyes and for the record of each image."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def describe() -> dict[str, Any]:
    """Name and memory (bytes) of the device, known once an engine is loaded, and the versions of the engines."""
    facts: dict[str, Any] = {"name": f"CPU {platform.machine()}", "cores": os.cpu_count()}
    for package in ("imagefarm", "torch", "diffusers", "transformers"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    # torch takes seconds to import, and a worker of hosted models never needs it: look only where it is loaded
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"name": properties.name, "memory": properties.total_memory}
    return facts
