"""Input files as programs write them: values are kept, and unreadable content is named."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import json
import logging
import lzma
import re
import shlex
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from gptbatch.jobs.cli import run_command
from gptbatch.pipeline.errors import InputNotFoundError, InputRowsError
from gptbatch.pipeline.input.dataset import DatasetSplit
from gptbatch.pipeline.input.dataset_files import find_files
from gptbatch.pipeline.input.hub_dataset import LibrarySplits
from gptbatch.pipeline.input.jsonl import JsonlFile
from gptbatch.pipeline.input.prompt_reader import PromptReader
from gptbatch.pipeline.input.rows import RowDefaults
from gptbatch.pipeline.input.source import RawRow
from gptbatch.pipeline.input.split import parse_split
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.params.settings import MAX_SEED, SAMPLING_SETTINGS
from gptbatch.pipeline.types import Prompt
from tests.paths import REPOSITORY

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def reader(path: Path, **settings: Any) -> PromptReader:
    """Return the reader of a dataset, or with input=True of a JSONL file."""
    source_settings = {key: settings.pop(key, None) for key in ("delimiter", "config")}
    split, is_input = settings.pop("split", "train"), settings.pop("input", False)
    source = (
        JsonlFile(path)
        if is_input
        else DatasetSplit(dataset=str(path), split=split, revision=None, **source_settings)
    )
    sampling = SamplingParams(seed=0, temperature=1.0, top_k=0, max_new_tokens=4)
    fields = {"prompt_field": "prompt", "sampling": sampling}
    return PromptReader(source=source, defaults=RowDefaults(**{**fields, **settings}))


def read(path: Path, **settings: Any) -> list[Prompt]:
    rows = reader(path, **settings)
    return [row for row in rows.prompts(rows.check()) if isinstance(row, Prompt)]


def problem(path: Path, **settings: Any) -> str:
    with pytest.raises((InputRowsError, InputNotFoundError)) as caught:
        read(path, **settings)
    return str(caught.value)


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8"
    )
    return path


def metadata(prompt: Prompt) -> Any:
    return json.loads(prompt.metadata or "null")


# -- CSV --


@pytest.mark.parametrize(
    "cell",
    [
        "None",
        "NA",
        "null",
        "nan",
        "",
        "1984",
        "1.0",
        "007",
        "true",
        "2024-01-02",
        " padded ",
        "#N/A",
        "-",
        "a'b",
        "5\\n",
    ],
)
def test_csv_cells_are_text(tmp_path: Path, cell: str) -> None:
    (tmp_path / "rows.csv").write_text(f'id,prompt,note\n"x{cell}","{cell}","{cell}"\n')
    (prompt,) = read(tmp_path / "rows.csv")
    assert (prompt.prompt_id, prompt.text, metadata(prompt)) == (f"x{cell}", cell, {"note": cell})


@pytest.mark.parametrize(
    ("text", "cells"),
    [
        ('a,"b, ""c""",,""\n', ["a", 'b, "c"', None, ""]),
        ('"two\nlines","",x,y', ["two\nlines", "", "x", "y"]),
        ('"cr\r\nlf",b,c,d\n', ["cr\r\nlf", "b", "c", "d"]),
        ('5" pipe,6",c,"d"\n', ['5" pipe', '6"', "c", "d"]),
        ('"","""","""""",\n', ["", '"', '""', None]),
        ("\u2028,\x0b,\x85,\u00a0\n", ["\u2028", "\x0b", "\x85", "\u00a0"]),
    ],
)
def test_csv_cells(tmp_path: Path, text: str, cells: list[str | None]) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(f'prompt,p,q,r,s\n"x",{text}'.encode())
    (prompt,) = read(path)
    assert list(metadata(prompt).values()) == cells


def test_tsv_cells_are_separated_by_tabs(tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text('prompt\tnote\na, b\t"c\td"\n')
    (prompt,) = read(tmp_path / "rows.tsv")
    assert (prompt.text, metadata(prompt)) == ("a, b", {"note": "c\td"})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prompt,seed\na,1,2\n", ":2: 3 cells, but the header names 2 columns"),
        ("prompt,seed\na\n", ":2: 1 cells, but the header names 2 columns"),
        ('prompt,seed\n"a"b,1\n', ":2: text or a space follows the closing quote of cell 1"),
        (
            'prompt,seed\nx,1\n"a,1\nb,2\n',
            ":3: a quoted cell is opened and not closed, so that the rows after it",
        ),
        ("prompt,seed\n\na,1\n", ":2: the line is empty"),
        (
            "prompt,seed\n,1\n",
            ':2: prompt must be a string, not null; "" is an empty text and an empty cell is null',
        ),
        ("prompt,seed\na,x\n", ":2: seed must be a whole number, not the string 'x'"),
        ("prompt,seed\na,-1\n", ":2: seed must be 0 to"),
        ("prompt,seed\na,1.5\n", ":2: seed must be a whole number, not the string '1.5'"),
        (
            "prompt,seed\na,1.0386425806429194e+18\n",
            ":2: seed is the float 1.0386425806429194e+18, which may have lost digits",
        ),
        ("prompt,seed\na,9007199254740992.0\n", "which may have lost digits"),
        ("prompt,seed\na,1\n,\n", ":3: all cells are empty; delete the line"),
        ('prompt,temperature\na,"0,7"\n', "not the string '0,7'; write a decimal point"),
        ("Prompt,seed\na,1\n", "(--prompt-field 'Prompt')"),
        ("prompt,temperature\na,hot\n", ":2: temperature must be a number, not the string 'hot'"),
        ("prompt,prompt\na,b\n", ":1: two columns are called 'prompt'"),
        ("id;prompt\n1;KING:\n", "is the delimiter ';'? --csv-delimiter names it"),
        ("id|prompt\n1|KING:\n", "is the delimiter '|'? --csv-delimiter names it"),
        ("prompt\na\r\n", "the line ends in another way than the header"),
        ("prompt\ra\rb\r", "lines end in CR alone"),
    ],
)
def test_malformed_csv_is_rejected(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "rows.csv").write_bytes(text.encode())
    assert reason in problem(tmp_path / "rows.csv")


