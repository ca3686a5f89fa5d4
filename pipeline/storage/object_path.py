"""ObjectPath: the name of an object, or of a folder of objects, with the methods of a Path."""

from __future__ import annotations

import errno
import fnmatch
import glob
import io
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, cast

from gptbatch.pipeline.storage.object_store import Bucket, ObjectInfo, open_bucket
from gptbatch.pipeline.system.paths import OBJECT_URL

# of each request of a reader; a table of Parquet is read in small pieces at its end
READ_BYTES = 4 << 20


class ObjectPath:
    """The name of an object in a bucket, or of a folder: the objects whose names begin with it.

    Args:
        bucket: The bucket.
        key: The name in it, without slashes at its ends; "" is the whole bucket.
        info: What a listing said about the object.
    """

    __slots__ = ("_info", "bucket", "key")

    def __init__(self, bucket: Bucket, key: str, info: ObjectInfo | None = None) -> None:
        self.bucket, self.key, self._info = bucket, key, info

    @classmethod
    def parse(cls, url: str) -> ObjectPath:
        """Return the path of a URL such as `s3://bucket/folder`.

        Raises:
            ConfigError: The store cannot be used.
        """
        match = OBJECT_URL.fullmatch(url)
        assert match is not None
        return cls(open_bucket(match[1]), (match[2] or "").strip("/"))

    # -- names -------------------------------------------------------------------------------------

    def __str__(self) -> str:
        return f"{self.bucket.url}/{self.key}" if self.key else self.bucket.url

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: ObjectPath) -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(self.bucket, f"{self.key}/{name}" if self.key else name)

    @property
    def name(self) -> str:
        """The last component."""
        return PurePosixPath(self.key).name

    @property
    def suffix(self) -> str:
        """The last suffix, `.gz` of `a.jsonl.gz`."""
        return PurePosixPath(self.key).suffix

    @property
    def suffixes(self) -> list[str]:
        """All suffixes, `.jsonl` and `.gz` of `a.jsonl.gz`."""
        return PurePosixPath(self.key).suffixes

    @property
    def parent(self) -> ObjectPath:
        """The folder of this object; of a bucket the bucket itself."""
        return ObjectPath(self.bucket, self.key.rpartition("/")[0])

    def relative_to(self, folder: ObjectPath) -> PurePosixPath:
        """Return the name below a folder."""
        return PurePosixPath(self.key).relative_to(folder.key)

    # -- requests ----------------------------------------------------------------------------------

    def info(self) -> ObjectInfo:
        """Return size and version, of the listing that found this path if one did.

        Raises:
            OSError: There is no such object, or the request failed.
        """
        return self._info or self.bucket.info(self.key)

    def is_file(self) -> bool:
        """Return whether there is an object of this name."""
        if not self.key:
            return False
        try:
            self.info()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Return whether there are objects below this name."""
        return any(True for _ in self.walk_files())

    def exists(self) -> bool:
        """Return whether there is an object of this name, or below it."""
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator[ObjectPath]:
        """Yield the objects and folders in this folder."""
        objects, folders = self.bucket.list(self.key)
        for info in objects:
            # Some programs mark a folder by an object of its name.
            if info.key != self.key:
                yield ObjectPath(self.bucket, info.key, info)
        for key in folders:
            yield ObjectPath(self.bucket, key)

    def walk_files(self) -> Iterator[ObjectPath]:
        """Yield the objects in this folder and its subfolders."""
        for info in self.bucket.walk(self.key):
            if info.key != self.key:
                yield ObjectPath(self.bucket, info.key, info)

    def open(self, mode: str = "rb", buffering: int = READ_BYTES) -> io.BufferedReader:
        """Open the object for reading. Reads request ranges of it, of one version.

        Args:
            mode: "rb".
            buffering: Least bytes of a request.

        Raises:
            OSError: There is no such object, or the request failed.
        """
        assert mode == "rb"
        return io.BufferedReader(cast(io.RawIOBase, ObjectReader(self)), buffering)

    def read_bytes(self) -> bytes:
        """Return the content, by one request."""
        return self.bucket.get(self.key)

    def unlink(self, missing_ok: bool = True) -> None:
        """Delete the object, if there is one."""
        assert missing_ok
        self.bucket.delete(self.key)


def match_objects(pattern: ObjectPath) -> list[ObjectPath]:
    """Return the objects whose names match a pattern, as `glob` does for files, sorted."""
    return sorted(_match(ObjectPath(pattern.bucket, ""), pattern.key.split("/")))


def _match(folder: ObjectPath, segments: list[str]) -> Iterator[ObjectPath]:
    """Yield the objects below a folder that match, a segment of the pattern per component.

    Only `**` lists subfolders whose names are not known to match.
    """
    first, others = segments[0], segments[1:]
    if not glob.has_magic(first):
        path = folder / first
        if others:
            yield from _match(path, others)
        elif path.is_file():
            yield path
    elif first == "**":
        for path in folder.walk_files():
            if _matches(list(path.relative_to(folder).parts), segments):
                yield path
    else:
        objects, folders = folder.bucket.list(folder.key)
        for info in [] if others else objects:
            if _is_match(info.key.rpartition("/")[2], first):
                yield ObjectPath(folder.bucket, info.key, info)
        for key in folders if others else []:
            if _is_match(key.rpartition("/")[2], first):
                yield from _match(ObjectPath(folder.bucket, key), others)


def _matches(parts: list[str], patterns: list[str]) -> bool:
    """Return whether the components of a name match a pattern with `**`."""
    if not patterns:
        return not parts
    if patterns[0] == "**":
        # It stands for any number of components that are not hidden.
        in_a_folder = bool(parts) and not parts[0].startswith(".") and _matches(parts[1:], patterns)
        return in_a_folder or _matches(parts, patterns[1:])
    return bool(parts) and _is_match(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])


def _is_match(name: str, pattern: str) -> bool:
    is_hidden = name.startswith(".") and not pattern.startswith(".")
    return not is_hidden and fnmatch.fnmatchcase(name, pattern)


class ObjectReader(io.RawIOBase):
    """Reads one version of an object by requests of ranges.

    Args:
        path: The object.

    Raises:
        OSError: There is no such object.
    """

    def __init__(self, path: ObjectPath) -> None:
        self._path, self._info = path, path.info()
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._info.size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, "seek before the first byte", str(self._path))
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readall(self) -> bytes:
        if self._position >= self._info.size:
            return b""
        content = self._path.bucket.get(
            self._info.key, start=self._position, version=self._info.version or None
        )
        self._position += len(content)
        return content

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._info.size)
        if end <= self._position:
            return 0
        content = self._path.bucket.get(
            self._info.key, start=self._position, end=end, version=self._info.version or None
        )
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
