"""Where images lie in the object storage. Keys are made of ids and the content's hash only, never of a user's text."""

from __future__ import annotations

import re

#: images of one folder, so that a folder of a file system stays quick to list
_FOLDER_SIZE = 1000
_THUMBNAIL = ".thumb.webp"
#: what every key of an image begins with
ROOT = "t/"
_PLACE = re.compile(r"t/\d+/(\d+)/\d+/(\d+)-[0-9a-f]{64}\..+")


def batch_prefix(tenant_id: int, batch_id: int) -> str:
    """What the keys of all images of a batch begin with."""
    return f"{ROOT}{tenant_id}/{batch_id}/"


def image_key(tenant_id: int, batch_id: int, idx: int, sha256_hex: str, extension: str) -> str:
    """The key of a job's image. The same bytes for the same job give the same key, so storing twice is harmless."""
    return f"{batch_prefix(tenant_id, batch_id)}{idx // _FOLDER_SIZE}/{idx}-{sha256_hex}.{extension}"


def thumbnail_key(key: str) -> str:
    """The key of the thumbnail that belongs to an image."""
    return key.rsplit(".", 1)[0] + _THUMBNAIL


def place_of(key: str) -> tuple[int, int] | None:
    """The batch and the position of the job to which an image or thumbnail belongs; None for other keys."""
    match = _PLACE.fullmatch(key)
    return (int(match[1]), int(match[2])) if match else None
