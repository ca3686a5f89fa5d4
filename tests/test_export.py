"""gptbatch export: rows of a run as JSON lines, OpenAI's batch results, Parquet or CSV."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import load_dataset

from gptbatch.pipeline.audit.run_reader import RunReader
from gptbatch.pipeline.errors import (
    ConfigError,
    IncompleteError,
    InputNotFoundError,
    InputRowsError,
    OutputConflictError,
)
from gptbatch.pipeline.export import formats
from gptbatch.pipeline.export.columns import Selection
from gptbatch.pipeline.export.field_type import FieldType
from gptbatch.pipeline.export.openai_results import OpenaiResults
from gptbatch.pipeline.export.run import export_run
from gptbatch.pipeline.input.csv_file import CsvFile
from gptbatch.pipeline.output.schema import SCHEMA
from tests.conftest import run_gptbatch

ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "The king", "topic": "plays", "score": 1, "meta": {"src": "s", "k": 2}},
    {"id": "b", "prompt": "The queen", "topic": None, "score": 2.5, "meta": {"src": "é"}, "n": 2},
    {"id": "c", "prompt": "Long live", "tags": ["x", "y"], "mixed": 1},
    {"id": "d", "prompt": "king " * 100, "tags": [], "mixed": "one"},
]


@pytest.fixture(scope="module")
def run(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of a run of ROWS: 5 rows in 2 parts, the last an error row."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    done = run_gptbatch(
        *("generate", "--model", checkpoint, "--input", folder / "rows.jsonl"),
        *("--output", folder / "out", "--part-rows", "2", "--max-new-tokens", "4"),
    )
    assert done.code == 0, done.stderr
    return folder / "out"


def exported(run: Path, path: Path, **options: Any) -> Path:
    export_run(RunReader(run), str(path), **options)
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_lines_have_the_columns_of_the_table(run: Path, tmp_path: Path) -> None:
    rows = lines(exported(run, tmp_path / "rows.jsonl"))
    table = list(RunReader(run).rows())
    assert [(row["prompt_id"], row["sample_index"]) for row in rows] == [
        *[("a", 0), ("b", 0), ("b", 1), ("c", 0), ("d", 0)]
    ]
    for row, expected in zip(rows, table, strict=True):
        assert list(row) == SCHEMA.names
        for name in ("prompt", "completion", "completion_token_ids", "error", "metadata", "seed"):
            assert row[name] == expected[name]
        started_at = expected["started_at"]
        assert row["started_at"] == (started_at and started_at.isoformat())


def test_metadata_fields_become_typed_columns(run: Path, tmp_path: Path) -> None:
    selection = Selection(
        columns=["prompt_id"],
        metadata=["topic", "score", "tags", "meta", "meta.src"],
        metadata_json=["mixed"],
    )
    table = pq.read_table(exported(run, tmp_path / "rows.parquet", selection=selection))
    assert table.drop_columns(["meta"]).schema.types == [
        *[pa.string(), pa.string(), pa.float64(), pa.list_(pa.string()), pa.string(), pa.string()]
    ]
    assert table.schema.field("meta").type == pa.struct([("src", pa.string()), ("k", pa.int64())])
    assert table["score"].to_pylist() == [1.0, 2.5, 2.5, None, None]
    assert table["meta.src"].to_pylist() == ["s", "é", "é", None, None]
    assert table["tags"].to_pylist() == [None, None, None, ["x", "y"], []]
    assert table["mixed"].to_pylist() == [None, None, None, "1", '"one"']
    path = exported(run, tmp_path / "rows.jsonl", selection=selection)
    assert lines(path) == table.to_pylist()


def test_all_metadata(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRowsError, match="field mixed holds a whole number in row 'c' and a s"):
        exported(run, tmp_path / "rows.parquet", selection=Selection(all_metadata=True))
    selection = Selection(all_metadata=True, metadata_json=["mixed"])
    schema = pq.read_schema(exported(run, tmp_path / "rows.parquet", selection=selection))
    others = [name for name in SCHEMA.names if name != "metadata"]
    assert schema.names == [*others, "topic", "score", "meta", "tags", "mixed"]
    facts = json.loads(schema.metadata[formats.FACTS_KEY])
    assert facts["content_digest"] == RunReader(run).content_digest
    assert str(run.parent) not in json.dumps(facts)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_other_programs_open_it(run: Path, tmp_path: Path, name: str) -> None:
    selection = Selection(all_metadata=True, metadata_json=["mixed"])
    path = exported(run, tmp_path / name, selection=selection)
    kind = "parquet" if name.endswith("parquet") else "json"
    dataset = load_dataset(
        kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    scores = [
        dataset["score"],
        [score for (score,) in duckdb.connect().sql(f"SELECT score FROM '{path}'").fetchall()],
    ]
    if kind == "parquet":
        scores += [
            pd.read_parquet(path)["score"].tolist(),
            pl.read_parquet(path)["score"].to_list(),
        ]
    else:
        scores += [
            pd.read_json(path, lines=True)["score"].tolist(),
            pl.read_ndjson(path)["score"].to_list(),
        ]
    for found in scores:
        assert list(found)[:3] == [1.0, 2.5, 2.5]
        assert len(found) == 5


def test_csv_has_one_record_per_row_and_lists_as_json(run: Path, tmp_path: Path) -> None:
    selection = Selection(all_metadata=True, metadata_json=["mixed"])
    path = exported(run, tmp_path / "rows.csv", selection=selection)
    table = RunReader(run).rows()
    with path.open(newline="", encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    assert len(records) == 5
    for record, row in zip(records, table, strict=True):
        assert record["prompt"] == row["prompt"]
        assert record["completion"] == (row["completion"] or "")
        assert json.loads(record["completion_token_ids"]) == row["completion_token_ids"]
    assert records[0]["meta"] == '{"src": "s", "k": 2}'
    assert records[1]["meta"] == '{"src": "é", "k": null}'
    assert [record["tags"] for record in records] == ["", "", "", '["x", "y"]', "[]"]
    frame = pd.read_csv(path)
    assert frame["score"].tolist()[:3] == [1.0, 2.5, 2.5]
    assert frame["completion"].isna().tolist() == [False, False, False, False, True]
    (score, *_), *_ = duckdb.connect().sql(f"SELECT score, topic FROM '{path}'").fetchall()
    assert score == 1.0


def test_an_exported_csv_is_an_input(run: Path, tmp_path: Path) -> None:
    """Null and the empty text stay what they are."""
    table = pa.table({"id": ["a", "b"], "prompt": ['a "b",\nc', ""], "n": [None, 2]})
    with (tmp_path / "rows.csv").open("wb") as file:
        formats.write_csv(file, table.schema, table.to_batches(), ".csv")
    rows = [row.parse() for row in CsvFile(tmp_path / "rows.csv", "rows.csv", ",").rows()]
    assert rows == [
        {"id": "a", "prompt": 'a "b",\nc', "n": None},
        {"id": "b", "prompt": "", "n": "2"},
    ]
    packed = exported(run, tmp_path / "run.csv.gz").read_bytes()
    assert gzip.decompress(packed) == exported(run, tmp_path / "run.csv").read_bytes()


def test_lines_are_compressed_by_suffix(run: Path, tmp_path: Path) -> None:
    plain = exported(run, tmp_path / "rows.jsonl").read_bytes()
    packed = exported(run, tmp_path / "rows.jsonl.gz").read_bytes()
    assert gzip.decompress(packed) == plain
    assert exported(run, tmp_path / "again.jsonl.gz").read_bytes() == packed
    packed = exported(run, tmp_path / "rows.jsonl.zst").read_bytes()
    assert zstandard.ZstdDecompressor().decompressobj().decompress(packed) == plain


def test_openai_results(run: Path, tmp_path: Path) -> None:
    path = exported(run, tmp_path / "rows.jsonl", file_format="openai")
    results = lines(path)
    assert [result["custom_id"] for result in results] == ["a", "b", "c", "d"]
    table = list(RunReader(run).rows())
    body = results[1]["response"]["body"]
    assert [choice["text"] for choice in body["choices"]] == [
        *[table[1]["completion"], table[2]["completion"]]
    ]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["object"] == "text_completion"
    assert body["usage"]["completion_tokens"] == 8
    assert body["model"] == "checkpoint0"
    assert (results[1]["response"]["status_code"], results[1]["error"]) == (200, None)
    assert results[3]["response"] is None
    assert "more than n_positions" in results[3]["error"]["message"]


TOKEN_BYTES = [b"a", b" b", "é".encode()[:1], "é".encode()[1:], b"END", b"<eos>"]
TOKEN_BYTES += [b"\xe2\x80", b"\x94END", b"\xe2", b"\x80"]
SAMPLE: dict[str, Any] = {
    "prompt_id": "a",
    "prompt_index": 0,
    "sample_index": 0,
    "prompt": "Hi!",
    "error": None,
    "completion": "a\xe9 b",
    "completion_token_ids": [0, 2, 3, 1, 5],
    "finish_reason": "stop",
    "stop_reason": "end_of_text",
    "prompt_tokens": 1,
    "completion_tokens": 5,
    "started_at": None,
    "token_logprobs": [-0.5, -1.0, -1.5, -2.0, -2.5],
    "top_logprob_ids": [0, 1, 3, 0, 3, 2, 4, 0, 5, 1],
    "top_logprobs": [-0.5, -3.0, -0.1, -3.0, -1.5, -3.0, -0.1, -3.0, -2.5, -3.0],
}
WITHOUT_LOGPROBS = dict.fromkeys(["token_logprobs", "top_logprob_ids", "top_logprobs"])


def choice(sample: dict[str, Any], *, is_chat: bool) -> dict[str, Any]:
    results = OpenaiResults(model="m", is_chat=is_chat, find_token_bytes=lambda: TOKEN_BYTES)
    (result,) = results.lines([sample])
    (only,) = result["response"]["body"]["choices"]
    assert isinstance(only, dict)
    return only


def test_openai_results_of_chats() -> None:
    results = OpenaiResults(model="m", is_chat=True, find_token_bytes=list)
    (result,) = results.lines([SAMPLE | WITHOUT_LOGPROBS])
    body = result["response"]["body"]
    assert body["object"] == "chat.completion"
    (only,) = body["choices"]
    assert only["message"] == {"role": "assistant", "content": "a\xe9 b"}
    assert only["logprobs"] is None


def test_log_probabilities_of_openai_completions() -> None:
    """Fields of openai.types.completion_choice.Logprobs. Offsets begin after the prompt.

    A token that is a part of a character begins where the character does.
    """
    assert choice(SAMPLE, is_chat=False)["logprobs"] == {
        "tokens": ["a", r"bytes:\xc3", r"bytes:\xa9", " b"],
        "token_logprobs": [-0.5, -1.0, -1.5, -2.0],
        "top_logprobs": [
            {"a": -0.5, " b": -3.0},
            {r"bytes:\xa9": -0.1, "a": -3.0, r"bytes:\xc3": -1.0},
            {r"bytes:\xa9": -1.5, r"bytes:\xc3": -3.0},
            {"END": -0.1, "a": -3.0, " b": -2.0},
        ],
        "text_offset": [3, 4, 4, 5],
    }
    none_listed = SAMPLE | {"top_logprob_ids": [], "top_logprobs": []}
    assert choice(none_listed, is_chat=False)["logprobs"]["top_logprobs"] is None


def test_log_probabilities_of_openai_chat_completions() -> None:
    """Fields of openai.types.chat.chat_completion.ChoiceLogprobs."""
    logprobs = choice(SAMPLE, is_chat=True)["logprobs"]
    assert logprobs["refusal"] is None
    assert [token["token"] for token in logprobs["content"]] == ["a", r"\xc3", r"\xa9", " b"]
    assert logprobs["content"][3] == {
        "token": " b",
        "bytes": [32, 98],
        "logprob": -2.0,
        "top_logprobs": [
            {"token": "END", "bytes": [69, 78, 68], "logprob": -0.1},
            {"token": "a", "bytes": [97], "logprob": -3.0},
        ],
    }
    none_listed = SAMPLE | {"top_logprob_ids": [], "top_logprobs": []}
    content = choice(none_listed, is_chat=True)["logprobs"]["content"]
    assert [token["top_logprobs"] for token in content] == [[]] * 4


@pytest.mark.parametrize(
    ("completion", "stop_reason", "token_ids", "tokens"),
    [
        ("a", "stop_string", [0, 4], ["a"]),
        ("aEN", "stop_string", [0, 4], ["a", "END"]),
        ("aEND", "stop_string", [0, 4], ["a", "END"]),
        ("", "stop_string", [4], []),
        # a character without its last byte, before the stop string, and one that ends in its token
        ("a\ufffd", "stop_string", [0, 2, 4], ["a", None]),
        ("a\u2014", "stop_string", [0, 6, 7], ["a", None, None]),
        ("a\ufffd", "stop_string", [0, 8, 9, 4], ["a", None, None]),
        ("a", "stop_token", [0, 4], ["a"]),
        ("aEND", "max_new_tokens", [0, 4], ["a", "END"]),
        # an id that the tokenizer lacks
        ("a", "window", [0, 99], ["a", ""]),
    ],
)
def test_log_probabilities_are_those_of_the_tokens_of_the_text(
    completion: str, stop_reason: str, token_ids: list[int], tokens: list[str | None]
) -> None:
    """None stands for a token that is not a text."""
    sample = SAMPLE | {"completion": completion, "stop_reason": stop_reason}
    sample |= {"completion_token_ids": token_ids, "token_logprobs": [-1.0] * len(token_ids)}
    sample |= {"top_logprob_ids": [], "top_logprobs": []}
    found = choice(sample, is_chat=False)["logprobs"]["tokens"]
    assert [None if token.startswith("bytes:") else token for token in found] == tokens
    content = choice(sample, is_chat=True)["logprobs"]["content"]
    assert [None if "\\x" in token["token"] else token["token"] for token in content] == tokens


def test_openai_results_have_the_log_probabilities_of_the_run(
    checkpoint: Path, tmp_path: Path
) -> None:
    model, output = Path(shutil.copytree(checkpoint, tmp_path / "model")), tmp_path / "out"
    rows = [{"prompt": "The king"}, {"prompt": "A", "logprobs": 3}, {"prompt": "B", "logprobs": 0}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_gptbatch(
        *("generate", "--model", model, "--input", tmp_path / "rows.jsonl"),
        *("--output", output, "--max-new-tokens", "4"),
    )
    assert done.code == 0, done.stderr
    arguments = ("export", output, "--to", tmp_path / "rows.out.jsonl", "--format", "openai")
    assert run_gptbatch(*arguments).code == 0
    found = [
        result["response"]["body"]["choices"][0] for result in lines(tmp_path / "rows.out.jsonl")
    ]
    table = list(RunReader(output).rows())
    assert found[0]["logprobs"] is None
    for made, row in zip(found[1:], table[1:], strict=True):
        logprobs = made["logprobs"]
        n_tokens = len(logprobs["tokens"])
        assert logprobs["token_logprobs"] == row["token_logprobs"][:n_tokens]
        text = row["prompt"] + row["completion"]
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            assert token.startswith("bytes:") or text.startswith(token, offset)
    assert all(3 <= len(top) <= 4 for top in found[1]["logprobs"]["top_logprobs"])

    # without the tokenizer of the run, the texts of tokens are unknown
    model.rename(tmp_path / "moved")
    done = run_gptbatch(*arguments, "--overwrite")
    assert done.code == 0
    said = "log probabilities are left out, since the texts of tokens are unknown: "
    assert f"{said}its checkpoint is not at {model}" in done.stderr
    bodies = [result["response"]["body"] for result in lines(tmp_path / "rows.out.jsonl")]
    assert {body["choices"][0]["logprobs"] is None for body in bodies} == {True}
    other = json.loads((tmp_path / "moved/tokenizer.json").read_text())
    other["model"]["merges"].pop()
    shutil.copytree(tmp_path / "moved", model)
    (model / "tokenizer.json").write_text(json.dumps(other))
    done = run_gptbatch(*arguments, "--overwrite")
    assert (done.code, f"{said}the tokenizer at {model} is not that" in done.stderr) == (0, True)
    (model / "config.json").unlink()
    done = run_gptbatch(*arguments, "--overwrite")
    assert (done.code, f"{said}{model}/config.json: cannot be read" in done.stderr) == (0, True)


def test_a_damaged_part_is_named_in_one_line_with_what_to_do(run: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(run, tmp_path / "out"))
    part = output / "part-000001.parquet"
    content = bytearray(part.read_bytes())
    content[60:64] = b"KIND"
    part.write_bytes(content)
    ran = run_gptbatch("export", output, "--to", tmp_path / "rows.jsonl")
    assert ran.code == 74
    (line,) = ran.stderr.splitlines()
    assert "part-000001.parquet: cannot be read (" in line
    assert line.endswith(
        "delete it, and run the command of the run again, which generates its rows"
    )


def test_what_is_refused_leaves_no_file(run: Path, tmp_path: Path) -> None:
    cases: list[tuple[str, type[Exception], str, dict[str, Any]]] = [
        ("rows.txt", ConfigError, "does not follow from the suffix '.txt'", {}),
        ("-", ConfigError, "cannot write to standard output", {"file_format": "jsonl"}),
        ("rows", ConfigError, "name a file such as rows.jsonl", {}),
        ("rows.parquet", ConfigError, "jsonl does not fit", {"file_format": "jsonl"}),
        ("rows.csv", ConfigError, "jsonl does not fit", {"file_format": "jsonl"}),
        ("rows.jsonl", ConfigError, "csv does not fit", {"file_format": "csv"}),
        ("rows.parquet.gz", ConfigError, "compressed inside", {}),
        ("a.jsonl", ConfigError, "no 'foo'; its", {"selection": Selection(columns=["foo"])}),
        (
            "a.jsonl",
            ConfigError,
            r"no 'id' \(did you mean prompt_id\?\), 'promt' \(did you mean prompt\?\); its",
            {"selection": Selection(columns=["id", "promt"])},
        ),
        (
            "a.jsonl",
            ConfigError,
            "; --metadata makes columns of other fields of the rows",
            {"selection": Selection(columns=["topic"])},
        ),
        (
            "a.jsonl",
            InputNotFoundError,
            "'topc'; there",
            {"selection": Selection(metadata=["topc"])},
        ),
        (
            "a.jsonl",
            ConfigError,
            "another column has this name",
            {"selection": Selection(metadata=["topic"], metadata_json=["topic"])},
        ),
        (
            "a.jsonl",
            ConfigError,
            "leave the columns out",
            {"file_format": "openai", "selection": Selection(columns=["prompt"])},
        ),
        ("a.parquet", ConfigError, "none is selected", {"selection": Selection(columns=[])}),
        ("s3://bucket/a.jsonl", ConfigError, "export writes to a file system", {}),
    ]
    for name, error, message, options in cases:
        path = name if "://" in name or name == "-" else str(tmp_path / name)
        with pytest.raises(error, match=message):
            export_run(RunReader(run), path, **options)
    with pytest.raises(OutputConflictError, match="the output of a run"):
        exported(run, run / "rows.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_and_an_existing_file_are_refused(
    run: Path, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    copy = tmp_path / "out"
    copy.mkdir()
    for path in [run / "_manifest.json", run / "part-000000.parquet"]:
        (copy / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "rows.jsonl"
    with pytest.raises(
        IncompleteError, match="3 samples of 2 rows that it holds with --allow-incomplete"
    ):
        exported(copy, path)
    done = run_gptbatch("export", copy, "--to", path, "--allow-incomplete")
    assert (done.code, done.summary["rows"], done.summary["samples"]) == (0, 2, 3)
    assert not done.summary["complete"]
    done = run_gptbatch("export", run, "--to", path)
    assert (done.code, len(lines(path))) == (78, 3)
    assert "replace it with --overwrite" in done.stderr
    done = run_gptbatch("export", run, "--to", tmp_path / "no.jsonl", "--columns", ",")
    assert (done.code, (tmp_path / "no.jsonl").exists()) == (78, False)
    assert "none is selected" in done.stderr
    done = run_gptbatch("export", run, "--to", path, "--overwrite", "--columns", "prompt_id, seed")
    assert (done.code, done.summary["columns"]) == (0, ["prompt_id", "seed"])
    assert (done.summary["samples"], done.summary["bytes"]) == (5, path.stat().st_size)


def test_a_failure_leaves_the_old_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("old")

    def fail(value: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(formats, "to_json", fail)
    with pytest.raises(KeyboardInterrupt):
        exported(run, path, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]
    assert path.read_text() == "old"


def test_row_groups_hold_many_batches(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = exported(run, tmp_path / "one.parquet")
    assert pq.read_metadata(path).num_row_groups == 1
    monkeypatch.setattr(formats, "ROW_GROUP_BYTES", 1)
    path = exported(run, tmp_path / "many.parquet")
    assert pq.read_metadata(path).num_row_groups == 2
    assert pq.read_table(path).equals(pq.read_table(tmp_path / "one.parquet"))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([None], pa.string()),
        ([[], None], pa.list_(pa.string())),
        ([[1], [2.5]], pa.list_(pa.float64())),
        ([True, None], pa.bool_()),
        ([{"a": 1}, {"b": [{"c": None}]}], None),
        ([{}], "only empty objects"),
        ([2**63], "more than 64 bits"),
        ([2**53 + 1, 0.5], "above 2\\^53"),
        ([True, 1], "true or false in row '0' and a whole number in row '1'"),
        ([{"a": [1]}, {"a": ["x"]}], r"field f.a\[\] holds a whole number .*--metadata-json f$"),
        ([float("inf")], "above all of float64"),
        ([{str(key): 1 for key in range(1001)}], "more than 1000 different keys"),
    ],
)
def test_types_of_fields(values: list[Any], kind: Any) -> None:
    def found() -> pa.DataType:
        field = FieldType("f")
        for row, value in enumerate(values):
            field.add(value, str(row))
        return field.to_arrow()

    if isinstance(kind, str):
        with pytest.raises(InputRowsError, match=kind):
            found()
        return
    assert kind in (None, found())
    assert pa.array(values, found()).null_count == values.count(None)


def test_json_has_null_for_infinity() -> None:
    assert formats.to_json({"a": [float("inf"), 1.5], "b": {"c": float("nan")}}) == (
        '{"a": [null, 1.5], "b": {"c": null}}'
    )
