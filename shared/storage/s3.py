"""Objects in an S3 bucket, at AWS or at any server that speaks S3 with signature version 4: `s3://bucket/prefix`."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.parsers import ResponseParserError

from shared.errors import ObjectMissing, SettingsError, StorageError, StorageMisconfigured, StorageUnavailable
from shared.settings import Settings
from shared.storage import KEY, ObjectInfo, checked_key, inline

#: most keys that one bulk delete takes
DELETE_CHUNK = 1000

_ACCESS = "let this key get, put, delete and list objects in the bucket"
_REGION = "S3_REGION (or S3_ENDPOINT_URL) is not that of the bucket"
REMEDIES = {
    "NoSuchBucket": "create the bucket, or correct STORAGE_URL",
    "InvalidBucketName": "correct the bucket in STORAGE_URL",
    "AccessDenied": _ACCESS,
    "403": f"check S3_ACCESS_KEY and S3_SECRET_KEY, and {_ACCESS}",
    "InvalidAccessKeyId": "S3_ACCESS_KEY is not known there",
    "SignatureDoesNotMatch": "S3_SECRET_KEY does not belong to S3_ACCESS_KEY",
    "RequestTimeTooSkewed": "the clock of this machine is wrong: set it (NTP)",
    "ExpiredToken": "renew the AWS credentials of this process",
    "InvalidToken": "renew the AWS credentials of this process",
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "301": _REGION,
    "405": "S3_ENDPOINT_URL is not an S3 server",
}
#: answers below 500 that may be different the next time; damaged transfers are among them
PASSING = {
    "BadDigest", "IncompleteBody", "InvalidDigest", "OperationAborted", "RequestTimeout", "SlowDown", "Throttling",
    "ThrottlingException", "TooManyRequests", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch", "408", "429",
}  # fmt: skip


@dataclass(frozen=True)
class Timeouts:
    """Seconds: to connect, of silence on a connection, and for the whole body of one object."""

    connect: float = 5.0
    read: float = 30.0
    body: float = 120.0


class S3Storage:
    """Storage below a prefix of one bucket. Safe among threads; open it anew after a fork."""

    def __init__(self, settings: Settings, bucket: str, prefix: str = "", timeouts: Timeouts | None = None) -> None:
        """Connects to nothing. `prefix` is empty or ends with `/`."""
        self._settings = settings
        self._bucket = bucket
        self._prefix = prefix
        self._timeouts = timeouts or Timeouts()

    def put(self, key: str, data: bytes, *, content_type: str) -> None:
        """Store `data` under `key`. The server compares its SHA-256 and keeps nothing that came in differently."""
        checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
        client = self._client  # made before the clock starts
        body = _Body(data, time.monotonic() + self._timeouts.body)
        with self._mapped("put", key):
            client.put_object(**self._object(key), Body=body, ContentType=content_type, ChecksumSHA256=checksum)

    def get(self, key: str) -> bytes:
        """The bytes under `key`. Raises `ObjectMissing`."""
        client = self._client
        deadline = time.monotonic() + self._timeouts.body
        with self._mapped("get", key):
            stream = client.get_object(**self._object(key))["Body"]
            with contextlib.closing(stream):
                data = bytearray()
                for chunk in stream.iter_chunks(16 * 1024):
                    data += chunk
                    _still(deadline)
        return bytes(data)

    def head(self, key: str) -> ObjectInfo | None:
        """Size and time of `key`, or None."""
        with self._mapped("head", key):
            try:
                answer = self._client.head_object(**self._object(key))
            except ClientError as error:
                if _code(error) not in ("404", "NoSuchKey", "NotFound"):
                    raise
                self._check_bucket()
                return None
        return ObjectInfo(key, answer["ContentLength"], answer["LastModified"])

    def _check_bucket(self) -> None:
        """Raise where there is no bucket: a HEAD has no body that could say whether key or bucket is missing."""
        try:
            self._client.head_bucket(Bucket=self._bucket)
        except ClientError as error:
            if _code(error) == "404":
                raise ClientError(
                    {**error.response, "Error": {"Code": "NoSuchBucket", "Message": "there is no such bucket"}},
                    "HeadBucket",
                ) from error
            if _code(error) != "403":  # a key that may not look at buckets may still read what is in them
                raise

    def delete(self, keys: Iterable[str]) -> None:
        """Remove these objects, a thousand in one request."""
        names = ({"Key": self._prefix + checked_key(key)} for key in keys)
        while chunk := list(islice(names, DELETE_CHUNK)):
            with self._mapped("delete", chunk[0]["Key"]):
                answer = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": chunk, "Quiet": True})
                for fault in answer.get("Errors", []):
                    if fault.get("Code") != "NoSuchKey":
                        raise ClientError({"Error": fault}, "DeleteObjects")

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key starts with `prefix`, in order of key. What other programs keep there is left out."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix
        )
        with self._mapped("list", prefix):
            for page in pages:
                for item in page.get("Contents", []):
                    key = item["Key"].removeprefix(self._prefix)
                    if KEY.fullmatch(key):
                        yield ObjectInfo(key, item["Size"], item["LastModified"])

    def link(self, key: str, *, expires_in: int, content_type: str, filename: str) -> str:
        """A presigned URL at the public endpoint; it ends sooner where the AWS credentials are temporary."""
        fixed = {"ResponseContentType": content_type, "ResponseContentDisposition": inline(filename)}
        with self._mapped("link", key):
            url: str = self._signer.generate_presigned_url(
                "get_object", Params={**self._object(key), **fixed}, ExpiresIn=expires_in
            )
        return url

    def check(self, size: int = 32) -> None:
        """Write, read and delete a small object."""
        key, data = f"_check/{secrets.token_hex(8)}", secrets.token_bytes(size)
        self.put(key, data, content_type="application/octet-stream")
        try:
            info = self.head(key)
            if info is None or info.size != len(data) or self.get(key) != data:
                raise StorageMisconfigured(f"S3: {self._place} does not give back what was written to it")
        finally:
            self.delete([key])

    @property
    def _place(self) -> str:
        return f"bucket {self._bucket} at {self._settings.s3_endpoint_url or f'AWS {self._settings.s3_region}'}"

    def _object(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + checked_key(key)}

    @cached_property
    def _client(self) -> Any:
        return self._connect(self._settings.s3_endpoint_url)

    @cached_property
    def _signer(self) -> Any:
        """Signs links for the address that clients use; the signature covers the host name."""
        public = self._settings.s3_public_endpoint_url
        return self._connect(public) if public else self._client

    def _connect(self, endpoint: str | None) -> Any:
        settings = self._settings
        key, secret = settings.s3_access_key, settings.s3_secret_key
        config = Config(
            signature_version="s3v4",
            connect_timeout=self._timeouts.connect,
            read_timeout=self._timeouts.read,
            retries={"mode": "standard", "total_max_attempts": 3},
            max_pool_connections=settings.api_threads + settings.upload_threads,
            # servers at an own address rarely answer to bucket.host; the hash of the body is signed even over TLS
            s3={"addressing_style": "path" if endpoint else "auto", "payload_signing_enabled": True},
            # `put` names its SHA-256 itself; the client's own trailing checksums are unknown to older servers
            request_checksum_calculation="when_required",
            response_checksum_validation="when_supported",
        )
        try:
            with self._mapped("connect"):
                return Session().client(
                    "s3",
                    endpoint_url=endpoint,
                    region_name=settings.s3_region,
                    aws_access_key_id=key.get_secret_value() if key else None,
                    aws_secret_access_key=secret.get_secret_value() if secret else None,
                    config=config,
                )
        except ValueError as error:
            raise StorageMisconfigured(f"S3_ENDPOINT_URL: {error}") from error

    @contextlib.contextmanager
    def _mapped(self, action: str, key: str = "") -> Iterator[None]:
        """Turn errors of the vendor's client into ours, with the remedy."""
        what = f"S3 {action} {key}".rstrip() + f" ({self._place})"
        try:
            yield
        except ClientError as error:
            raise self._ours(what, error) from error
        except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
            raise StorageMisconfigured(f"{what}: {error}: set S3_ACCESS_KEY and S3_SECRET_KEY") from error
        except ParamValidationError as error:
            raise StorageMisconfigured(f"{what}: {error}") from error
        except ResponseParserError as error:
            raise StorageMisconfigured(f"{what}: the answer is not S3: check S3_ENDPOINT_URL") from error
        except (BotoCoreError, _TooSlow) as error:
            raise StorageUnavailable(f"{what}: {error}: check S3_ENDPOINT_URL and the network") from error

    @staticmethod
    def _ours(what: str, error: ClientError) -> StorageError:
        code, status = _code(error), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        said = f"{what}: {code}: {error.response['Error'].get('Message') or 'no reason given'}"[:500]
        if code == "NoSuchKey":
            return ObjectMissing(said)
        if status >= 500 or code in PASSING:
            return StorageUnavailable(
                f"{said}; tried {error.response['ResponseMetadata'].get('RetryAttempts', 0) + 1}×"
            )
        return StorageMisconfigured(f"{said}: {REMEDIES[code]}" if code in REMEDIES else said)


class _TooSlow(Exception):
    """The body of an object took longer than `Timeouts.body`."""


class _Body(io.BytesIO):
    """Bytes to send that end the request when it takes too long: a trickle never looks like silence to a socket."""

    def __init__(self, data: bytes, deadline: float) -> None:
        super().__init__(data)
        self._deadline = deadline

    def read(self, size: int | None = -1, /) -> bytes:
        _still(self._deadline)
        return super().read(size)


def _still(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise _TooSlow("the transfer takes too long")


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def open_storage(settings: Settings) -> S3Storage:
    """The bucket and prefix that `STORAGE_URL` names. Raises `SettingsError`."""
    url = urlsplit(settings.storage_url)
    prefix = url.path.strip("/")
    if not url.netloc or url.query or url.fragment or (prefix and not KEY.fullmatch(prefix)):
        raise SettingsError("STORAGE_URL: expected s3://bucket or s3://bucket/prefix")
    return S3Storage(settings, url.netloc, f"{prefix}/" if prefix else "")
