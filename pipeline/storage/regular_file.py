"""Reads untrusted files and objects: regular files only, with bounded size and nesting."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from gptbatch.pipeline.storage.location import Location

# enough for a manifest of 500,000 parts
MAX_JSON_BYTES = 1 << 28
MAX_JSON_DEPTH = 32


@contextmanager
def named_in_errors(path: Location) -> Iterator[None]:
    """Add the file name to each OSError. `read` raises one without a name."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def file_sha256(path: Location) -> str:
    """Return the hexadecimal SHA-256 of a file. Raises OSError that names the file."""
    with named_in_errors(path), path.open("rb") as file:
        return sha256_of(file)


def sha256_of(file: BinaryIO) -> str:
    """Return the hexadecimal SHA-256 of an open file, from its first byte on."""
    file.seek(0)
    return hashlib.file_digest(cast(io.BufferedReader, file), "sha256").hexdigest()


def open_regular(path: Location) -> BinaryIO:
    """Open an object, a regular file, or a link to one, for reading.

    Raises:
        OSError: It cannot be opened, or it is a folder, FIFO, socket or device. These are never
            opened.
    """
    if not isinstance(path, Path):
        return path.open()
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    # O_NONBLOCK: the open does not block if a FIFO has replaced the file since
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def open_whole(path: Location) -> BinaryIO:
    """Open a file of which all is read: an object is fetched by one request.

    Raises:
        OSError: As `open_regular` does.
    """
    return open_regular(path) if isinstance(path, Path) else io.BytesIO(path.read_bytes())


def read_json(path: Location) -> Any:
    """Read a JSON file.

    Raises:
        OSError: It cannot be read. The error names the file.
        ValueError: It is larger than MAX_JSON_BYTES, or `parse_json` rejects it.
    """
    with named_in_errors(path), open_whole(path) as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"larger than {MAX_JSON_BYTES >> 20} MiB")
    return parse_json(content)


def parse_json(content: bytes | str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: It is not JSON, holds NaN or Infinity, or nests deeper than MAX_JSON_DEPTH.
    """
    try:
        value = json.loads(content, parse_constant=_reject_constant)
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_JSON_DEPTH}") from error
    level = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return value
    raise ValueError(f"nested deeper than {MAX_JSON_DEPTH}")


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"holds {name}, which is no JSON")
