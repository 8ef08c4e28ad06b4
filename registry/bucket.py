"""A bucket on any S3 endpoint with conditional writes: small things by compare-and-set, folders of files in parallel.

Keys are below the prefix that the setting `bucket` names. What cannot be done is a BucketError; a write whose condition
did not hold is Changed. boto3 is imported where a bucket is opened: light commands never do.
"""

from __future__ import annotations

import base64
import hashlib
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from typing import Any

from registry.errors import BucketError
from registry.manifest import MANIFEST
from registry.settings import Settings

CONNECT_SECONDS, READ_SECONDS = 4, 30
PART = 16 << 20
AT_ONCE = 10
DELETED_AT_ONCE = 1000
GONE = {"NoSuchKey", "404"}
CHANGED = {"PreconditionFailed", "412", "ConditionalRequestConflict", *GONE}
WRONG_KEY = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "401"}
KEYS_FIX = "set FT_S3_ACCESS_KEY and FT_S3_SECRET_KEY in .env to a key that may read, write and list this bucket"

_making = threading.Lock()


@dataclass(frozen=True)
class Stored:
    """What lies under a key, the ETag that a change of it must name, and the server's clock (Unix time)."""

    body: bytes
    etag: str
    now: float


@dataclass(frozen=True)
class Named:
    """A key, with its size in bytes."""

    key: str
    size: int
    etag: str


class Changed(Exception):
    """The condition of a write did not hold: somebody else was faster."""


def open_bucket(settings: Settings) -> Bucket:
    """The bucket of the settings; whether it can be used, `check` tells. Raises BucketError if none is named."""
    name, _, prefix = settings.bucket.removeprefix("s3://").partition("/")
    if not settings.bucket.startswith("s3://") or not name:
        raise BucketError(
            f"no bucket: {settings.bucket!r}" if settings.bucket else "no bucket is named", place="bucket in ft.yaml",
            fix="write `bucket: s3://NAME/PREFIX` into ft.yaml, and `s3_endpoint` unless it is AWS",
        )  # fmt: skip
    return Bucket(name, prefix.strip("/"), settings)


