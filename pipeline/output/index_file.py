"""The index of a checked input, `input_index.parquet`: the digest and the place of each part.

A run that finds the index of its input does not read and check all rows again. It begins to read at
the place of its first part. The content of each part is compared with its digest when it is read.
"""

from __future__ import annotations

import json
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from gptbatch.pipeline.input.input_digest import input_digest
from gptbatch.pipeline.input.prompt_reader import InputSummary
from gptbatch.pipeline.input.source import Place
from gptbatch.pipeline.output.json_models import IndexContent, validated
from gptbatch.pipeline.output.part_file import is_damage, open_parquet
from gptbatch.pipeline.output.part_plan import count_parts
from gptbatch.pipeline.storage.location import Location
from gptbatch.pipeline.storage.regular_file import parse_json

INDEX = "input_index.parquet"
_KEY = b"gptbatch"
_SCHEMA = pa.schema(
    [
        pa.field("digest", pa.string(), nullable=False),
        pa.field("file", pa.int32(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
    ]
)


def write_index(file: BinaryIO, summary: InputSummary) -> None:
    """Write the index of a checked input."""
    content = {
        "rows": summary.rows,
        "part_rows": summary.part_rows,
        "digest": summary.digest,
        "bad_rows": summary.bad_rows,
        "max_n": summary.max_n,
        "duplicates": {str(index): row for index, row in summary.duplicates.items()},
    }
    # An input without rows has one part, which begins nowhere.
    places = summary.places or [Place(position=0, file=0, row=0, offset=-1)]
    table = pa.table(
        {
            "digest": summary.part_digests,
            "file": [place.file for place in places],
            "row": [place.row for place in places],
            "offset": [place.offset for place in places],
        },
        schema=_SCHEMA.with_metadata({_KEY: json.dumps(content)}),
    )
    pq.write_table(table, file, compression="zstd")


def read_index(path: Location) -> InputSummary | None:
    """Read an index; None where it is missing, damaged, or not consistent.

    Raises:
        OSError: The file cannot be read.
    """
    try:
        with open_parquet(path) as parquet:
            table = parquet.read(use_threads=False)
        content = validated(IndexContent, parse_json((table.schema.metadata or {})[_KEY]))
        if not table.schema.equals(_SCHEMA):
            return None
        columns = table.to_pydict()
    except FileNotFoundError:
        return None
    except Exception as error:
        if is_damage(error):
            return None
        raise
    digests = columns["digest"]
    n_parts = count_parts(content.part_rows, content.rows)
    if len(digests) != n_parts or input_digest(digests) != content.digest:
        return None
    places = [
        Place(number * content.part_rows, *place)
        for number, place in enumerate(
            zip(columns["file"], columns["row"], columns["offset"], strict=True)
        )
    ]
    return InputSummary(
        rows=content.rows,
        digest=content.digest,
        part_rows=content.part_rows,
        part_digests=digests,
        places=places,
        prefix_digests={content.rows: content.digest},
        bad_rows=content.bad_rows,
        max_n=content.max_n,
        duplicates={int(index): row for index, row in content.duplicates.items()},
    )