def test_csv_encodings(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("prompt\nCafé au lait\n".encode("cp1252"))
    assert "rows.csv:2: not UTF-8 at byte 4 of the line; if Windows or Excel" in problem(path)
    path.write_bytes("prompt\nCafé\n".encode("utf-16"))
    assert "is UTF-16 text" in problem(path)
    path.write_bytes("prompt\nCafé\n".encode("utf-8-sig"))
    assert read(path)[0].text == "Café"
    path.with_suffix(".csv.gz").write_bytes(gzip.compress("prompt\nCafé\n".encode()))
    assert read(path.with_suffix(".csv.gz"))[0].text == "Café"


def test_a_malformed_csv_line_is_one_bad_row(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('prompt,seed\na,1\n"b"x,2\nc,3,4\nd,5\n')
    rows = list(reader(tmp_path / "rows.csv").rows())
    assert [raw.label for raw, _ in rows] == ["row 0", "row 1", "row 2", "row 3"]
    assert [type(row).__name__ for _, row in rows] == ["Prompt", "BadRow", "BadRow", "Prompt"]


# -- numbers --

BIG = [1038100642990219405, 541768576607746334, 2**53 + 1, MAX_SEED]


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "jsonl", "json"])
def test_integers_beside_nulls_keep_their_digits(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    rows = [{"id": seed, "prompt": "a", "seed": seed, "note": seed} for seed in BIG] + [
        {"id": None, "prompt": "a", "seed": None, "note": None}
    ]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind in ("csv", "tsv"):
        delimiter = "," if kind == "csv" else "\t"
        cells = [["" if value is None else str(value) for value in row.values()] for row in rows]
        path.write_text("\n".join(map(delimiter.join, [list(rows[0]), *cells])))
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    prompts = read(path)
    assert [prompt.prompt_id for prompt in prompts] == [*map(str, BIG), "4"]
    assert [prompt.params.seed for prompt in prompts[:4]] == BIG
    assert [int(metadata(prompt)["note"]) for prompt in prompts[:4]] == BIG


@pytest.mark.parametrize(
    ("type_", "largest"),
    [(pa.float16(), 2**11 - 1), (pa.float32(), 2**24 - 1), (pa.float64(), 2**53 - 1)],
)
def test_exact_whole_floats_are_integers(tmp_path: Path, type_: pa.DataType, largest: int) -> None:
    for value, is_exact in ((largest, True), (largest + 1, False)):
        columns = {
            "prompt": ["a", "b"],
            "id": pa.array([float(value), None], pa.float64()).cast(type_),
        }
        pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
        if is_exact:
            assert read(tmp_path / "rows.parquet")[0].prompt_id == str(value)
        else:
            assert "which may have lost digits" in problem(tmp_path / "rows.parquet")


@pytest.mark.parametrize("field", ["id", "seed", "top_k"])
@pytest.mark.parametrize("value", [float(2**53), 1e18, 1.5, float("inf")])
def test_inexact_whole_floats_are_rejected(tmp_path: Path, field: str, value: float) -> None:
    pq.write_table(pa.table({"prompt": ["a"], field: [value]}), tmp_path / "rows.parquet")
    assert f"row 0: {field} " in problem(tmp_path / "rows.parquet")
    pq.write_table(
        pa.table({"prompt": ["a", "b"], field: [float(2**31 - 1), None]}), tmp_path / "rows.parquet"
    )
    assert len(read(tmp_path / "rows.parquet")) == 2


# -- files of a folder --


@pytest.mark.parametrize(
    ("names", "splits", "left_out"),
    [
        (["a.jsonl", "b.jsonl"], {"train": ["a.jsonl", "b.jsonl"]}, []),
        (["a.jsonl", "c.csv"], {"train": ["a.jsonl", "c.csv"]}, []),
        (
            ["train_part.jsonl", "more_part.jsonl"],
            {"train": ["train_part.jsonl"]},
            ["more_part.jsonl"],
        ),
        (
            ["prompts.jsonl", "stress test.jsonl"],
            {"test": ["stress test.jsonl"]},
            ["prompts.jsonl"],
        ),
        (
            ["train.csv", "dev.csv", "my-eval.csv"],
            {"train": ["train.csv"], "validation": ["dev.csv"], "test": ["my-eval.csv"]},
            [],
        ),
        (["trainer.csv", "latest.csv"], {"train": ["latest.csv", "trainer.csv"]}, []),
        (
            ["train/a.csv", "train/b.csv", "test/a.csv", "c"],
            {"train": ["train/a.csv", "train/b.csv"], "test": ["test/a.csv"]},
            ["c"],
        ),
        (
            [
                "data/train-00000-of-00002.parquet",
                "data/train-00001-of-00002.parquet",
                "data/odd-00000-of-00001.parquet",
                "train.csv",
            ],
            {
                "train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
                "odd": ["data/odd-00000-of-00001.parquet"],
            },
            ["train.csv"],
        ),
        (
            ["a.JSONL.GZ", "b.Parquet", "c.csv.zst"],
            {"train": ["a.JSONL.GZ", "b.Parquet", "c.csv.zst"]},
            [],
        ),
        (
            ["a.jsonl", "notes.txt", "picture.png", "b.xlsx"],
            {"train": ["a.jsonl"]},
            ["b.xlsx", "notes.txt", "picture.png"],
        ),
        (
            ["_temporary/0/a.json", "part-0.json"],
            {"train": ["part-0.json"]},
            ["_temporary/0/a.json"],
        ),
        (["a.txt", "b.txt"], {"train": ["a.txt", "b.txt"]}, []),
        (
            ["a.jsonl", "README.md", "LICENSE", ".cache/x.jsonl", "_SUCCESS", "_manifest.json"],
            {"train": ["a.jsonl"]},
            [],
        ),
        (
            ["prompts [v2].jsonl", "a#b/x?.jsonl", "100%/*.jsonl"],
            {"train": ["100%/*.jsonl", "a#b/x?.jsonl", "prompts [v2].jsonl"]},
            [],
        ),
    ],
)
def test_files_are_assigned_to_splits(
    tmp_path: Path, names: list[str], splits: dict[str, list[str]], left_out: list[str]
) -> None:
    for name in names:
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).touch()
    found = find_files(tmp_path / "d", None)
    assert (found.splits, found.left_out) == (splits, left_out)