class Bucket:
    """Safe to use from several threads."""

    def __init__(self, name: str, prefix: str, settings: Settings) -> None:
        self.name, self.prefix = name, f"{prefix}/" if prefix else ""
        self.place = f"s3://{name}/{prefix} at {settings.s3_endpoint or 'AWS'}"
        self._client = _client(settings, attempts=3)
        # Tried twice by the client, a write that was done without an answer would find its own content and say Changed.
        self._once = _client(settings, attempts=1)

    def close(self) -> None:
        for client in (self._client, self._once):
            client.close()

    def get(self, key: str) -> Stored | None:
        """None if there is nothing under that key."""
        with self._errors(f"cannot read {key}"):
            try:
                answer = self._client.get_object(Bucket=self.name, Key=self.prefix + key)
            except self._client.exceptions.NoSuchKey:
                return None
            return Stored(answer["Body"].read(), str(answer["ETag"]), _clock(answer))

    def put(self, key: str, body: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        """Write; the new ETag. Raises Changed if another ETag is there, or anything with `if_absent`."""
        conditions = {"IfMatch": if_match} if if_match else {"IfNoneMatch": "*"} if if_absent else {}
        client = self._once if conditions else self._client
        with self._errors(f"cannot write {key}", conditional=bool(conditions)):
            # Without it, a connection that broke before the first byte left an empty object (SeaweedFS 4.48).
            digest = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
            answer = client.put_object(
                Bucket=self.name, Key=self.prefix + key, Body=body, ContentMD5=digest, **conditions
            )
            return str(answer["ETag"])

    def now(self) -> float:
        """Unix time by the endpoint's clock, which is the one that all who use the bucket share."""
        with self._errors("cannot be looked at"):
            return _clock(self._client.head_bucket(Bucket=self.name))

    def names(self, prefix: str, after: str = "") -> list[Named]:
        """Everything whose key begins with `prefix`, in the order of keys; only what comes behind `after`."""
        ask = {"Bucket": self.name, "Prefix": self.prefix + prefix}
        if after:
            ask["StartAfter"] = self.prefix + after
        with self._errors(f"cannot list {prefix}"):
            pages = self._client.get_paginator("list_objects_v2").paginate(**ask)
            found = [each for page in pages for each in page.get("Contents", ())]
        cut = len(self.prefix)
        return [Named(str(each["Key"])[cut:], int(each["Size"]), str(each["ETag"])) for each in found]

    def remove(self, key: str) -> None:
        with self._errors(f"cannot delete {key}"):
            self._client.delete_object(Bucket=self.name, Key=self.prefix + key)

    def delete(self, folder: str) -> None:
        """Everything below the folder. Its manifest first: what is left by who is killed is not complete."""
        keys = sorted((each.key for each in self.names(folder.rstrip("/") + "/")), key=_is_manifest, reverse=True)
        for first in range(0, len(keys), DELETED_AT_ONCE):
            some = [{"Key": self.prefix + key} for key in keys[first : first + DELETED_AT_ONCE]]
            with self._errors(f"cannot delete {folder}"):
                self._client.delete_objects(Bucket=self.name, Delete={"Objects": some, "Quiet": True})

    def send(self, folder: Path, prefix: str, *, only: Iterable[str] | None = None) -> None:
        """The folder's files (or `only` those, by name) to `prefix`/NAME. A manifest last: it means 'complete'."""
        names = sorted(_files_of(folder) if only is None else only)
        for some in _manifests_last(names):
            with self._transfers(f"cannot send {folder.name}") as manager:
                ended = [
                    manager.upload(str(folder / name), self.name, f"{self.prefix}{prefix.rstrip('/')}/{name}")
                    for name in some
                ]
                _all(ended)

    def fetch(self, prefix: str, folder: Path, *, only: Iterable[str] | None = None) -> list[str]:
        """What lies below `prefix` into the folder; the names. A manifest last, as in `send`."""
        start = prefix.rstrip("/") + "/"
        known = {each.key.removeprefix(start): each for each in self.names(start)} if only is None else {}
        names = sorted(known if only is None else only)
        for some in _manifests_last(names):
            for name in some:
                _inside(folder, name).parent.mkdir(parents=True, exist_ok=True)
            with self._transfers(f"cannot fetch {prefix}") as manager:
                ended = [
                    manager.download(
                        self.name, f"{self.prefix}{start}{name}", str(_inside(folder, name)),
                        subscribers=[_Known(known[name])] if name in known else [],
                    )
                    for name in some
                ]  # fmt: skip
                _all(ended)
        return names

    def check(self) -> None:
        """Can job folders lie here? Raises BucketError with what is missing; takes seconds."""
        key = f".check/{uuid.uuid4().hex}"
        self.names(".check/")
        try:
            etag = self.put(key, b"1", if_absent=True)
            found = self.get(key)
            if found is None or found.body != b"1":
                raise BucketError(
                    "what was written cannot be read again", place=self.place, fix="take another endpoint"
                )
            self._must_refuse(key, "If-None-Match", if_absent=True)
            self._must_refuse(key, "If-Match", if_match='"00000000000000000000000000000000"')
            self.put(key, b"2", if_match=etag)
        except Changed:
            raise BucketError("it refuses conditional writes that it should take", place=self.place,
                              fix=CONDITIONS_FIX) from None  # fmt: skip
        self.remove(key)

    def _must_refuse(self, key: str, header: str, **condition: Any) -> None:
        try:
            self.put(key, b"1", **condition)
        except Changed:
            return
        raise BucketError(f"it writes whatever {header} says: two trainers could both publish", place=self.place,
                          fix=CONDITIONS_FIX)  # fmt: skip

    @contextmanager
    def _transfers(self, doing: str) -> Iterator[Any]:
        from boto3.s3.transfer import TransferConfig, create_transfer_manager

        parts = TransferConfig(multipart_threshold=PART, multipart_chunksize=PART, max_concurrency=AT_ONCE)
        with self._errors(doing), create_transfer_manager(self._client, parts) as manager:
            yield manager

    @contextmanager
    def _errors(self, doing: str, conditional: bool = False) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError
        from s3transfer.exceptions import RetriesExceededError

        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if conditional and code in CHANGED:
                raise Changed(doing) from None
            raise _refused(doing, code, str(error), self) from error
        except (BotoCoreError, Boto3Error, RetriesExceededError, ConnectionError) as error:
            raise _away(doing, error, self) from error


class _Known:
    """Tells a download what the listing said, so that it need not ask for each file's size first."""

    def __init__(self, named: Named) -> None:
        self.named = named

    def on_queued(self, future: Any, **_: Any) -> None:
        future.meta.provide_transfer_size(self.named.size)
        future.meta.provide_object_etag(self.named.etag)


CONDITIONS_FIX = (
    "take an endpoint with conditional writes: AWS S3, Cloudflare R2, Backblaze B2, MinIO and SeaweedFS have them"
)


@cache
def _session() -> Any:
    """One for all clients of this process: with its own, each client read botocore's model of S3 again, for 0.1 s."""
    import boto3

    return boto3.session.Session()


def _client(settings: Settings, attempts: int) -> Any:
    from botocore.config import Config

    config = Config(
        signature_version="s3v4",
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        retries={"total_max_attempts": attempts, "mode": "standard"},
        max_pool_connections=2 * AT_ONCE,
        s3={"addressing_style": "path"} if settings.s3_endpoint else {},
        # Other makers' endpoints refuse the checksums that boto3 sends since 1.36.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    with _making:  # a session is not safe to use from several threads; its clients are
        return _session().client(
            "s3",
            endpoint_url=settings.s3_endpoint or None,
            region_name=settings.s3_region if settings.s3_endpoint or settings.s3_region != "auto" else None,
            aws_access_key_id=settings.s3_access_key or None,
            aws_secret_access_key=settings.s3_secret_key or None,
            config=config,
        )


def _refused(doing: str, code: str, said: str, bucket: Bucket) -> BucketError:
    """What the endpoint's answer means, and what to do."""
    if code in WRONG_KEY:
        return BucketError(f"{doing}: the key is wrong ({code})", place=bucket.place, fix=KEYS_FIX)
    if code in ("NoSuchBucket", "NotFound"):
        return BucketError(f"there is no bucket {bucket.name}", place=bucket.place,
                           fix="make it with your provider, or name another one as `bucket` in ft.yaml")  # fmt: skip
    if code in ("AccessDenied", "AllAccessDisabled", "403"):
        return BucketError(f"{doing}: the key may not do that ({code})", place=bucket.place, fix=KEYS_FIX)
    if code == "NotImplemented":
        return BucketError(f"{doing}: it does not know conditional writes", place=bucket.place, fix=CONDITIONS_FIX)
    return BucketError(f"{doing}: {said}", place=bucket.place, fix="look at what the endpoint says")


def _away(doing: str, error: Exception, bucket: Bucket) -> BucketError:
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return BucketError(f"{doing}: there is no key for the bucket", place=bucket.place, fix=KEYS_FIX)
    return BucketError(f"{doing}: it does not answer ({type(error).__name__})", place=bucket.place,
                       fix="check the network, and `s3_endpoint` in ft.yaml")  # fmt: skip


def _clock(answer: Any) -> float:
    return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()


def _files_of(folder: Path) -> list[str]:
    return [each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_file()]


def _is_manifest(name: str) -> bool:
    return name.rpartition("/")[2] == MANIFEST


def _manifests_last(names: list[str]) -> list[list[str]]:
    parts = [name for name in names if not _is_manifest(name)], [name for name in names if _is_manifest(name)]
    return [some for some in parts if some]


def _inside(folder: Path, name: str) -> Path:
    """Where a name of the bucket lies here. Who may write to the bucket must not choose a place outside."""
    if name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/")):
        raise BucketError(f"a name that no job folder has: {name!r}", place=str(folder), fix="delete it in the bucket")
    return folder / name


def _all(ended: list[Any]) -> None:
    """Wait for all transfers; the first error of any."""
    results: list[Callable[[], Any]] = [each.result for each in ended]
    for result in results:
        result()
