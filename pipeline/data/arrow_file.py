"""Parquet files, Arrow files and Arrow streams as rows, with the types that they declare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.rows import RawRow
from pipeline.errors import GptbatchError, InputNotFoundError, InputRowsError, OutOfMemoryError, StorageError

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 1024


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

        place = 0
        try:
            for batch in self._batches():
                names = batch.schema.names
                if repeated := [name for name in names if names.count(name) > 1]:
                    raise InputRowsError(f"{self.name}: two columns are called {repeated[0]!r}")
                read = _reader(batch)
                for offset in range(batch.num_rows):
                    yield RawRow(where=f"{self.name} row {place}", line=place, place=place, fields=partial(read, offset))
                    place += 1
        except PermissionError as error:
            raise InputNotFoundError(f"{self.name}: may not be read ({error.strerror})") from error
        except (pa.ArrowMemoryError, MemoryError) as error:
            raise OutOfMemoryError(f"{self.name}: not enough memory to read it ({error})") from error
        except GptbatchError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise StorageError(f"{self.name}: reading failed ({error.strerror or error})") from error
            # pyarrow has many errors for damage: ArrowInvalid, OSError without a number, UnicodeDecodeError of a name
            raise InputRowsError(f"{self.name}: the file is damaged or cut off ({_first_line(error)})") from error

    def _batches(self) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with pa.PythonFile(self.path.open("rb"), mode="r") as file:
            magic = file.read(6)
            file.seek(0)
            if magic.startswith(b"PAR1"):
                with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
                    yield from parquet.iter_batches(BATCH_ROWS)
                return
            reader = pa.ipc.open_file(file) if magic == b"ARROW1" else pa.ipc.open_stream(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if magic == b"ARROW1" else reader
            for batch in batches:
                batch.validate(full=True)  # offsets that point outside of their buffers would end the process
                yield from (batch.slice(first, BATCH_ROWS) for first in range(0, batch.num_rows, BATCH_ROWS))


def _reader(batch: pa.RecordBatch) -> Callable[[int], dict[str, Any]]:
    """Reads rows of a batch; a value that cannot be read, such as text that is not UTF-8, fails in its own row only."""
    columns = [(name, _readable(batch.column(place))) for place, name in enumerate(batch.schema.names)]
    try:
        values = {name: column.to_pylist() for name, column in columns}
    except Exception:  # noqa: BLE001  (each row is read by itself, and says its own reason)
        values = None

    def read(offset: int) -> dict[str, Any]:
        if values is not None:
            return {name: column[offset] for name, column in values.items()}
        fields = {}
        for name, column in columns:
            try:
                fields[name] = column[offset].as_py()
            except Exception as error:
                raise ValueError(f"column {name!r} cannot be read ({type(error).__name__}: {_first_line(error)})") from error
        return fields

    return read


def _readable(column: pa.Array) -> pa.Array:
    """Dates and times as text, since Python has no type for nanoseconds; all else as it is."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_temporal(kind) and not pa.types.is_duration(kind) and not pa.types.is_interval(kind):
        return pc.cast(column, pa.string())
    return column


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