def test_files_in_no_split_are_named_in_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train_part", "more_part", "other_part"):
        write_lines(tmp_path / "mixed" / f"{name}.jsonl", [{"prompt": name}])
    with caplog.at_level(logging.WARNING, "gptbatch"):
        assert [prompt.text for prompt in read(tmp_path / "mixed")] == ["train_part"]
    (message,) = caplog.messages
    assert "files that no split takes are not read: more_part.jsonl, other_part.jsonl" in message
    assert "there is no split 'test'; there are train (train_part.jsonl)" in problem(
        tmp_path / "mixed", split="test"
    )


PLAIN = b'{"prompt": "plain"}\n'


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (lzma.compress(PLAIN) + bytes(4) + lzma.compress(PLAIN) + bytes(8), 2),
        (lzma.compress(PLAIN) + PLAIN, None),
        (lzma.compress(PLAIN) + gzip.compress(PLAIN, mtime=0), None),
        (bz2.compress(PLAIN) + b"X" + bz2.compress(PLAIN)[1:], None),
        (bz2.compress(PLAIN) + PLAIN, None),
        (bz2.compress(PLAIN) + bz2.compress(PLAIN)[:-4], None),
        (gzip.compress(PLAIN, mtime=0) + PLAIN, None),
    ],
)
def test_data_after_a_compressed_stream_is_an_error(
    tmp_path: Path, content: bytes, rows: int | None
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    if rows is None:
        assert "the compressed file is damaged or cut off" in problem(
            tmp_path / "rows.jsonl", input=True
        )
    else:
        assert len(read(tmp_path / "rows.jsonl", input=True)) == rows


def test_headers_of_excel_and_pandas(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("sep=;\nid;prompt\nx;a, b\n")
    assert [(prompt.prompt_id, prompt.text) for prompt in read(path)] == [("x", "a, b")]
    path.write_text(",prompt,,\n0,a,,\n1,b,,x\n")
    assert [metadata(prompt) for prompt in read(path)] == [
        {"column 1": "0"},
        {"column 1": "1", "column 4": "x"},
    ]
    path.write_text("prompt\n")
    with caplog.at_level(logging.WARNING, "gptbatch"):
        assert read(path) == []
    assert "rows.csv[train]: has no rows" in caplog.text


def test_an_unnamed_column_gets_an_unused_name(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,,column 2\na,x,y\n")
    assert metadata(read(tmp_path / "rows.csv")[0]) == {"column 2'": "x", "column 2": "y"}


def test_a_json_array_may_exceed_the_line_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptbatch.pipeline.input.lines.MAX_LINE_BYTES", 1000)
    (tmp_path / "rows.json").write_text(
        "\ufeff \n" + json.dumps([{"prompt": f"p{i}"} for i in range(500)])
    )
    assert len(read(tmp_path / "rows.json")) == 500


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_a_truncated_compressed_json_array(tmp_path: Path, suffix: str) -> None:
    pack: Any = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": zstandard.compress,
    }[suffix]
    content = json.dumps([{"prompt": f"p{i * i * 7919}"} for i in range(20_000)], indent=1).encode()
    (tmp_path / f"rows.json.{suffix}").write_bytes(pack(content)[:-20])
    assert "the compressed file is damaged or cut off" in problem(tmp_path / f"rows.json.{suffix}")


def test_linked_files_are_listed(tmp_path: Path) -> None:
    write_lines(tmp_path / "elsewhere" / "rows.jsonl", [{"prompt": "a"}])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    source = DatasetSplit(dataset=str(tmp_path / "data"), config=None, split="train", revision=None)
    assert source.files() == [tmp_path / "data" / "link" / "rows.jsonl"]
    assert [row.parse() for row in source.rows()] == [{"prompt": "a"}]


def test_files_about_citations_are_data(tmp_path: Path) -> None:
    for name in ("citations.jsonl", "license_questions.jsonl", "readme_rows.jsonl"):
        write_lines(tmp_path / name, [{"prompt": name}])
    assert len(read(tmp_path)) == 3


@pytest.mark.parametrize(
    "name", ["rows.parquet", "rows.arrow", "rows.csv", "rows.jsonl", "rows.json", "rows.txt"]
)
def test_an_lfs_pointer_is_named_under_every_suffix(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 5\n"
    )
    assert "is a Git LFS pointer" in problem(tmp_path / name)


def test_only_shards_of_the_split_must_be_complete(tmp_path: Path) -> None:
    write_lines(tmp_path / "data" / "train-00000-of-00002.jsonl", [{"prompt": "a"}])
    write_lines(tmp_path / "data" / "test-00001-of-00002.jsonl", [{"prompt": "b"}])
    (tmp_path / "data" / "test-00002-of-00002.jsonl.gz").write_bytes(
        gzip.compress(b'{"prompt": "c"}\n')
    )
    assert [prompt.text for prompt in read(tmp_path, split="test")] == ["b", "c"], (
        "numbered from 1, one of them compressed"
    )
    assert "1 of 2 shards are missing" in problem(tmp_path)


def test_a_delta_table_is_rejected(tmp_path: Path) -> None:
    write_lines(tmp_path / "_delta_log" / "0.json", [{"remove": "part-0.parquet"}])
    pq.write_table(pa.table({"prompt": ["deleted"]}), tmp_path / "part-0.parquet")
    assert "is a Delta table" in problem(tmp_path)


def test_nan_is_null(tmp_path: Path) -> None:
    columns = {"id": [float("nan"), 7.0]} | {
        name: [float("nan"), min(7.0, setting.maximum)]
        for name, setting in SAMPLING_SETTINGS.items()
        if setting.kind in ("int", "float") and name != "min_new_tokens"
    }
    pq.write_table(pa.table({"prompt": ["a", "b"], **columns}), tmp_path / "rows.parquet")
    first, second = read(tmp_path / "rows.parquet")
    assert (first.prompt_id, first.params.temperature, first.params.top_k) == ("0", 1.0, 0)
    assert (second.prompt_id, second.params.seed, second.params.max_new_tokens) == ("7", 7, 7)


def test_saved_datasets_in_a_folder_are_named(tmp_path: Path) -> None:
    for name in ("one", "two"):
        datasets.Dataset.from_list([{"prompt": name}]).save_to_disk(tmp_path / name)
    assert "holds folders that save_to_disk made; name one of them: one, two" in problem(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "data" / "train-00000-of-00003.jsonl", [{"prompt": "a"}])
    write_lines(tmp_path / "data" / "train-00002-of-00003.jsonl", [{"prompt": "a"}])
    assert "1 of 3 shards are missing, the first data/train-00001-of-00003.jsonl" in problem(
        tmp_path
    )


README = """---
configs:
- config_name: plain
  data_files:
  - split: train
    path: "a/*.csv"
  - split: odd
    path: ["b [x].csv", "c/**/d.csv"]
  default: true
- config_name: semicolons
  data_files: s.csv
  sep: ";"
- config_name: strange
  data_files: s.csv
  skiprows: 3
---
"""


def test_configs_of_a_dataset_card(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "README.md").write_text(README)
    for name in ("a/1.csv", "a/2.csv", "b [x].csv", "c/e/f/d.csv", "left.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"prompt\n{name}\n")
    (tmp_path / "s.csv").write_text("prompt;x\na,b;1\n")
    with caplog.at_level(logging.WARNING, "gptbatch"):
        assert [prompt.text for prompt in read(tmp_path)] == ["a/1.csv", "a/2.csv"]
    assert "left.csv" in caplog.text
    assert [prompt.text for prompt in read(tmp_path, split="odd")] == ["b [x].csv", "c/e/f/d.csv"]
    assert [prompt.text for prompt in read(tmp_path, config="semicolons")] == ["a,b"]
    (tmp_path / "README.md").write_bytes(
        b"\xef\xbb\xbf" + README.replace("a/*.csv", "gone.csv").encode()
    )
    assert "config 'plain' names gone.csv, which is not there" in problem(tmp_path)
    assert "sets skiprows, which is not followed" in problem(tmp_path, config="strange")
    assert "there is none; it names plain, semicolons, strange" in problem(tmp_path, config="none")


@pytest.mark.parametrize(
    "folder", ["[exp 3] data", "what?", "a#b", "a::b", "100%", "{x,y}", "a!b", "seed=1", "~", "ünï"]
)
def test_names_with_special_characters(tmp_path: Path, folder: str) -> None:
    write_lines(tmp_path / folder / "rows [v1] (2)*.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    assert [prompt.text for prompt in read(tmp_path / folder)] == ["a", "b"]
    assert [prompt.text for prompt in read(tmp_path / folder, split="train[50%:]")] == ["b"]
    assert [prompt.text for prompt in read(tmp_path / folder / "rows [v1] (2)*.jsonl")] == [
        "a",
        "b",
    ]


def test_shards_with_different_types(tmp_path: Path) -> None:
    write_lines(tmp_path / "a" / "1.jsonl", [{"prompt": "a", "note": None}])
    write_lines(tmp_path / "a" / "2.jsonl", [{"prompt": "b", "note": "text", "meta": {"score": 1}}])
    (tmp_path / "a" / "3.csv").write_text("prompt,other\nc,7\n")
    pq.write_table(pa.table({"prompt": ["d"], "note": pa.nulls(1)}), tmp_path / "a" / "4.parquet")
    pq.write_table(pa.table({"prompt": ["e"], "note": [1.5]}), tmp_path / "a" / "5.parquet")
    found = [(prompt.text, metadata(prompt)) for prompt in read(tmp_path / "a")]
    assert found == [
        ("a", {"note": None}),
        ("b", {"note": "text", "meta": {"score": 1}}),
        ("c", {"other": "7"}),
        ("d", {"note": None}),
        ("e", {"note": 1.5}),
    ]
    pq.write_table(pa.table({"prompt": [5]}), tmp_path / "a" / "6.parquet")
    assert "6.parquet row 0: prompt must be a string, not a number" in problem(tmp_path / "a")


@pytest.mark.parametrize(
    "keys",
    [
        {"messages": [{"role": "user"}]},
        {"type": "task", "cwd": "/", "version": 3},
        {"__index__": 1, "label": 0},
    ],
)
def test_nothing_is_guessed_from_keys(tmp_path: Path, keys: dict[str, Any]) -> None:
    write_lines(tmp_path / "rows.jsonl", [{"id": "x", "prompt": "a", **keys}] * 1)
    (prompt,) = read(tmp_path / "rows.jsonl")
    assert metadata(prompt) == keys


# -- splits --


@pytest.mark.parametrize(
    ("split", "places"),
    [
        ("train", range(7)),
        ("train[:3]", range(3)),
        ("train[50%:]", range(4, 7)),
        ("train[-2:]", range(5, 7)),
        ("train[2:-2]", range(2, 5)),
        ("train[:100]", range(7)),
        ("train[5:2]", []),
        ("train[:2]+train[5:]", [0, 1, 5, 6]),
        ("train[10%:20%]", range(1, 1)),
    ],
)
def test_rows_of_a_slice_keep_their_ids(tmp_path: Path, split: str, places: Iterable[int]) -> None:
    write_lines(tmp_path / "rows.jsonl", [{"prompt": f"p{i}"} for i in range(7)])
    whole = read(tmp_path / "rows.jsonl")
    found = read(tmp_path / "rows.jsonl", split=split)
    assert [(p.prompt_id, p.text, p.params.seed) for p in found] == [
        (whole[i].prompt_id, whole[i].text, whole[i].params.seed) for i in places
    ]
    assert [p.index for p in found] == list(range(len(found)))


@pytest.mark.parametrize(
    "split", ["train[", "train[a:b]", "train[:5", "train[::2]", "", "train[200%:]", "train test"]
)
def test_invalid_splits_are_rejected(tmp_path: Path, split: str) -> None:
    write_lines(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    assert "rows.jsonl[" in problem(tmp_path / "rows.jsonl", split=split)


@pytest.mark.parametrize(
    "text", ["train[33%:66%]", "train[:-10%]", "train[1%:]", "train[10%:30%](pct1_dropremainder)"]
)
@pytest.mark.parametrize("length", [0, 1, 99, 100, 1234])
def test_slices_match_the_datasets_library(text: str, length: int) -> None:
    if "pct1" in text and length < 100:
        return
    (theirs,) = datasets.ReadInstruction.from_spec(text).to_absolute({"train": length})
    (part,) = parse_split(text)
    assert part.bounds(length) == (min(theirs.from_, length), min(theirs.to, length))


# -- what a file is --

ROWS = [{"instruction": f"Say {i}.", "input": ""} for i in range(30)]
KINDS: dict[str, tuple[bytes, str]] = {
    "array.json": (
        json.dumps(ROWS, indent=4).encode(),
        "is a JSON array, not JSON lines: read it with --dataset",
    ),
    "array-in-a-line.json": (
        json.dumps(ROWS).encode(),
        "is a JSON array, not JSON lines: read it with --dataset",
    ),
    "array-a-row-a-line.json": (
        b"[\n" + b",\n".join(json.dumps(row).encode() for row in ROWS) + b"\n]",
        "is a JSON array",
    ),
    "object.json": (
        json.dumps({"data": ROWS}, indent=1).encode(),
        "is JSON over several lines, not JSON lines: jq -c .",
    ),
    "pretty.jsonl": (
        b"".join(json.dumps(row, indent=2).encode() + b"\n" for row in ROWS),
        "is JSON over several lines",
    ),
    "prompts.txt": (
        b"KING:\nQUEEN:\n",
        "is plain text, not JSON lines: read a prompt per line with --dataset",
    ),
    "rows.csv": (b"id,prompt\n1,a\n2,b\n", "is CSV, not JSON lines: read it with --dataset"),
    "rows.tsv": (b"id\tprompt\n1\ta\n2\tb\n", "is TSV, not JSON lines: read it with --dataset"),
    "excel.csv": (
        b"id;prompt\n1;a\n2;b\n",
        "is CSV with semicolons, not JSON lines: read it with --dataset",
    ),
    "page.jsonl": (b"<!DOCTYPE html>\n<html>\n", "is HTML or XML"),
    "pointer.jsonl": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        "is a Git LFS pointer",
    ),
    "book.xlsx": (b"PK\x03\x04" + bytes(100), "is a ZIP archive (or an Excel workbook)"),
    "rows.tar": (b"rows.jsonl" + bytes(247) + b"ustar\x0000" + bytes(300), "is a tar archive"),
    "rows.pkl": (b"\x80\x04\x95" + bytes(20), "is a Python pickle, which is never loaded"),
    "rows.lz4": (b"\x04\x22\x4d\x18" + bytes(20), "is compressed by lz4"),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_format_of_a_file_without_json_lines_is_named(tmp_path: Path, name: str) -> None:
    content, kind = KINDS[name]
    (tmp_path / name).write_bytes(content)
    said = problem(tmp_path / name, input=True)
    assert said.startswith(f"{tmp_path / name}: {kind}")
    assert "\n" not in said


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=4),
        "\n".join(map(json.dumps, ROWS)),
        json.dumps(ROWS, indent="\t"),
    ],
)
def test_json_files_hold_an_array_or_json_lines(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    assert [prompt.text for prompt in read(tmp_path / "rows.json", prompt_field="instruction")] == [
        row["instruction"] for row in ROWS
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"prompt": "a"}, {"prompt": "b"', ":1: not valid JSON"),
        (
            '[{"prompt": "a"} {"prompt": "b"}]',
            ":1: not valid JSON: a comma or the end of the array is needed",
        ),
        (
            '[\n{"prompt": "a"}\n]\n{"prompt": "b"}',
            ":4: not valid JSON: text follows the array",
        ),
        ('[{"prompt": "a", "prompt": "b"}]', "the key 'prompt' stands twice"),
        ('[\n{"prompt": NaN}]', ":2: not valid JSON: NaN"),
        ('["a", {"prompt": "b"}]', "row 0: a JSON object is needed, not a string"),
        (
            json.dumps({"data": ROWS}, indent=1),
            "is one JSON object, with arrays of rows under 'data' (30 items): jq -c '.data[]'",
        ),
        (
            json.dumps({"prompt": {"0": "a"}, "id": {"0": 1}}, indent=1),
            "is one JSON object of columns, not rows: pandas.read_json(",
        ),
        (
            json.dumps({"prompt": ["a"], "id": [1]}, indent=1),
            "is one JSON object of columns, not rows",
        ),
        (
            json.dumps({"q1": {"prompt": "a"}, "q2": {"prompt": "b"}}, indent=1),
            "is a map of rows, not an array: jq -c 'to_entries[]",
        ),
        (json.dumps({"a": 1}, indent=1), "is one JSON object, not an array of rows"),
    ],
)
def test_malformed_json_files_are_rejected(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    assert reason in problem(tmp_path / "rows.json")


def test_numbers_of_a_json_array_keep_their_text(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(
        '[{"prompt": "a", "x": 1.10, "y": 1e400, "z": 123456789012345678901234567890}]'
    )
    assert (
        read(tmp_path / "rows.json")[0].metadata
        == '{"x": 1.10, "y": 1e400, "z": 123456789012345678901234567890}'
    )


# -- fields --


@pytest.mark.parametrize(
    ("row", "path", "text", "rest"),
    [
        ({"prompt": {"text": "a", "score": 1}}, "prompt.text", "a", {"prompt": {"score": 1}}),
        ({"prompt": {"text": "a"}, "x": 1}, "prompt.text", "a", {"x": 1}),
        (
            {"prompt.text": "a", "prompt": {"text": "b"}},
            "prompt.text",
            "a",
            {"prompt": {"text": "b"}},
        ),
        ({"turns": ["a", "b"]}, "turns.0", "a", {"turns": ["a", "b"]}),
        (
            {"conversations": [{"from": "x", "value": "a"}]},
            "conversations.0.value",
            "a",
            {"conversations": [{"from": "x", "value": "a"}]},
        ),
        ({"a": {"b": {"c": {"d": "a"}}}}, "a.b.c.d", "a", None),
    ],
)
def test_dotted_paths(tmp_path: Path, row: dict[str, Any], path: str, text: str, rest: Any) -> None:
    (prompt,) = read(write_lines(tmp_path / "rows.jsonl", [row]), input=True, prompt_field=path)
    assert (prompt.text, metadata(prompt)) == (text, rest)


@pytest.mark.parametrize(
    ("row", "settings", "reason"),
    [
        (
            {"prompt": {"text": "a"}},
            {},
            (
                "prompt must be a string, not an object "
                "(--prompt-field prompt.text takes the text inside)"
            ),
        ),
        (
            {"question": "a", "answer": "b"},
            {},
            "there is no field 'prompt'; the row has 'question', 'answer' (--prompt-field names",
        ),
        (
            {"body": {"prompt": "a"}, "x": 1},
            {},
            "(--prompt-field body.prompt takes the text inside)",
        ),
        (
            {"custom_id": "r", "body": {"prompt": "a"}},
            {},
            "(requests of OpenAI's batch API: jq -c ",
        ),
        ({"custom_id": "r", "body": {"messages": []}}, {}, "--messages-field messages reads the"),
        (
            {"prompt": {"0": "a", "1": "b"}},
            {},
            "(columns, not rows: pandas writes rows with orient='records'",
        ),
        (
            {"q1": {"prompt": "a"}, "q2": {"prompt": "b"}},
            {},
            "(a map of rows, not one row: jq -c 'to_entries[]",
        ),
        ({"turns": ["a"]}, {"prompt_field": "turns.1"}, "there is no field 'turns.1'"),
        ({"turns": ["a"]}, {"prompt_field": "turns.x"}, "there is no field 'turns.x'"),
        (
            {"prompt": "a", "task": 1},
            {"id_field": "task_id"},
            "there is no field 'task_id', which id_field names; the row has 'task'",
        ),
        (
            {"prompt": "a", "seed": "tasks/7"},
            {},
            "if seed is no setting here, name those that are with --row-settings",
        ),
        (
            {"prompt": "a", "temperature": "12 C"},
            {},
            "if temperature is no setting here, name those that are with --row-settings",
        ),
        (
            {"prompt": "a", "top_k": [1]},
            {},
            "if top_k is no setting here, name those that are with --row-settings",
        ),
    ],
)
def test_a_missing_field_is_an_error_that_lists_the_fields(
    tmp_path: Path, row: dict[str, Any], settings: dict[str, Any], reason: str
) -> None:
    assert reason in problem(write_lines(tmp_path / "rows.jsonl", [row]), input=True, **settings)


def test_ids_from_another_field_and_reserved_names_as_metadata(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "rows.jsonl",
        [
            {"task": {"id": "t/0"}, "id": "same", "prompt": "a", "seed": "x"},
            {"task": {"id": 7}, "id": "same", "prompt": "b"},
        ],
    )
    first, second = read(path, input=True, id_field="task.id", row_settings=())
    assert (first.prompt_id, second.prompt_id) == ("t/0", "7")
    assert metadata(first) == {"id": "same", "seed": "x"}
    by_place = read(path, input=True, id_field="", row_settings=())
    assert [prompt.prompt_id for prompt in by_place] == ["0", "1"]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"max_tokens": 2}, "'max_tokens' in 2 rows (did you mean max_new_tokens?)"),
        ({"maxNewTokens": 2}, "'maxNewTokens' in 2 rows (did you mean max_new_tokens?)"),
        ({"temprature": 0}, "'temprature' in 2 rows (did you mean temperature?)"),
        (
            {"sead": 5, "stpo": "x"},
            "'sead' in 2 rows (did you mean seed?); 'stpo' in 2 rows (did you mean stop?)",
        ),
        ({"stopp": "x"}, "'stopp' in 2 rows (did you mean top_p or stop?)"),
        ({"max_new_token": 1}, "'max_new_token' in 2 rows (did you mean max_new_tokens?)"),
        ({"topk": 1, "top-p": 0.9}, "'topk' in 2 rows (did you mean top_k?); 'top-p' in 2 rows"),
        (
            {"stop_strings": ["x"], "best_of": 2, "echo": True},
            "'stop_strings' in 2 rows (did you mean stop?); 'best_of' in 2 rows (did you mean n?); "
            "'echo' in 2 rows (the output has a column with the prompt)",
        ),
        (
            {"parameters": {"max_new_tokens": 5}, "options": {"until": "x"}},
            "'parameters.max_new_tokens' in 2 rows; 'options.until' in 2 rows",
        ),
        ({"options": ["A", "B"], "config": {"lang": "en"}}, ""),
        (
            {
                "speed": 1,
                "step": "plan",
                "min_x": 0.5,
                "topic": "x",
                "stopped": 1,
                "model": "m",
                "nn": 1,
                "text": "t",
                "length": 3,
            },
            "",
        ),
    ],
)
def test_fields_that_look_like_settings_are_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, row: dict[str, Any], named: str
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "a", **row}, {"prompt": "b", **row}])
    with caplog.at_level(logging.WARNING, "gptbatch"):
        assert all(metadata(prompt) == row for prompt in read(path, input=True))
    assert (len(caplog.messages) == 1 and named in caplog.text) if named else not caplog.messages


