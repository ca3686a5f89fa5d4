"""Files of text as lines of bytes: compression told by content, encoding checked, lines of bounded length."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from gptbatch.pipeline.errors import InputNotFoundError, InputRowsError, StorageError
from gptbatch.pipeline.input.file_kind import describe_binary

MAX_LINE_BYTES = 16 * 2**20
BOM = b"\xef\xbb\xbf"
_HEAD_BYTES = 512
_ZSTD_MAX_WINDOW_BYTES = 2**31  # `zstd --ultra --long=31`; the library's own limit is 2**27
_READ_BYTES = 4096  # bounds what one call can expand to
_COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")


class LineReader:
    """The lines of a file, plain or compressed by gzip, zstd, bzip2 or xz. The name does not decide.

    Args:
        path: the file to read.
        name: the file as messages name it.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._line = 0  # the last one that was read

    def lines(self) -> Iterator[tuple[int, bytes | None]]:
        """Yield (line number from 1, bytes with the line end).

        The bytes are None for a line longer than MAX_LINE_BYTES, which is skipped without being held in memory.
        A byte order mark before line 1 is removed.

        Raises:
            InputRowsError: the content is damaged, or is not text.
            InputNotFoundError: the file may not be read.
            StorageError: reading failed.
        """
        self._line = 0
        with self.reading() as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                self._line += 1
                if self._line == 1:
                    line = line.removeprefix(BOM)
                if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                    while line and not line.endswith(b"\n"):
                        line = file.readline(MAX_LINE_BYTES)
                    yield self._line, None
                else:
                    yield self._line, line

    @contextmanager
    def reading(self) -> Iterator[io.BufferedReader]:
        """The decompressed content. Raises as `lines` does."""
        try:
            with self.open() as file:
                if (
                    kind := describe_binary(file.peek(_HEAD_BYTES)[:_HEAD_BYTES], self.name)
                ) is not None:
                    raise InputRowsError(f"{self.name}: is {kind}")
                yield file
        except (EOFError, gzip.BadGzipFile, zlib.error, _CompressionError) as error:
            where = f"{self.name}:{self._line + 1}" if self._line else self.name
            raise InputRowsError(
                f"{where}: the compressed file is damaged or cut off ({error})"
            ) from error
        except PermissionError as error:
            raise InputNotFoundError(f"{self.name}: may not be read ({error.strerror})") from error
        except OSError as error:
            raise StorageError(
                f"{self.name}: reading failed behind line {self._line} ({error.strerror or error})"
            ) from error

    def open(self) -> io.BufferedReader:
        """The decompressed content as a stream of bytes."""
        raw = self.path.open("rb")
        head = raw.read(6)
        raw.seek(0)
        if len(head) < 6 and self.path.suffix.lower() in _COMPRESSED_SUFFIXES:
            raw.close()
            what = "is empty" if not head else f"holds {len(head)} bytes"
            raise InputRowsError(
                f"{self.name}: {what}, which no compressed file is; it is damaged or cut off"
            )
        if head.startswith(b"\x1f\x8b"):
            return _Owned(gzip.GzipFile(fileobj=raw), raw)
        if (new_frame := _decompressor(head)) is not None:
            return io.BufferedReader(cast(io.RawIOBase, _Frames(raw, new_frame)))
        return raw


def _decompressor(head: bytes) -> Callable[[], Any] | None:
    """What makes a decompressor for each frame of a file that begins so; None for a file that is not compressed."""
    if head.startswith(b"BZh"):
        return bz2.BZ2Decompressor
    if head.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMADecompressor
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):
        import zstandard

        return zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW_BYTES).decompressobj
    return None


class _CompressionError(Exception):
    """A frame that cannot be decompressed."""


class _Owned(io.BufferedReader):
    """A decompressor that closes the file below it, too."""

    def __init__(self, stream: Any, below: BinaryIO) -> None:
        super().__init__(stream)
        self._below = below

    def close(self) -> None:
        super().close()
        self._below.close()


class _Frames(io.RawIOBase):
    """All frames of a compressed file, one after the other. A frame that is cut off, or anything else behind one, is an error.

    Python's own readers of bzip2 and xz take what is not a frame for the end of the file.
    """

    def __init__(self, file: BinaryIO, new_frame: Callable[[], Any]) -> None:
        self._file, self._new_frame = file, new_frame
        self._frame: Any = None
        self._compressed = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._compressed = self._compressed or self._file.read(_READ_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise _CompressionError("the last frame has no end")
                return 0
            if self._frame is None and self._new_frame is lzma.LZMADecompressor:
                self._compressed = self._compressed.lstrip(
                    b"\0"
                )  # padding between the streams of an xz file
                if not self._compressed:
                    continue
            self._frame = self._frame or self._new_frame()
            try:
                self._ready = self._frame.decompress(self._compressed)
            except Exception as error:  # zstandard, lzma and bz2 have an error each
                raise _CompressionError(str(error) or "not enough memory for its window") from error
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        super().close()
        self._file.close()
