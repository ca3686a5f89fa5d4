"""Detects files in an unexpected format and describes them, with advice in one line."""

from __future__ import annotations

import json

from gptbatch.pipeline.model.other_formats import LFS_HEADER
from gptbatch.pipeline.storage.location import Location

_MAGIC = (
    (b"PAR1", "a Parquet file: read it with --dataset {path}"),
    (b"ARROW1", "an Arrow file: read it with --dataset {path}"),
    (b"PK\x03\x04", "a ZIP archive (or an Excel workbook): unpack it, or save the sheet as CSV"),
    (b"\xff\xfe", "UTF-16 text: convert it with iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text: convert it with iconv -f UTF-16 -t UTF-8"),
    (b"GGUF", "a GGUF model, not prompts"),
    (b"SQLite format 3\x00", "an SQLite database: export the table as CSV or JSON lines"),
    (
        b"\x04\x22\x4d\x18",
        "compressed by lz4, which is not read: decompress it, or use gzip or zstd",
    ),
    (b"%PDF", "a PDF document"),
    (b"\x89PNG", "a picture"),
    (b"\x80\x02", "a Python pickle, which is never loaded: write its rows as JSON lines"),
    (b"\x80\x04", "a Python pickle, which is never loaded: write its rows as JSON lines"),
    (b"\x80\x05", "a Python pickle, which is never loaded: write its rows as JSON lines"),
    (b"Obj\x01", "an Avro file: convert it to Parquet"),
    (b"FEA1", "a Feather file of version 1: write it again with pyarrow.feather.write_feather"),
    (b"ORC", "an ORC file: convert it to Parquet"),
)
_LFS = "a Git LFS pointer, not the file itself: run git lfs pull"
MAX_SNIFFED_LINES = 20
HEAD_BYTES = 512
_MAX_PARSED_CHARACTERS = 65536


def describe_binary(head: bytes, path: str = "FILE") -> str | None:
    """Describe a file that is not UTF-8 text by its first bytes.

    Args:
        head: The first HEAD_BYTES bytes.
        path: The file in messages.

    Returns:
        The format and advice, None for a file that may be text.
    """
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind.format(path=path)
    if head.startswith(LFS_HEADER):
        return _LFS
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it"
    return None


def describe_text(lines: list[bytes], path: str) -> str | None:
    """Describe a text file whose first line is not a JSON object.

    Args:
        lines: The first lines of the file.
        path: The file in messages.

    Returns:
        The format and advice, None where a line is a JSON object or the format is not recognized.
    """
    texts = [line.decode("utf-8", errors="replace").strip() for line in lines[:MAX_SNIFFED_LINES]]
    texts = [text for text in texts if text]
    if not texts:
        return None
    first = texts[0]
    if (
        first == "["
        or first.startswith("[{")
        or (first.startswith("[") and not _parses(first, list) and len(texts) > 1)
    ):
        return (
            f"a JSON array, not JSON lines: read it with --dataset {path}{_renamed(path, '.json')}"
        )
    if any(_parses(text, dict) for text in texts):
        return None
    if (
        first.startswith("{")
        and len(texts) > 1
        and (first.endswith(("{", "[")) or (first.endswith(",") and "}" not in first))
    ):
        return f"JSON over several lines, not JSON lines: jq -c . {path} > rows.jsonl"
    if first.startswith("{") and "}\r{" in first:
        return f"JSON lines that end in CR alone: tr '\\r' '\\n' < {path} > rows.jsonl"
    if first.lower().startswith(("<!doctype", "<html", "<?xml")):
        return "HTML or XML: was an error message of a server saved as the file?"
    if not first[0].isalpha() and first[0] not in "\"'#":
        return None
    for delimiter, suffix, name in (
        (",", ".csv", "CSV"),
        ("\t", ".tsv", "TSV"),
        (";", ".csv", "CSV with semicolons"),
    ):
        if len(texts) > 1 and delimiter in first and all(delimiter in text for text in texts[:3]):
            extra = " --csv-delimiter ';'" if delimiter == ";" else ""
            return (
                f"{name}, not JSON lines: read it with --dataset {path}{extra}"
                f"{_renamed(path, suffix)}"
            )
    if _parses(first, object):
        return None
    return (
        f"plain text, not JSON lines: read a prompt per line with --dataset {path} "
        f"--prompt-field text{_renamed(path, '.txt')}"
    )


def _renamed(path: str, suffix: str) -> str:
    return "" if path.lower().endswith(suffix) else f" (under a name that ends in {suffix})"


def describe_object(text: str, path: str) -> str:
    """Describe a JSON file that holds one object where an array of rows is needed."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return f"JSON over several lines, not an array of rows: jq -c . {path} > rows.jsonl"
    if not isinstance(content, dict):
        return "no array of rows"
    rows = [
        key
        for key, value in content.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    ]
    if rows:
        counts = ", ".join(f"{key!r} ({len(content[key])} items)" for key in rows[:5])
        return (
            f"one JSON object, with arrays of rows under {counts}: "
            f"jq -c '.{rows[0]}[]' {path} > rows.jsonl"
        )
    if content and all(
        isinstance(value, (list, dict)) and not _has_rows(value) for value in content.values()
    ):
        return (
            f"one JSON object of columns, not rows: pandas.read_json('{path}')"
            ".to_json('rows.jsonl', orient='records', lines=True)"
        )
    if content and all(isinstance(value, dict) for value in content.values()):
        return (
            "a map of rows, not an array: "
            f"jq -c 'to_entries[] | {{id: .key}} + .value' {path} > rows.jsonl"
        )
    return "one JSON object, not an array of rows"


def _has_rows(value: list[object] | dict[str, object]) -> bool:
    return isinstance(value, dict) and not all(key.isdecimal() for key in value)


def read_head(path: Location) -> bytes:
    """Return the first bytes of a file, b"" where it cannot be read."""
    try:
        with path.open("rb", HEAD_BYTES) as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return b""


def _parses(text: str, kind: type) -> bool:
    try:
        return isinstance(json.loads(text[:_MAX_PARSED_CHARACTERS]), kind)
    except (ValueError, RecursionError):
        return False