# -- values that JSON has no form for --


def png() -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header, pixels = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0), zlib.compress(bytes(4))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def picture_table() -> pa.Table:
    binary = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "prompt": ["a", "b"],
            "image": pa.array([{"bytes": png(), "path": f"{i}.png"} for i in range(2)], binary),
        }
    )
    features = {"prompt": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"}}
    return table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )


def test_values_without_a_json_form_are_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pq.write_table(picture_table(), tmp_path / "pictures.parquet")
    with caplog.at_level(logging.WARNING, "gptbatch"):
        assert [metadata(prompt) for prompt in read(tmp_path / "pictures.parquet")] == [
            {"image": {"path": f"{i}.png"}} for i in range(2)
        ]
    assert (
        "values without a JSON form are left out of metadata: 'image.bytes' (2 times in 2 rows)"
        in caplog.text
    )
    caplog.clear()
    table = pa.table(
        {
            "prompt": ["a"],
            "raw": [b"\x00"],
            "list": [[b"x", None]],
            "inf": [float("inf")],
            "nan": [float("nan")],
        }
    )
    pq.write_table(table, tmp_path / "raw.parquet")
    with caplog.at_level(logging.WARNING, "gptbatch"):
        assert metadata(read(tmp_path / "raw.parquet")[0]) == {"list": [None, None], "nan": None}
    assert all(f"'{name}'" in caplog.text for name in ("raw", "list", "inf"))


