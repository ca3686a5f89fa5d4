"""Opens plain files and files compressed by gzip, zstd, bzip2 or xz, told apart by content."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from gptbatch.pipeline.errors import InputRowsError
from gptbatch.pipeline.storage.location import Location

COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
# `zstd --ultra --long=31` needs this window. The default limit of the library is 2**27.
_ZSTD_MAX_WINDOW_BYTES = 2**31
# bounds the output of one call of a decompressor
_READ_BYTES = 4096


class FrameError(Exception):
    """A frame that cannot be decompressed."""


# raised by reads of a compressed file that is damaged or truncated
DAMAGE_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error, FrameError)


def open_decompressed(path: Location, name: str) -> io.BufferedReader:
    """Open a file and return its decompressed content.

    Reads raise one of DAMAGE_ERRORS where a compressed file is damaged or truncated.

    Args:
        path: The file.
        name: The file in messages.

    Raises:
        InputRowsError: The suffix is that of a compressed file, and the file is too short for one.
    """
    raw = path.open("rb")
    head = raw.read(6)
    raw.seek(0)
    if len(head) < 6 and path.suffix.lower() in COMPRESSED_SUFFIXES:
        raw.close()
        size = "is empty" if not head else f"holds {len(head)} bytes"
        raise InputRowsError(
            f"{name}: {size}, which no compressed file is; it is damaged or cut off"
        )
    if head.startswith(b"\x1f\x8b"):
        return _ClosingReader(gzip.GzipFile(fileobj=raw), raw)
    if (new_decompressor := _decompressor(head)) is not None:
        return io.BufferedReader(cast(io.RawIOBase, _Frames(raw, new_decompressor)))
    return raw


def _decompressor(head: bytes) -> Callable[[], Any] | None:
    """Return the decompressor class for the first bytes of a file, None for a plain file."""
    if head.startswith(b"BZh"):
        return bz2.BZ2Decompressor
    if head.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMADecompressor
    is_skippable_frame = head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5
    if head.startswith(b"\x28\xb5\x2f\xfd") or is_skippable_frame:
        import zstandard

        return zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW_BYTES).decompressobj
    return None


class _ClosingReader(io.BufferedReader):
    """A reader that also closes the compressed file. GzipFile leaves it open."""

    def __init__(self, stream: Any, file: BinaryIO) -> None:
        super().__init__(stream)
        self._file = file

    def close(self) -> None:
        super().close()
        self._file.close()


class _Frames(io.RawIOBase):
    """All frames of a compressed file in sequence.

    A truncated frame is an error, and so is other content after a frame. The readers of bz2 and
    lzma end silently at such content.
    """

    def __init__(self, file: BinaryIO, new_decompressor: Callable[[], Any]) -> None:
        self._file, self._new_decompressor = file, new_decompressor
        self._frame: Any = None
        self._compressed = self._decompressed = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._decompressed:
            self._compressed = self._compressed or self._file.read(_READ_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise FrameError("the last frame has no end")
                return 0
            if self._frame is None and self._new_decompressor is lzma.LZMADecompressor:
                # padding between the streams of an xz file
                self._compressed = self._compressed.lstrip(b"\0")
                if not self._compressed:
                    continue
            self._decompress()
        count = min(len(buffer), len(self._decompressed))
        buffer[:count] = self._decompressed[:count]
        self._decompressed = self._decompressed[count:]
        return count

    def _decompress(self) -> None:
        self._frame = self._frame or self._new_decompressor()
        try:
            self._decompressed = self._frame.decompress(self._compressed)
        except Exception as error:
            # zstandard, lzma and bz2 have an error class each
            raise FrameError(str(error) or "not enough memory for its window") from error
        self._compressed = b""
        if self._frame.eof:
            self._compressed, self._frame = self._frame.unused_data, None

    def close(self) -> None:
        super().close()
        self._file.close()
