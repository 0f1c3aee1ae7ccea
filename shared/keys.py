"""Where images lie in the object storage. Keys are made of ids and the content's hash only, never of a user's text."""

from __future__ import annotations

#: images of one folder, so that a folder of a file system stays quick to list
_FOLDER_SIZE = 1000
_THUMBNAIL = ".thumb.webp"


def image_key(tenant_id: int, batch_id: int, idx: int, sha256_hex: str, extension: str) -> str:
    """The key of a job's image. The same bytes for the same job give the same key, so storing twice is harmless."""
    return f"t/{tenant_id}/{batch_id}/{idx // _FOLDER_SIZE}/{idx}-{sha256_hex}.{extension}"


def thumbnail_key(key: str) -> str:
    """The key of the thumbnail that belongs to an image."""
    return key.rsplit(".", 1)[0] + _THUMBNAIL