def test_arrow_types_as_json(tmp_path: Path) -> None:
    columns = {
        "prompt": ["a"],
        "decimal": pa.array(["1.10"]).cast(pa.decimal128(5, 2)),
        "day": pa.array([1], pa.date32()),
        "nanoseconds": pa.array([1], pa.timestamp("ns")),
        "clock": pa.array([1], pa.time64("ns")),
        "unsigned": pa.array([2**64 - 1], pa.uint64()),
        "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        "clocks": pa.array([[1]], pa.list_(pa.time64("ns"))),
        "struct": pa.array([{"at": 1}], pa.struct([("at", pa.timestamp("ns"))])),
        "json": pa.array(['{"a": [1.10]}'], pa.json_()),
        "uuid": pa.array([bytes(16)], pa.uuid()),
        "category": pa.array(["x"]).dictionary_encode(),
        "large": pa.array(["y"], pa.large_string()),
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet")[0].metadata == (
        '{"decimal": 1.10, "day": "1970-01-02", "nanoseconds": '
        '"1970-01-01 00:00:00.000000001", "clock": "00:00:00.000000001", '
        '"unsigned": 18446744073709551615, "map": [["k", 1]], "clocks": ["00:00:00.000000001"], '
        '"struct": {"at": "1970-01-01 00:00:00.000000001"}, "json": {"a": [1.10]}, '
        '"uuid": "00000000-0000-0000-0000-000000000000", "category": "x", "large": "y"}'
    )


