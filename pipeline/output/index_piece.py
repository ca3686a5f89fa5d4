"""Pieces of the index of an input: the results of the shards of `gptbatch plan --index`.

A piece, `input_index.3-of-16.parquet`, has a row per part of its shard: digest, place, and hashes
of the ids. The shard that finds the pieces of all shards joins them to the index (index_file.py),
and deletes them. A piece of another input counts as missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gptbatch.pipeline.errors import StorageError
from gptbatch.pipeline.input.part_check import CheckedParts
from gptbatch.pipeline.input.source import Place
from gptbatch.pipeline.output.json_models import PieceContent, validated
from gptbatch.pipeline.output.part_file import is_damage, open_parquet, read_error
from gptbatch.pipeline.output.part_plan import count_parts
from gptbatch.pipeline.output.shards import Shard
from gptbatch.pipeline.storage.location import Location
from gptbatch.pipeline.storage.regular_file import named_in_errors, open_regular, parse_json

PIECE_NAME = re.compile(r"input_index\.\d{1,9}-of-\d{1,9}\.parquet")
_KEY = b"gptbatch"
_ID_COLUMNS = ("id_hashes", "default_ids")
_SCHEMA = pa.schema(
    [
        pa.field("digest", pa.string(), nullable=False),
        pa.field("file", pa.int32(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        # as IdHashes.take returns them
        *(pa.field(name, pa.large_list(pa.uint64()), nullable=False) for name in _ID_COLUMNS),
    ]
)
# bounds the memory for reading a piece
_IDS_PER_ROW_GROUP = 1 << 22


def piece_path(work: Location, shard: Shard) -> Location:
    """Return the path of the piece of a shard.

    Args:
        work: The folder `.gptbatch` of the output.
        shard: The shard.
    """
    return work / f"input_index.{shard.index}-of-{shard.count}.parquet"


def write_piece(file: BinaryIO, content: PieceContent, parts: CheckedParts) -> None:
    """Write a piece, a row group at a time: a table of all ids would double the memory."""
    schema = _SCHEMA.with_metadata({_KEY: content.model_dump_json()})
    group = max(1, _IDS_PER_ROW_GROUP // content.part_rows)
    with pq.ParquetWriter(
        file,
        schema,
        # Hashes do not become smaller.
        use_dictionary=False,
        compression="none",
        write_page_checksum=True,
    ) as writer:
        for first in range(0, len(parts.digests), group):
            writer.write_table(_table_of(parts, slice(first, first + group), schema))


def _table_of(parts: CheckedParts, some: slice, schema: pa.Schema) -> pa.Table:
    places = parts.places[some]
    columns: dict[str, Any] = {
        "digest": parts.digests[some],
        "file": [place.file for place in places],
        "row": [place.row for place in places],
        "offset": [place.offset for place in places],
    }
    for index, name in enumerate(_ID_COLUMNS):
        ids = [part[index] for part in parts.ids[some]]
        ends = np.cumsum([0, *(len(part) // 8 for part in ids)], dtype=np.int64)
        values = np.frombuffer(b"".join(ids), dtype=np.uint64)
        columns[name] = pa.LargeListArray.from_arrays(ends, values)
    return pa.table(columns, schema=schema)


def read_piece_content(path: Location, shard: Shard, input_key: str) -> PieceContent | None:
    """Read the metadata of the piece of a shard.

    Returns:
        None where it is missing, damaged, or of another input.

    Raises:
        StorageError: The file cannot be read.
    """
    try:
        with named_in_errors(path), open_regular(path) as file:
            metadata = pq.read_metadata(file)
        content = validated(PieceContent, parse_json((metadata.metadata or {})[_KEY]))
    except FileNotFoundError:
        return None
    except Exception as error:
        if is_damage(error):
            return None
        raise read_error(path, error) from error
    parts = shard.parts(count_parts(content.part_rows, content.rows))
    is_whole = metadata.num_rows == len(parts)
    return content if is_whole and content.input_key == input_key else None


def read_pieces(work: Location, count: int, input_key: str) -> list[PieceContent] | None:
    """Read the metadata of the pieces of all shards; None where one is missing.

    Args:
        work: The folder `.gptbatch` of the output.
        count: Number of shards.
        input_key: Hash of the input.
    """
    contents = []
    for index in range(count):
        shard = Shard(index, count)
        content = read_piece_content(piece_path(work, shard), shard, input_key)
        if content is None:
            return None
        contents.append(content)
    return contents


def read_parts(work: Location, contents: list[PieceContent]) -> Iterator[CheckedParts]:
    """Yield the parts of all pieces, in order.

    Args:
        work: The folder `.gptbatch` of the output.
        contents: The metadata of the pieces.

    Raises:
        FileNotFoundError: A piece is gone.
        StorageError: A piece cannot be read. A damaged one is deleted.
    """
    number = 0
    for index, content in enumerate(contents):
        path = piece_path(work, Shard(index, len(contents)))
        # of the whole piece, and given to its first parts
        bad_rows, found_ids = content.bad_rows, frozenset(content.found_ids)
        try:
            with open_parquet(path, whole=False) as parquet:
                for group in range(parquet.num_row_groups):
                    table = parquet.read_row_group(group, use_threads=False)
                    yield _parts_of(table, number, content, bad_rows, found_ids)
                    number += table.num_rows
                    bad_rows, found_ids = 0, frozenset()
        except FileNotFoundError:
            raise
        except Exception as error:
            if not is_damage(error):
                raise read_error(path, error) from error
            path.unlink(missing_ok=True)
            raise StorageError(
                f"{path}: is damaged, and was deleted ({error}); run this shard again"
            ) from error


def delete_pieces(work: Location) -> None:
    """Delete the pieces of all shards, also those of other counts and inputs."""
    entries: list[Location] = [*work.iterdir()]
    for entry in entries:
        if PIECE_NAME.fullmatch(entry.name):
            with suppress(OSError):
                entry.unlink()


def _parts_of(
    table: pa.Table,
    first: int,
    content: PieceContent,
    bad_rows: int,
    found_ids: frozenset[str],
) -> CheckedParts:
    columns = {name: table[name].to_pylist() for name in ("digest", "file", "row", "offset")}
    places = zip(columns["file"], columns["row"], columns["offset"], strict=True)
    ids = [[_bytes(part) for part in table[name]] for name in _ID_COLUMNS]
    return CheckedParts(
        digests=columns["digest"],
        places=[
            Place((first + number) * content.part_rows, *place)
            for number, place in enumerate(places)
        ],
        ids=list(zip(*ids, strict=True)),
        bad_rows=bad_rows,
        max_n=content.max_n,
        found_ids=found_ids,
    )


def _bytes(values: pa.LargeListScalar) -> bytes:
    content: bytes = values.values.to_numpy().tobytes()
    return content
