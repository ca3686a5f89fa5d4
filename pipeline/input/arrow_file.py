"""Parquet files, Arrow files and Arrow streams as rows, with the types that they declare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptbatch.pipeline.errors import (
    GptbatchError,
    InputNotFoundError,
    InputRowsError,
    OutOfMemoryError,
    StorageError,
)
from gptbatch.pipeline.input.file_kind import describe_binary
from gptbatch.pipeline.input.jsonl import DECODER
from gptbatch.pipeline.input.source import RawRow

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 1024
HEAD_BYTES = 512


class Float32(float):
    """A value of a column of single precision."""

    exact_below = 2**24  # whole numbers up to this one are all floats


class Float16(float):
    """A value of a column of half precision."""

    exact_below = 2**11


class ArrowFile:
    """The rows of one file. Nothing is memory-mapped: a file that is cut off while it is read is an error, not a crash.

    Args:
        path: a Parquet file, an Arrow IPC file or an Arrow IPC stream, told apart by their first bytes.
        name: the file as messages name it.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name

    def rows(self) -> Iterator[RawRow]:
        """Raises InputRowsError for content that is damaged, InputNotFoundError and StorageError for a file that cannot be read."""
        import pyarrow as pa

        position = 0
        try:
            for batch in self._batches():
                names = batch.schema.names
                if repeated := [name for name in names if names.count(name) > 1]:
                    raise InputRowsError(f"{self.name}: two columns are called {repeated[0]!r}")
                read = _reader(batch)
                for offset in range(batch.num_rows):
                    yield RawRow(
                        where=f"{self.name} row {position}",
                        line=position,
                        position=position,
                        parse=partial(read, offset),
                    )
                    position += 1
        except PermissionError as error:
            raise InputNotFoundError(f"{self.name}: may not be read ({error.strerror})") from error
        except (pa.ArrowMemoryError, MemoryError) as error:
            raise OutOfMemoryError(
                f"{self.name}: not enough memory to read it ({error})"
            ) from error
        except GptbatchError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise StorageError(
                    f"{self.name}: reading failed ({error.strerror or error})"
                ) from error
            # pyarrow has many errors for damage: ArrowInvalid, OSError without a number, UnicodeDecodeError of a name
            what = "is damaged, cut off, or of a kind that pyarrow does not read"
            raise InputRowsError(f"{self.name}: the file {what} ({_first_line(error)})") from error

    def _batches(self) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with pa.PythonFile(self.path.open("rb"), mode="r") as file:
            head = file.read(HEAD_BYTES)
            magic = head[:6]
            file.seek(0)
            if magic.startswith(b"\x1f\x8b"):
                raise InputRowsError(
                    f"{self.name}: is compressed by gzip as a whole: decompress it first"
                )
            if (
                not magic.startswith((b"PAR1", b"ARROW1"))
                and (kind := describe_binary(head, self.name)) is not None
            ):
                raise InputRowsError(f"{self.name}: is {kind}")
            if magic.startswith(b"PAR1"):
                with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
                    yield from parquet.iter_batches(BATCH_ROWS)
                return
            reader = pa.ipc.open_file(file) if magic == b"ARROW1" else pa.ipc.open_stream(file)
            batches = (
                (reader.get_batch(i) for i in range(reader.num_record_batches))
                if magic == b"ARROW1"
                else reader
            )
            for batch in batches:
                batch.validate(
                    full=True
                )  # offsets that point outside of their buffers would end the process
                yield from (
                    batch.slice(first, BATCH_ROWS) for first in range(0, batch.num_rows, BATCH_ROWS)
                )


def _reader(batch: pa.RecordBatch) -> Callable[[int], dict[str, Any]]:
    """Reads rows of a batch; a value that cannot be read, such as text that is not UTF-8, fails in its own row only."""
    columns = [
        (field.name, *_readable(field, batch.column(index)))
        for index, field in enumerate(batch.schema)
    ]

    @cache
    def all_values() -> dict[str, list[Any]] | None:
        try:
            return {
                name: [convert(value) for value in column.to_pylist()]
                for name, column, convert in columns
            }
        except Exception:  # noqa: BLE001  (each row is read by itself, and says its own reason)
            return None

    def read(offset: int) -> dict[str, Any]:
        if (values := all_values()) is not None:
            return {name: column[offset] for name, column in values.items()}
        fields = {}
        for name, column, convert in columns:
            try:
                fields[name] = convert(column[offset].as_py())
            except Exception as error:
                raise ValueError(
                    f"column {name!r} cannot be read ({type(error).__name__}: {_first_line(error)})"
                ) from error
        return fields

    return read


def _readable(field: pa.Field, column: pa.Array) -> tuple[pa.Array, Callable[[Any], Any]]:
    """A column whose values Python has types for, and what is done to each value.

    Dates and times are text, since Python has no type for nanoseconds. Text of JSON is the value that it stands for.
    """
    import pyarrow as pa

    extension = (
        getattr(field.type, "extension_name", None)
        or (field.metadata or {}).get(b"ARROW:extension:name", b"").decode()
    )
    if extension == "arrow.json":
        return column, _json_value
    if pa.types.is_float32(field.type) or pa.types.is_float16(field.type):
        narrow = Float32 if pa.types.is_float32(field.type) else Float16
        return column, lambda value: None if value is None else narrow(value)
    if (textual := _textual(field.type)) != field.type:
        with suppress(pa.ArrowException):  # some nested types have no cast
            return column.cast(textual), _unchanged
    return column, _unchanged


def _textual(kind: pa.DataType) -> pa.DataType:
    """The type with text in place of dates and times, inside of lists and structs as well."""
    import pyarrow as pa

    if pa.types.is_date(kind) or pa.types.is_time(kind) or pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        make = pa.list_ if pa.types.is_list(kind) else pa.large_list
        return (
            make(_textual(kind.value_type))
            if _textual(kind.value_type) != kind.value_type
            else kind
        )
    if pa.types.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        if any(_textual(field.type) != field.type for field in fields):
            return pa.struct([field.with_type(_textual(field.type)) for field in fields])
    return kind


def _json_value(text: Any) -> Any:
    return None if text is None else DECODER.decode(text)


def _unchanged(value: Any) -> Any:
    return value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