def test_text_that_is_not_utf8_fails_in_its_own_row(tmp_path: Path) -> None:
    offsets = pa.py_buffer(struct.pack("<4i", 0, 1, 2, 3))
    texts = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a\xffc"))
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "rows.parquet")
    assert "1 of 3 rows is bad" in problem(tmp_path / "rows.parquet")
    assert "row 1: column 'prompt' cannot be read (UnicodeDecodeError" in problem(
        tmp_path / "rows.parquet"
    )


# -- saved datasets and the hub --


def test_damage_in_a_saved_dataset_raises_input_errors(tmp_path: Path) -> None:
    """Flip bits and truncate the Arrow file: no crash, and no exception of a library."""
    datasets.Dataset.from_list([{"prompt": f"prompt {i}", "n": i} for i in range(50)]).save_to_disk(
        tmp_path / "saved"
    )
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    whole = arrow.read_bytes()
    outcomes = set()
    for place in range(0, len(whole), 7):
        arrow.write_bytes(
            whole[:place]
            if place % 2
            else whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
        )
        try:
            read(tmp_path / "saved")
            outcomes.add("rows")
        except (InputRowsError, InputNotFoundError) as error:
            outcomes.add(type(error).__name__)
    assert "InputRowsError" in outcomes


def test_a_saved_dataset_with_indices(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"prompt": "a"}]).save_to_disk(tmp_path / "saved")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    for change in (
        {"_data_files": [{"filename": "gone.arrow"}]},
        {"_data_files": 5},
        {"_indices_data_files": [{"filename": "x"}]},
    ):
        (tmp_path / "saved" / "state.json").write_text(json.dumps({**state, **change}))
        assert str(tmp_path / "saved") in problem(tmp_path / "saved")


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a dataset in the layout of the hub, which the datasets library reads from a folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    pq.write_table(picture_table(), tmp_path / "hub" / "train.parquet")
    return tmp_path / "hub"


