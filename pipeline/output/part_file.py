"""Part files: their names, their footers, and the inspection of a file that has a part's name.

A part is a Parquet file of the table. Its schema metadata holds a footer under FOOTER_KEY: JSON
with the facts of the run, the rows that the part holds and the digest of their content.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from gptbatch.pipeline.errors import GptbatchError, OutOfMemoryError, StorageError
from gptbatch.pipeline.output.json_models import PART_NAME_PATTERN, Footer, Part, validated
from gptbatch.pipeline.output.old_formats import translate_facts
from gptbatch.pipeline.output.schema import FORMAT, content_digest
from gptbatch.pipeline.storage.location import Location
from gptbatch.pipeline.storage.regular_file import (
    named_in_errors,
    open_regular,
    open_whole,
    parse_json,
    sha256_of,
)
from gptbatch.pipeline.system.error_text import first_line

FOOTER_KEY = b"gptbatch"
PART_NAME = re.compile(PART_NAME_PATTERN)
# what to do about a damaged part, in messages
GENERATE_AGAIN = "delete it, and run the command of the run again, which generates its rows"


def part_name(number: int) -> str:
    """Return the file name of a part. Names sort as the numbers do."""
    return f"part-{number:06d}.parquet"


def part_number(name: str) -> int | None:
    """Return the number in a part's name, of this format or an earlier one; None for others."""
    match = PART_NAME.fullmatch(name)
    if match is None:
        return None
    number = int(match[1])
    return number if name in (part_name(number), f"part-{number:05d}.parquet") else None


@dataclass(frozen=True, slots=True, kw_only=True)
class PartFile:
    """A file with a part's name, as `inspect_part` found it.

    Attributes:
        path: The file.
        state: "sound": a whole part. "damaged": unreadable, or changed since it was written.
            "foreign": another Parquet file, a link, folder, FIFO, socket or device. "missing":
            deleted since the folder was listed.
        problem: Why the file is not sound; "" for a sound one.
        footer: The whole footer; None where there is no valid one.
        part: The part that the footer describes; None where there is no valid footer.
    """

    path: Location
    state: Literal["sound", "damaged", "foreign", "missing"]
    problem: str = ""
    footer: dict[str, Any] | None = None
    part: Part | None = None


class _NoFooterError(Exception):
    """A Parquet file that gptbatch did not write."""


@contextmanager
def open_parquet(path: Location, *, whole: bool = True) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file. Checksums are verified, and no threads are used.

    Args:
        path: The file.
        whole: Fetch an object by one request, into memory. Otherwise its row groups are fetched one
            by one.

    The file is opened here because pyarrow takes names with a colon for URLs. Raises the errors of
    pyarrow: see `is_damage`.
    """
    opened = open_whole if whole else open_regular
    with named_in_errors(path), opened(path) as file, _parquet_file(file) as parquet:
        yield parquet


def _parquet_file(file: BinaryIO) -> pq.ParquetFile:
    return pq.ParquetFile(
        file, page_checksum_verification=True, pre_buffer=False, buffer_size=1 << 16
    )


def is_damage(error: Exception) -> bool:
    """Return whether a read error is due to the bytes of the file.

    Other causes are memory, threads, permissions and the disk.

    Arrow raises OSError without an errno for bytes that it cannot decode.
    """
    if isinstance(error, (MemoryError, pa.ArrowCancelled)):
        return False
    if isinstance(error, OSError):
        return error.errno is None
    return isinstance(error, (pa.ArrowException, ValueError, LookupError, TypeError))


def read_error(path: Location, error: Exception) -> GptbatchError:
    """Return the error to raise for a read error that is no damage."""
    if isinstance(error, MemoryError):
        return OutOfMemoryError(f"{path}: cannot be read: out of memory ({error})")
    cause = (
        error.strerror
        if isinstance(error, OSError) and error.strerror
        else f"{type(error).__name__}: {error}"
    )
    return StorageError(f"{path}: cannot be read ({cause})")


def inspect_part(
    path: Location,
    *,
    content: bool = True,
    sha256: str | None = None,
    follow_links: bool = False,
) -> PartFile:
    """Inspect a file with a part's name.

    Args:
        path: The file.
        content: Read all rows and compare their digest with the footer. Otherwise only the footer
            is read.
        sha256: The recorded hash of the file, to compare if `content` is read; None for none.
        follow_links: Accept a link to a regular file, as readers of the table do. A run refuses
            links.

    Raises:
        StorageError: The file cannot be read, for a reason other than its content.
        OutOfMemoryError: There is not enough memory to read it.
    """
    footer: dict[str, Any] | None = None
    part: Part | None = None
    try:
        if problem := _irregularity(path, follow_links):
            return PartFile(path=path, state="foreign", problem=problem)
        with named_in_errors(path), (open_whole if content else open_regular)(path) as file:
            footer, rows = _read_footer(file)
            part = _part_of(footer, rows, path.name)
            if content and footer["format"] == FORMAT:
                _check_content(file, part)
            if content and sha256 not in (None, sha256_of(file)):
                raise ValueError("its bytes are not those that were written (SHA-256 differs)")
    except FileNotFoundError:
        return PartFile(path=path, state="missing", problem="gone")
    except _NoFooterError:
        return PartFile(path=path, state="foreign", problem="a Parquet file without its footer")
    except Exception as error:
        if not is_damage(error):
            raise read_error(path, error) from error
        problem = first_line(error)
        return PartFile(path=path, state="damaged", problem=problem, footer=footer, part=part)
    return PartFile(path=path, state="sound", footer=footer, part=part)


def inspect_footer(path: Location) -> PartFile:
    """Inspect a part by its footer alone, through a link too, as hub downloads are."""
    return inspect_part(path, content=False, follow_links=True)


def read_footer(path: Location) -> dict[str, Any] | None:
    """Return the footer of a part, or None. Raises the errors of `inspect_part`."""
    return inspect_footer(path).footer


def read_part(file: BinaryIO, name: str) -> Part:
    """Read a part that has been written, and check its content.

    Args:
        file: The open file.
        name: The name that it is about to get.

    Raises:
        Exception: The file is not sound. See `is_damage`.
    """
    part = _part_of(*_read_footer(file), name)
    _check_content(file, part)
    return part


def _irregularity(path: Location, follow_links: bool) -> str:
    """Return why a path is no regular file; "" for one, and for objects."""
    if not isinstance(path, Path):
        return ""
    mode = (path.stat() if follow_links else path.lstat()).st_mode
    if stat.S_ISREG(mode):
        return ""
    return "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"


def _read_footer(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Return the valid footer, and the number of rows in the metadata of Parquet."""
    metadata = pq.read_metadata(file)
    text = (metadata.metadata or {}).get(FOOTER_KEY)
    if text is None:
        raise _NoFooterError
    footer = translate_facts(parse_json(text))
    validated(Footer, {**footer, "name": part_name(0)} if isinstance(footer, dict) else footer)
    return footer, int(metadata.num_rows)


def _part_of(footer: dict[str, Any], rows: int, name: str) -> Part:
    part = validated(Part, {**footer, "name": name})
    if rows != part.samples:
        raise ValueError(f"it holds {rows} rows, and its footer says {part.samples}")
    return part


def _check_content(file: BinaryIO, part: Part) -> None:
    file.seek(0)
    with _parquet_file(file) as parquet:
        digest = content_digest(parquet.read(use_threads=False))
    if digest != part.content_digest:
        raise ValueError("its rows are not those that were written (content_digest differs)")
