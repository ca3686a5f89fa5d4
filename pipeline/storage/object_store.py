"""Buckets of S3, Google Cloud Storage and Azure, through obstore. Only this module imports it.

The errors of a store become those of files: FileNotFoundError, FileExistsError, PermissionError
and OSError. The last two are StorageErrors as well.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

from gptbatch.pipeline.errors import ConfigError, StorageError
from gptbatch.pipeline.system.error_text import shortened
from gptbatch.pipeline.system.redact import redact

# The client repeats requests after 5xx errors, lost connections and timeouts.
RETRY_TIMEOUT_S = 180
# The time decides, not the number.
MAX_RETRIES = 1000
MAX_PROBE_RETRIES = 3
REQUEST_TIMEOUT_S = 60
CONNECT_TIMEOUT_S = 10
_STATUS = re.compile(r"status code: (\d{3} [A-Za-z ]+)")
_CODE = re.compile(r"<Code>(\w+)</Code>")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object in a bucket.

    Attributes:
        key: Its name in the bucket.
        size: In bytes.
        version: Changes with each write (ETag).
        modified_s: When it was written, by the clock of the store, in seconds since 1970.
    """

    key: str
    size: int
    version: str
    modified_s: float


class ObjectStoreError(StorageError, OSError):
    """A request that failed. Code that handles the errors of files handles it, too."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


class ObjectPermissionError(ObjectStoreError, PermissionError):
    """The store refuses a request."""


class Bucket:
    """A bucket. `open_bucket` returns one.

    Args:
        url: Such as `s3://bucket`.

    Raises:
        ConfigError: obstore is not installed, or a variable of the environment is invalid.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._clock_offset_s = 0.0
        obstore = _import_obstore(url)
        settings: dict[str, Any] = {}
        if url.startswith("s3:"):
            # The store compares it with what has arrived.
            settings["checksum_algorithm"] = "SHA256"
            if os.environ.get("AWS_PROFILE"):
                settings["credential_provider"] = _aws_profile()
        settings["client_options"] = {
            # for endpoints that the user names with http:
            "allow_http": True,
            "timeout": timedelta(seconds=REQUEST_TIMEOUT_S),
            "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
        }
        timeout = timedelta(seconds=RETRY_TIMEOUT_S)
        try:
            # A store that does not know a request answers it with a 5xx error, too.
            self._store, self._impatient_store = (
                obstore.store.from_url(
                    url,
                    retry_config={"max_retries": retries, "retry_timeout": timeout},
                    **settings,
                )
                for retries in (MAX_RETRIES, MAX_PROBE_RETRIES)
            )
        except (obstore.exceptions.BaseError, ValueError) as error:
            raise ConfigError(f"{url}: cannot be opened ({_first_line(error)})") from error

    def set_clock(self, modified_s: float) -> None:
        """Take the time of an object that has just been written as the time of the store."""
        self._clock_offset_s = modified_s - time.time()

    def now_s(self) -> float:
        """Return the time by the clock of the store, in seconds since 1970."""
        return time.time() + self._clock_offset_s

    def info(self, key: str) -> ObjectInfo:
        """Return what the store says about an object.

        Raises:
            OSError: There is none, or the request failed.
        """
        with self._errors_of_files(key):
            return _info(_obstore().head(self._store, key))

    def get(
        self, key: str, *, start: int = 0, end: int | None = None, version: str | None = None
    ) -> bytes:
        """Return the bytes of an object from `start` to before `end`; None is its end.

        Args:
            key: The object.
            start: The first byte.
            end: One after the last byte, at most the size.
            version: The only version to read; None reads any.

        Raises:
            OSError: There is none, it has another version, or the request failed.
        """
        options: dict[str, Any] = {}
        if version is not None:
            options["if_match"] = version
        if end is not None:
            options["range"] = (start, end)
        elif start:
            options["range"] = {"offset": start}
        with self._errors_of_files(key):
            return bytes(_obstore().get(self._store, key, options=options).bytes())

    def get_version(self, key: str) -> tuple[bytes, str]:
        """Return an object and its version. Raises as `get` does."""
        with self._errors_of_files(key):
            found = _obstore().get(self._store, key)
            return bytes(found.bytes()), found.meta["e_tag"] or ""

    def put(
        self, key: str, content: bytes, *, only_if_absent: bool = False, replaces: str | None = None
    ) -> str:
        """Write an object in one request, and return its version.

        Args:
            key: The object.
            content: Its bytes.
            only_if_absent: Write only where there is no object.
            replaces: Write only where the object has this version.

        Raises:
            FileExistsError: `only_if_absent`, and there is an object, as the store says. Some say
                so after they have written it, and some without writing: see object_writer.py.
            OSError: The request failed, or the object has another version.
        """
        mode: Any = "overwrite"
        if only_if_absent:
            mode = "create"
        elif replaces is not None:
            mode = {"e_tag": replaces}
        with self._errors_of_files(key):
            done = _obstore().put(self._store, key, content, mode=mode, use_multipart=False)
        return done["e_tag"] or ""

    def refuses_existing(self, key: str, content: bytes) -> bool:
        """Write an object that exists, only if it is absent. Returns whether the store refuses.

        Raises:
            OSError: The store refuses it for lack of credentials.
        """
        with self._errors_of_files(key):
            try:
                _obstore().put(
                    self._impatient_store, key, content, mode="create", use_multipart=False
                )
            except _obstore().exceptions.AlreadyExistsError:
                return True
            except _obstore().exceptions.GenericError:
                # Such as 501: it does not know the condition.
                return False
        return False

    def delete(self, key: str) -> None:
        """Delete an object, if there is one."""
        with self._errors_of_files(key):
            try:
                _obstore().delete(self._store, key)
            except FileNotFoundError:
                return

    def list(self, folder: str) -> tuple[list[ObjectInfo], list[str]]:
        """Return the objects directly in a folder, and its subfolders."""
        with self._errors_of_files(folder):
            found = _obstore().list_with_delimiter(self._store, folder or None)
        return [_info(meta) for meta in found["objects"]], list(found["common_prefixes"])

    def walk(self, folder: str) -> Iterator[ObjectInfo]:
        """Yield the objects in a folder and its subfolders."""
        with self._errors_of_files(folder):
            for chunk in _obstore().list(self._store, folder or None):
                yield from map(_info, chunk)

    @contextmanager
    def _errors_of_files(self, key: str) -> Iterator[None]:
        exceptions = _obstore().exceptions
        name = f"{self.url}/{key}"
        try:
            yield
        except exceptions.AlreadyExistsError as error:
            raise FileExistsError(errno.EEXIST, _first_line(error), name) from error
        except exceptions.PreconditionError as error:
            raise ObjectStoreError(errno.ESTALE, "has changed meanwhile", name) from error
        except (
            exceptions.PermissionDeniedError,
            exceptions.UnauthenticatedError,
        ) as error:
            raise _permission_error(error, name) from error
        except (exceptions.BaseError, FileNotFoundError, ValueError) as error:
            if "NoSuchBucket" in str(error):
                problem = f"there is no bucket {self.url}"
                raise ObjectStoreError(errno.ENXIO, problem, name) from error
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(errno.ENOENT, "no such object", name) from error
            # So answer the services of a cloud that give credentials.
            if _first_line(error).startswith(("401", "403")):
                raise _permission_error(error, name) from error
            raise ObjectStoreError(errno.EIO, _first_line(error), name) from error