def rows_of(found: Iterable[RawRow]) -> list[tuple[int, Any]]:
    return [(row.position, row.parse()["prompt"]) for row in found]


def test_the_datasets_library_reads_other_formats(hub_folder: Path) -> None:
    hub = LibrarySplits(str(hub_folder), "hub", None, None)
    assert rows_of(hub.rows("train")) == [(0, "a"), (1, "b")]
    assert next(iter(hub.rows("train"))).parse()["image"]["bytes"] == png(), "undecoded"
    assert hub.length("train") == 2
    assert rows_of(hub.rows("train")) == [(0, "a"), (1, "b")], "of the prepared split"
    with pytest.raises(InputNotFoundError, match="cannot be loaded"):
        list(hub.rows("nothing"))


def test_exceptions_of_the_datasets_library_are_input_errors(hub_folder: Path) -> None:
    (hub_folder / "train.parquet").unlink()
    write_lines(hub_folder / "a.jsonl", [{"prompt": "a", "note": None}] * 3)
    write_lines(hub_folder / "b.jsonl", [{"prompt": "a", "other": {"x": 1}}] * 3)
    with pytest.raises((InputRowsError, InputNotFoundError)):
        list(LibrarySplits(str(hub_folder), "hub", None, None).rows("train"))


COMMIT = "0123456789abcdef0123456789abcdef01234567"
ON_THE_HUB = {
    "README.md": "---\nlicense: mit\n---\n",
    "data/train-00000-of-00002.csv": "id,prompt,zip\n007,a,01234\n",
    "data/train-00001-of-00002.csv": "id,prompt,zip\n008,b,NA\n",
    "data/test-00000-of-00001.jsonl": '{"prompt": "c", "x": 1.10}\n',
}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a dataset on the hub and in its cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        "huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub")
    )
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "hub" / "datasets--acme--prompts"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for name, text in ON_THE_HUB.items():
        (folder / "snapshots" / COMMIT / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "snapshots" / COMMIT / name).write_text(text)
    return folder / "snapshots" / COMMIT


def found_rows(split: str) -> list[tuple[str, str, Any]]:
    return [
        (prompt.prompt_id, prompt.text, metadata(prompt))
        for prompt in read(Path("acme/prompts"), split=split)
    ]


@pytest.mark.parametrize("reach", ["online", "offline", "out of reach"])
def test_hub_rows_are_the_same_online_and_cached(
    repository: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reach: str
) -> None:
    fetched = []

    def info(self: Any, name: str, revision: str | None = None) -> Any:
        if reach != "online" or name != "acme/prompts":
            raise ConnectionError("the hub is out of reach")
        return SimpleNamespace(
            sha=COMMIT, siblings=[SimpleNamespace(rfilename=file) for file in ON_THE_HUB]
        )

    def download(name: str, file: str, *, repo_type: str, revision: str) -> str:
        assert (name, repo_type, revision) == ("acme/prompts", "dataset", COMMIT)
        fetched.append(file)
        return str(repository / file)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", reach == "offline")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    whole = [("007", "a", {"zip": "01234"}), ("008", "b", {"zip": "NA"})]
    assert found_rows("train") == whole
    assert found_rows("train[1:]") == whole[1:]
    assert found_rows("test") == [("0", "c", {"x": 1.1})]
    assert ("the hub cannot be reached" in caplog.text) == (reach == "out of reach")
    assert re.search(
        "cannot be loaded|no such file or folder, and the hub cannot be reached",
        problem(Path("acme/others")),
    )
    if reach == "online":
        fetched.clear()
        assert [prompt.text for prompt in reader_prompts(limit=1)] == ["a"]
        assert set(fetched) == {"README.md", "data/train-00000-of-00002.csv"}, (
            "files are fetched when they are reached"
        )


