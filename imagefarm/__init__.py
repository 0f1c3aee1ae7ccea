"""imagefarm: submit prompts to a render farm, follow them, fetch the pictures.

    from imagefarm import Farm

    batch = Farm().submit(["a red circle on a white background"], num_images=4)
    batch.wait().download("pictures")

What can go wrong is a `FarmError`.
"""

from imagefarm.client import Farm
from imagefarm.connection import FarmRequestError, FarmUnreachable
from imagefarm.download import Downloaded
from imagefarm.records import Batch, Image, Job, JobError, Model, Queue, Tenant, Worker
from shared.errors import FarmError

__all__ = [
    "Batch",
    "Downloaded",
    "Farm",
    "FarmError",
    "FarmRequestError",
    "FarmUnreachable",
    "Image",
    "Job",
    "JobError",
    "Model",
    "Queue",
    "Tenant",
    "Worker",
]