def _permission_error(error: BaseException, name: str) -> ObjectPermissionError:
    problem = f"{_first_line(error)}: credentials are missing, or do not allow this"
    return ObjectPermissionError(errno.EACCES, problem, name)


@cache
def open_bucket(url: str) -> Bucket:
    """Return the bucket of a URL such as `s3://bucket`. Raises as `Bucket` does."""
    return Bucket(url)


def _obstore() -> Any:
    import obstore

    return obstore


def _import_obstore(url: str) -> Any:
    try:
        import obstore
        import obstore.store
    except ImportError as error:
        raise ConfigError(
            f"{url}: object stores need the package obstore: pip install 'gptbatch[cloud]'"
        ) from error
    return obstore


def _aws_profile() -> Any:
    """Return the credentials of AWS_PROFILE, which obstore itself does not read."""
    try:
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise ConfigError(
            "AWS_PROFILE is set, and reading it needs boto3: pip install boto3"
        ) from error
    try:
        return Boto3CredentialProvider()
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(f"AWS_PROFILE: {redact(str(error))}") from error


def _info(meta: Any) -> ObjectInfo:
    return ObjectInfo(
        key=meta["path"],
        size=meta["size"],
        version=meta["e_tag"] or "",
        modified_s=meta["last_modified"].timestamp(),
    )


def _first_line(error: BaseException) -> str:
    """Return status and code of a response, or else the first line of the message."""
    text = str(error)
    status, code = _STATUS.search(text), _CODE.search(text)
    if status is not None:
        return f"{status[1].strip()}{f', {code[1]}' if code else ''}"
    return shortened(redact(text.partition("\n")[0]))
