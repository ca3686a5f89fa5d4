"""Counting rows without parsing them, and reading from the places that the count gives."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from gptbatch.pipeline.errors import InputRowsError
from gptbatch.pipeline.input import lines, row_count
from gptbatch.pipeline.input.input_files import InputFiles

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
LINES = st.sampled_from([b"{}\n", b'{"prompt": "x"}\r\n', b"\n", b" \t\r\n", b"{}" + 90 * b" "])
TEXTS = st.builds(
    lambda bom, lines, last: b"\xef\xbb\xbf" * bom + b"".join(lines) + last,
    st.booleans(),
    st.lists(LINES, max_size=30),
    st.sampled_from([b"", b"{}", b" ", b"\n\n"]),
)


@settings(max_examples=150, deadline=None)
@given(
    text=TEXTS,
    suffix=st.sampled_from(sorted(COMPRESSORS)),
    chunk=st.sampled_from([3, 5, 64, 1 << 20]),
    max_line=st.sampled_from([60, 1 << 24]),
)
def test_lines_are_counted_as_they_are_read(
    text: bytes, suffix: str, chunk: int, max_line: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("count") / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESSORS[suffix](text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_count, "CHUNK_BYTES", chunk)
        patch.setattr(row_count, "MAX_LINE_BYTES", max_line)
        patch.setattr(lines, "MAX_LINE_BYTES", max_line)
        source = InputFiles([str(path)])
        rows = list(source.rows())
        count = source.count()
        assert count.rows == len(rows)
        for position, row in enumerate(rows):
            begin = count.mark_before(position)
            read = next(islice(source.rows(begin), position - begin.position, None))
            assert (read.label, read.offset) == (row.label, row.offset)


def write_mixed(folder: Path) -> Path:
    """Write files of 5, 0, 40, 7 and 12 rows."""
    folder.mkdir()
    (folder / "0.jsonl").write_text('{"prompt": "x"}\n' * 5 + "\n \n")
    (folder / "1.jsonl").write_text("\n\n")
    table = pa.table({"prompt": [str(number) for number in range(40)]})
    pq.write_table(table, folder / "2.parquet", row_group_size=9)
    (folder / "3.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "z"}\n' * 7))
    with pa.ipc.new_file(str(folder / "4.parquet"), table.schema) as writer:
        writer.write_table(table.slice(0, 12), max_chunksize=5)
    return folder


def test_rows_of_many_files_are_counted(tmp_path: Path) -> None:
    source = InputFiles([str(write_mixed(tmp_path / "in"))])
    rows = list(source.rows())
    count = source.count()
    assert count.rows == len(rows) == 64
    for position, row in enumerate(rows):
        begin, place = count.mark_before(position), count.place_of(position)
        read = next(islice(source.rows(begin), position - begin.position, None))
        assert (read.where, read.position) == (row.where, row.position)
        assert place.file == row.file
    assert source.count(limit=0).rows == 0
    assert source.count(limit=6).rows == 6
    assert source.count(limit=1000).rows == 64


def test_files_behind_the_limit_are_not_opened(tmp_path: Path) -> None:
    folder = write_mixed(tmp_path / "in")
    (folder / "3.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 7)[:-9])
    source = InputFiles([str(folder)])
    assert source.count(limit=45).rows == 45
    with pytest.raises(InputRowsError, match=r"3\.jsonl\.gz: the compressed file is damaged"):
        source.count(limit=46)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"id,prompt\n1,x\n2,y\n", "a.jsonl: is CSV, not JSON lines"),
        ("a.parquet", b"PAR1" + 50 * b"x", "a.parquet: the file is damaged"),
    ],
)
def test_files_of_other_kinds_are_not_counted(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputRowsError, match=message):
        InputFiles([str(tmp_path / name)]).count()
