"""Links to the stored image of a job."""

from __future__ import annotations

from api.dialects.native.schemas import Image
from shared import ids
from shared.errors import NotReady
from shared.keys import thumbnail_key
from shared.progress import JobView
from shared.services import Services

_THUMBNAIL_TYPE = "image/webp"
#: what the worker notes for us, not for the client
_OWN_FACTS = {"thumbnail"}


def image_link(services: Services, view: JobView, *, thumbnail: bool = False) -> str:
    """A link to the image of a job, or to its thumbnail. Raises `NotReady` where it has none."""
    if view.result_key is None:
        raise NotReady(f"This job is {view.state}; it has no image.")
    facts = view.result or {}
    key, content_type = view.result_key, facts.get("content_type", "application/octet-stream")
    # a small image is its own thumbnail
    if thumbnail and facts.get("thumbnail"):
        key, content_type = thumbnail_key(key), _THUMBNAIL_TYPE
    filename = f"{ids.job_id(view.batch_public_id, view.idx)}.{key.rsplit('.', 1)[1]}"
    seconds = services.settings.link_seconds
    return services.storage.link(key, expires_in=seconds, content_type=content_type, filename=filename)


def image_answer(services: Services, view: JobView) -> Image | None:
    """What a job's answer tells of its image."""
    if view.result_key is None or view.result_sha256 is None:
        return None
    url, facts = image_link(services, view), view.result or {}
    ours = {
        "url": url,
        "thumbnail_url": image_link(services, view, thumbnail=True) if facts.get("thumbnail") else url,
        "sha256": view.result_sha256.hex(),
    }
    return Image.model_validate({name: facts[name] for name in facts if name not in _OWN_FACTS} | ours)