def reader_prompts(limit: int) -> list[Prompt]:
    rows = dataclasses.replace(reader(Path("acme/prompts")), limit=limit)
    return [row for row in rows.prompts(rows.check()) if isinstance(row, Prompt)]


@pytest.mark.parametrize("name", ["json", "csv", "text", "parquet", "imagefolder"])
def test_loader_names_are_not_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The library would read every file of the current folder."""
    write_lines(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    monkeypatch.chdir(tmp_path)
    assert "no such file or folder" in problem(Path(name))


@pytest.mark.parametrize(
    "name",
    [
        "./rows",
        "/no/where",
        "rows.jsonl",
        "data/train/rows.csv",
        "prompts [v2].jsonl",
        "a b",
        "x?y",
    ],
)
def test_invalid_dataset_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputNotFoundError) as caught:
        list(DatasetSplit(dataset=name, config=None, split="train", revision=None).rows())
    assert str(caught.value) == f"{name}: no such file or folder"


# -- well-known files --

DIALOGUE = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "?"}]
ARGUMENTS = {"gen_args_0": {"arg_0": "Q: x", "arg_1": {"until": []}}}
# kind -> file name, its one row or its text, and the id and prompt that come out
WELL_KNOWN: dict[str, tuple[str, Any, str, str]] = {
    "HumanEval": (
        "HumanEval.jsonl.gz",
        {"task_id": "HumanEval/0", "prompt": "def f():\n", "test": ""},
        "HumanEval/0",
        "def f():\n",
    ),
    "RealToxicityPrompts": (
        "prompts.jsonl",
        {"filename": "1.txt", "prompt": {"text": "a b", "toxicity": 0.1}},
        "0",
        "a b",
    ),
    "Alpaca": (
        "alpaca_data.json",
        {"instruction": "Say a.", "input": "", "output": "a"},
        "0",
        "Instruction: Say a. Input:  Response:",
    ),
    "ShareGPT": ("sharegpt.json", {"id": "x_0", "conversations": DIALOGUE}, "x_0", "hi"),
    "MT-bench": (
        "question.jsonl",
        {"question_id": 81, "category": "writing", "turns": ["one", "two"]},
        "81",
        "one",
    ),
    "chats, for models such as DialoGPT": (
        "chats.jsonl",
        {"id": "c", "messages": [{"role": "user", "content": "hi"}]},
        "c",
        '[{"role": "user", "content": "hi"}]',
    ),
    "sample log of lm-evaluation-harness": (
        "samples.jsonl",
        {"doc_id": 3, "doc": {"q": 1}, "arguments": ARGUMENTS},
        "3",
        "Q: x",
    ),
    "a spreadsheet with semicolons": ("prompts.csv", "id;prompt\ns1;a, b\n", "s1", "a, b"),
    "a prompt per line of text": ("prompts.txt", "a line\n", "0", "a line"),
}
COMMAND = re.compile(r"^\| ([^|`]+) \| `(--(?:input|dataset) [^`]+)` \|$", re.MULTILINE)


def test_the_documented_command_of_each_public_file(
    tmp_path: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    documented = dict(COMMAND.findall((REPOSITORY / "docs/input.md").read_text()))
    assert documented.keys() == WELL_KNOWN.keys()
    monkeypatch.chdir(tmp_path)
    for number, (kind, (name, content, prompt_id, text)) in enumerate(WELL_KNOWN.items()):
        raw = (
            content
            if isinstance(content, str)
            else json.dumps([content], indent=1)
            if name.endswith(".json")
            else json.dumps(content)
        )
        Path(name).write_bytes(
            gzip.compress(raw.encode()) if name.endswith(".gz") else raw.encode()
        )
        command = [
            "generate",
            *shlex.split(documented[kind]),
            "--model",
            str(checkpoint),
            "--output",
            f"out/{number}",
        ]
        assert (
            run_command(
                [
                    *command,
                    "--max-new-tokens",
                    "1",
                    "--batch-invariance",
                    "off",
                    "--attention",
                    "padded",
                ]
            )
            == 0
        ), kind
        (row,) = pd.read_parquet(f"out/{number}")[["prompt_id", "prompt"]].to_dict("records")
        assert (row["prompt_id"], row["prompt"]) == (prompt_id, text), kind


def test_error_rows_are_an_input_for_the_same_settings(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """errors.jsonl keeps id, prompt and metadata under the field names of the run."""
    monkeypatch.chdir(tmp_path)
    row = {
        "task": "t/0",
        "id": "other",
        "prompt": {"text": "a king " * 200, "score": 1},
        "seed": "x",
    }
    write_lines(Path("rows.jsonl"), [row])
    run = [
        "generate",
        "--model",
        str(checkpoint),
        "--prompt-field",
        "prompt.text",
        "--id-field",
        "task",
        "--row-settings",
        "none",
    ]
    run += ["--max-new-tokens", "2", "--batch-invariance", "off", "--attention", "padded"]
    assert run_command([*run, "--input", "rows.jsonl", "--output", "out/1"]) == 0
    assert (
        run_command(
            [
                *run,
                "--input",
                "out/1/.gptbatch/errors.jsonl",
                "--output",
                "out/2",
                "--context-overflow",
                "truncate_left",
            ]
        )
        == 0
    )
    (first,), (second,) = (pd.read_parquet(out).to_dict("records") for out in ("out/1", "out/2"))
    assert (first["finish_reason"], second["finish_reason"]) == ("error", "length")
    for name in ("prompt_id", "prompt", "seed"):
        assert first[name] == second[name]
    assert json.loads(first["metadata"]) == {"id": "other", "prompt": {"score": 1}, "seed": "x"}
    assert json.loads(first["metadata"]).items() <= json.loads(second["metadata"]).items()
