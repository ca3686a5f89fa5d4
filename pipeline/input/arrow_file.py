"""Reads Parquet files, Arrow IPC files and Arrow IPC streams, with the types that they declare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any, BinaryIO

from gptbatch.pipeline.errors import (
    GptbatchError,
    InputNotFoundError,
    InputRowsError,
    OutOfMemoryError,
    StorageError,
)
from gptbatch.pipeline.input.file_kind import HEAD_BYTES, describe_binary
from gptbatch.pipeline.input.row_count import FileRows
from gptbatch.pipeline.input.source import START, Place, RawRow
from gptbatch.pipeline.input.strict_json import DECODER
from gptbatch.pipeline.storage.location import Location
from gptbatch.pipeline.system.error_text import first_line

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

BATCH_ROWS = 1024
_PARQUET, _ARROW_FILE, _GZIP = b"PAR1", b"ARROW1", b"\x1f\x8b"

Convert = Callable[[Any], Any]


class Float32(float):
    """A value of a float32 column. Every whole number below `exact_below` has an exact float32."""

    exact_below = 2**24


class Float16(float):
    """A value of a float16 column. Every whole number below `exact_below` has an exact float16."""

    exact_below = 2**11


class ArrowFile:
    """The rows of one file. The first bytes decide the format.

    The file is not memory-mapped: a file that is truncated while it is read raises an error, where
    a mapping would end the process.

    Args:
        path: The file.
        name: The file in messages.
    """

    def __init__(self, path: Location, name: str) -> None:
        self.path, self.name = path, name

    def rows(self, start: Place = START) -> Iterator[RawRow]:
        """Yield the rows from `start.row` on.

        Raises:
            InputRowsError: The file is damaged, or of a kind that pyarrow does not read.
            InputNotFoundError: Permission to read the file is missing.
            OutOfMemoryError: A batch does not fit into memory.
            StorageError: Reading failed.
        """
        with self._named_errors():
            yield from self._rows(start.row)

    def count(self) -> FileRows:
        """Count the rows, those of Parquet by its footer. Raises as `rows` does."""
        import pyarrow.parquet as pq

        with self._named_errors():
            # a small buffer: only the first and the last bytes are read
            with self.path.open("rb", 1 << 16) as file:
                if file.read(len(_PARQUET)) == _PARQUET:
                    file.seek(0)
                    return FileRows(pq.read_metadata(file).num_rows)
            return FileRows(sum(batch.num_rows for _, batch in self._batches(0)))

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Turn errors of pyarrow and of the file system into those that `rows` raises."""
        import pyarrow as pa

        try:
            yield
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
            # pyarrow raises many types for damage: ArrowInvalid, OSError without errno,
            # UnicodeDecodeError for a column name
            raise InputRowsError(
                f"{self.name}: the file is damaged, cut off, or of a kind that pyarrow does not "
                f"read ({first_line(error)})"
            ) from error

    def _rows(self, first: int) -> Iterator[RawRow]:
        for position, batch in self._batches(first):
            read = row_reader(batch, self.name)
            for offset in range(max(0, first - position), batch.num_rows):
                yield RawRow(
                    where=f"{self.name} row {position + offset}",
                    position=position + offset,
                    parse=partial(read, offset),
                )

    def _batches(self, first: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield batches and their first rows. Row groups of Parquet before `first` are skipped."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with pa.PythonFile(self.path.open("rb"), mode="r") as file:
            head = file.read(HEAD_BYTES)
            file.seek(0)
            if head.startswith(_GZIP):
                raise InputRowsError(
                    f"{self.name}: is compressed by gzip as a whole: decompress it first"
                )
            if head.startswith(_PARQUET):
                with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
                    yield from _parquet_batches(parquet, first)
                return
            is_file = head.startswith(_ARROW_FILE)
            if not is_file and (kind := describe_binary(head, self.name)) is not None:
                raise InputRowsError(f"{self.name}: is {kind}")
            position = 0
            for batch in _ipc_batches(file, is_file=is_file):
                if position + batch.num_rows > first:
                    # offsets that point outside of their buffers would end the process
                    batch.validate(full=True)
                    for begin in range(0, batch.num_rows, BATCH_ROWS):
                        yield position + begin, batch.slice(begin, BATCH_ROWS)
                position += batch.num_rows


def _parquet_batches(parquet: pq.ParquetFile, first: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    metadata = parquet.metadata
    position, group = 0, 0
    while group < metadata.num_row_groups:
        rows = metadata.row_group(group).num_rows
        if position + rows > first:
            break
        position, group = position + rows, group + 1
    groups = list(range(group, metadata.num_row_groups))
    if not groups and metadata.num_row_groups:
        return
    for batch in parquet.iter_batches(BATCH_ROWS, row_groups=groups or None):
        yield position, batch
        position += batch.num_rows


def _ipc_batches(file: BinaryIO, *, is_file: bool) -> Iterable[pa.RecordBatch]:
    import pyarrow as pa

    if not is_file:
        stream: Iterable[pa.RecordBatch] = pa.ipc.open_stream(file)
        return stream
    reader = pa.ipc.open_file(file)
    return (reader.get_batch(index) for index in range(reader.num_record_batches))


def row_reader(batch: pa.RecordBatch, name: str) -> Callable[[int], dict[str, Any]]:
    """Return a function that reads the row of an index, from a batch of the table `name`.

    Columns are converted at once. If a value is invalid, such as text that is not UTF-8, the rows
    are read one by one, so that only the row of that value fails.

    Raises:
        InputRowsError: Two columns have one name.
    """
    names = batch.schema.names
    if repeated := [column for column in names if names.count(column) > 1]:
        raise InputRowsError(f"{name}: two columns are called {repeated[0]!r}")
    columns = [
        (field.name, *_converted(field, batch.column(index)))
        for index, field in enumerate(batch.schema)
    ]

    @cache
    def all_values() -> dict[str, list[Any]] | None:
        try:
            return {
                name: [convert(value) for value in column.to_pylist()]
                for name, column, convert in columns
            }
        except Exception:  # noqa: BLE001 - the row that fails raises its own error
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
                    f"column {name!r} cannot be read ({type(error).__name__}: {first_line(error)})"
                ) from error
        return fields

    return read


def _converted(field: pa.Field, column: pa.Array) -> tuple[pa.Array, Convert]:
    """Return a column that Python has types for, and the conversion of each value.

    Dates and times become text, since Python has no type for nanoseconds. Columns of the extension
    type arrow.json are parsed.
    """
    import pyarrow as pa

    metadata = field.metadata or {}
    extension = getattr(field.type, "extension_name", None)
    if (extension or metadata.get(b"ARROW:extension:name", b"").decode()) == "arrow.json":
        return column, _parse_json
    if pa.types.is_float32(field.type) or pa.types.is_float16(field.type):
        narrow = Float32 if pa.types.is_float32(field.type) else Float16
        return column, lambda value: None if value is None else narrow(value)
    if (textual := _with_text_for_times(field.type)) != field.type:
        # pyarrow has no cast for some nested types
        with suppress(pa.ArrowException):
            return column.cast(textual), _unchanged
    return column, _unchanged


def _with_text_for_times(kind: pa.DataType) -> pa.DataType:
    """Return the type with text for dates and times, also inside of lists and structs."""
    import pyarrow as pa

    if pa.types.is_date(kind) or pa.types.is_time(kind) or pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        make = pa.list_ if pa.types.is_list(kind) else pa.large_list
        value = _with_text_for_times(kind.value_type)
        return kind if value == kind.value_type else make(value)
    if pa.types.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        types = [_with_text_for_times(field.type) for field in fields]
        if types != [field.type for field in fields]:
            return pa.struct([f.with_type(t) for f, t in zip(fields, types, strict=True)])
    return kind


def _parse_json(text: Any) -> Any:
    return None if text is None else DECODER.decode(text)


def _unchanged(value: Any) -> Any:
    return value
