"""The output of a run: the table, its footers and the folder, read by several libraries."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from gptbatch.pipeline import JobConfig, run_job
from gptbatch.pipeline.errors import InputRowsError, OutputConflictError, OutputCreationError
from gptbatch.pipeline.output.part_file import read_footer
from gptbatch.pipeline.output.schema import COLUMNS, DETERMINISTIC_COLUMNS, SCHEMA, content_digest
from gptbatch.pipeline.output.summary import RunSummary
from tests.conftest import random_model

WriteRows = Callable[..., Path]
ROWS: list[dict[str, Any]] = [
    {
        "prompt": "The king",
        "id": "a",
        "seed": 5,
        "temperature": 0.5,
        "top_k": 3,
        "max_new_tokens": 6,
        "note": 1.50,
    },
    {"prompt": ""},
    {"prompt": "To be, or not to be: that is the question. " * 40, "id": "too long"},
    {"prompt": "Long live the queen \u00e9\u4e2d"},
    {"prompt": "The king <|endoftext|>"},
    {"prompt": "dead", "max_new_tokens": 1},
    {"prompt": "question"},
]


def job(checkpoint: Path, path: Path, output: Path, **settings: Any) -> JobConfig:
    return JobConfig(
        model=str(checkpoint),
        input=str(path),
        output=str(output),
        **{"max_new_tokens": 8, **settings},
    )


def read(output: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(output.glob("part-*.parquet")))


def deterministic(output: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read(output).select(DETERMINISTIC_COLUMNS).to_pylist()
    return rows


def test_a_run_writes_every_row_once_and_in_order(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    summary = run_job(job(checkpoint, write_rows(ROWS), tmp_path / "out", part_rows=3))
    rows = deterministic(tmp_path / "out")
    assert [row["prompt_index"] for row in rows] == list(range(7))
    assert [row["prompt_id"] for row in rows] == ["a", "1", "too long", "3", "4", "5", "6"]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in ROWS]
    first, empty, long = rows[:3]
    assert (first["seed"], first["temperature"], first["top_k"], first["max_new_tokens"]) == (
        5,
        0.5,
        3,
        6,
    )
    assert first["metadata"] == '{"note": 1.5}'
    assert (empty["prompt_tokens"], empty["metadata"], empty["error"]) == (1, None, None)
    assert long["finish_reason"] == "error"
    assert (
        long["error"]
        == f"the prompt has {long['prompt_tokens']} tokens, more than n_positions (64)"
    )
    assert (
        long["completion"],
        long["completion_token_ids"],
        long["completion_tokens"],
        long["stop_reason"],
    ) == (None, [], 0, None)
    for row in rows:
        assert row["completion_tokens"] == len(row["completion_token_ids"]) <= row["max_new_tokens"]
        if row["finish_reason"] != "error":
            assert row["stop_reason"] == (
                "end_of_text" if row["finish_reason"] == "stop" else "max_new_tokens"
            )
            assert (row["completion_token_ids"][-1] == 0) == (row["finish_reason"] == "stop")
            assert "<|endoftext|>" not in row["completion"]
    assert (summary.rows, summary.ok, summary.errors, summary.rows_kept) == (7, 6, 1, 0)
    assert summary.completion_tokens == sum(row["completion_tokens"] for row in rows)
    assert summary.prompt_tokens == sum(row["prompt_tokens"] for row in rows)


def test_the_parts_have_the_schema_and_its_metadata(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    run_job(job(checkpoint, write_rows(ROWS), tmp_path / "out", part_rows=3))
    for path in sorted((tmp_path / "out").glob("part-*.parquet")):
        schema = pq.read_schema(path)
        assert schema.remove_metadata().equals(SCHEMA.remove_metadata())
        for column in COLUMNS:
            field = schema.field(column.name)
            assert field.metadata[b"kind"] == column.kind.encode()
            assert field.metadata[b"meaning"] == column.meaning.encode()
            assert field.metadata[b"unit"] == column.unit.encode()
            assert field.nullable == column.nullable


def test_timings_add_up_per_row(checkpoint: Path, write_rows: WriteRows, tmp_path: Path) -> None:
    run_job(job(checkpoint, write_rows(ROWS), tmp_path / "out"))
    for row in read(tmp_path / "out").to_pylist():
        observed = [row[column.name] for column in COLUMNS if column.kind == "observed"]
        if row["finish_reason"] == "error":
            assert observed == [None] * len(observed)
            continue
        assert row["total_s"] == pytest.approx(row["queue_s"] + row["prefill_s"] + row["decode_s"])
        assert row["time_to_first_token_s"] == pytest.approx(row["queue_s"] + row["prefill_s"])
        assert min(row["queue_s"], row["prefill_s"]) > 0
        assert 1 <= row["mean_batch_size"] <= 6
        assert row["started_at"].tzinfo is not None
        assert 0 <= row["cached_tokens"] < max(1, row["prompt_tokens"])
        if row["completion_tokens"] > 1:
            assert row["tokens_per_s"] == pytest.approx(
                (row["completion_tokens"] - 1) / row["decode_s"]
            )
        else:
            assert row["tokens_per_s"] is None


def test_footers_and_manifest_record_the_run(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    summary = run_job(job(checkpoint, write_rows(ROWS), output, part_rows=3))
    manifest = json.loads((output / "_manifest.json").read_text())
    assert (output / "_SUCCESS").is_file()
    assert manifest["complete"] is True
    assert (manifest["rows"], manifest["errors"]) == (7, 1)
    assert [part["name"] for part in manifest["parts"]] == [
        "part-000000.parquet",
        "part-000001.parquet",
        "part-000002.parquet",
    ]
    for part, first, rows in zip(manifest["parts"], (0, 3, 6), (3, 3, 1), strict=True):
        footer = read_footer(output / part["name"])
        assert footer is not None
        assert (
            (footer["first_row"], footer["rows"])
            == (part["first_row"], part["rows"])
            == (first, rows)
        )
        assert (
            footer["content_digest"]
            == part["content_digest"]
            == content_digest(pq.read_table(output / part["name"]))
        )
        assert footer["config_hash"] == manifest["config_hash"] == summary.config_hash
        for key in (
            "model",
            "model_digest",
            "tokenizer_digest",
            "input_digest",
            "dtype",
            "device",
            "environment",
            "versions",
            "batch_invariance",
        ):
            assert footer[key] == manifest[key]
        assert footer["environment"].keys() >= {
            "attention",
            "linears",
            "torch",
            "device_class",
            "noise_version",
        }
        assert footer["versions"]["torch"]
    names = {path.name for path in output.iterdir()}
    assert names == {
        "part-000000.parquet",
        "part-000001.parquet",
        "part-000002.parquet",
        "_manifest.json",
        "_SUCCESS",
        ".gptbatch",
    }
    work = {path.name for path in (output / ".gptbatch").iterdir()}
    assert work == {
        "config.yaml",
        "digests.json",
        "errors.jsonl",
        "input_index.parquet",
        "lock",
        "runs",
    }
    (run_folder,) = (output / ".gptbatch" / "runs").iterdir()
    assert {path.name for path in run_folder.iterdir()} == {
        "lock",
        "progress.json",
        "records.jsonl",
    }


def test_parts_have_checksums(checkpoint: Path, write_rows: WriteRows, tmp_path: Path) -> None:
    run_job(job(checkpoint, write_rows(ROWS), tmp_path / "out"))
    path = tmp_path / "out" / "part-000000.parquet"
    column = pq.read_metadata(path).row_group(0).column(DETERMINISTIC_COLUMNS.index("prompt"))
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises((OSError, pa.ArrowException)):
        pq.read_table(path, page_checksum_verification=True)


def test_equal_jobs_give_equal_rows(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = [{"prompt": f"The king {i}"} for i in range(40)]
    path = write_rows(rows)
    digests = []
    for name, settings in (
        ("a", {}),
        ("b", {}),
        ("c", {"batch_size": 3}),
        ("other seed", {"seed": 1}),
    ):
        batch_size = settings.pop("batch_size", 64)
        run_job(
            job(
                checkpoint,
                path,
                tmp_path / name,
                part_rows=40,
                engine={"batch_size": batch_size},
                **settings,
            )
        )
        digests.append(content_digest(read(tmp_path / name)))
    assert digests[0] == digests[1] == digests[2] != digests[3]
    tokens = [row["completion_token_ids"] for row in deterministic(tmp_path / "a")]
    other = [row["completion_token_ids"] for row in deterministic(tmp_path / "other seed")]
    assert sum(a != b for a, b in zip(tokens, other, strict=True)) > 30


def test_rows_with_equal_seeds_share_noise(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "The king", "seed": 9},
        {"prompt": "The king", "seed": 9},
        {"prompt": "The king"},
        {"prompt": "The king"},
    ]
    run_job(job(checkpoint, write_rows(rows), tmp_path / "out"))
    a, b, c, d = (row["completion_token_ids"] for row in deterministic(tmp_path / "out"))
    assert a == b
    assert len({tuple(a), tuple(c), tuple(d)}) == 3


def test_special_tokens_are_plain_text_without_parse_special(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    path = write_rows([{"prompt": "a<|endoftext|>b"}])
    run_job(job(checkpoint, path, tmp_path / "plain"))
    run_job(job(checkpoint, path, tmp_path / "special", parse_special=True))
    plain, special = deterministic(tmp_path / "plain")[0], deterministic(tmp_path / "special")[0]
    assert special["prompt_tokens"] == 3 < plain["prompt_tokens"]


def test_truncate_left_drops_the_front_of_long_prompts(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    text = "The king is dead. Long live the king, and the queen. " * 12
    rows = [{"prompt": text, "max_new_tokens": n} for n in (8, 1, 1000)] + [
        {"prompt": "The king", "max_new_tokens": 8}
    ]
    run_job(
        job(
            checkpoint,
            write_rows(rows),
            tmp_path / "out",
            context_overflow="truncate_left",
            ignore_eos=True,
            temperature=0.0,
        )
    )
    some, one, many, short = deterministic(tmp_path / "out")
    total = some["prompt_tokens"] + some["prompt_tokens_dropped"]
    assert total > 64
    assert [row["prompt_tokens"] for row in (some, one, many)] == [64 - 8 + 1, 64, 1]
    assert [row["completion_tokens"] for row in (some, one, many)] == [8, 1, 64]
    assert [row["stop_reason"] for row in (some, one, many)] == [
        "max_new_tokens",
        "max_new_tokens",
        "window",
    ]
    assert short["prompt_tokens_dropped"] == 0
    assert all(row["prompt"] == text for row in (some, one, many))


@pytest.mark.parametrize("rows", [0, 4, 12], ids=["no rows", "one part", "three parts"])
def test_pandas_polars_duckdb_and_datasets_read_the_output(
    checkpoint: Path,
    write_rows: WriteRows,
    tmp_path: Path,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    output = tmp_path / "out"
    run_job(
        job(
            checkpoint,
            write_rows([{"prompt": f"row {i}"} for i in range(rows)]),
            output,
            part_rows=4,
        )
    )
    assert len(list(output.glob("part-*.parquet"))) == max(1, rows // 4)
    expected = [str(i) for i in range(rows)]
    columns = [column.name for column in COLUMNS]

    frame = pd.read_parquet(output)
    assert list(frame.columns) == columns
    assert sorted(frame["prompt_id"], key=int) == expected
    assert all(isinstance(ids, np.ndarray) for ids in frame["completion_token_ids"])

    lazy = pl.read_parquet(f"{output}/part-*.parquet")
    assert lazy.columns == columns
    assert lazy["prompt_id"].to_list() == expected

    relation = duckdb.sql(
        f"SELECT prompt_id, completion FROM '{output}/part-*.parquet' ORDER BY prompt_index"
    )
    assert relation is not None
    found = relation.fetchall()
    assert [prompt_id for prompt_id, _ in found] == expected

    # the library streams a split without rows, but does not load one (huggingface/datasets pull
    # request 8401)
    dataset = datasets.load_dataset(str(output), split="train", streaming=rows == 0)
    assert dataset.column_names == columns
    assert [row["prompt_id"] for row in dataset] == expected


# -- the folder ------------------------------------------------------------------------------------


def run(checkpoint: Path, path: Path, output: Path, **settings: Any) -> RunSummary:
    return run_job(job(checkpoint, path, output, **settings))


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """All files but digests.json, which only saves time, and the lock."""
    files = [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("digests.json", "lock")
    ]
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in files
    }


def test_a_complete_output_is_not_written_again(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    path, output = write_rows(ROWS), tmp_path / "out"
    first = run(checkpoint, path, output)
    before = snapshot(output)
    again = run(checkpoint, path, output)
    assert (again.rows, again.rows_kept, again.completion_tokens) == (0, 7, 0)
    assert again.config_hash == first.config_hash
    assert snapshot(output) == before


def damage_part(path: Path, damage: str) -> None:
    """Each kind of damage sets the file's times as a tool that copies files does."""
    content = bytearray(path.read_bytes())
    match damage:
        case "missing":
            path.unlink()
            return
        case "emptied":
            content.clear()
        case "truncated":
            del content[len(content) // 2 :]
        case "no footer":
            del content[-40:]
        case "a bit of a page":
            column = (
                pq.read_metadata(path).row_group(0).column(DETERMINISTIC_COLUMNS.index("prompt"))
            )
            content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
        case "another row":
            table = pq.read_table(path)
            changed = table.set_column(
                0, table.schema.field(0), pa.array(["mine"] * table.num_rows)
            )
            pq.write_table(changed, path)
            return
        case "a part of other rows":
            content = bytearray((path.parent / "part-000000.parquet").read_bytes())
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    "damage",
    [
        "missing",
        "emptied",
        "truncated",
        "no footer",
        "a bit of a page",
        "another row",
        "a part of other rows",
    ],
)
def test_a_lost_part_is_generated_again(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path, damage: str
) -> None:
    path, output = write_rows(ROWS), tmp_path / "out"
    run(checkpoint, path, output, part_rows=3)
    expected = deterministic(output)
    lost = output / "part-000001.parquet"
    before = {
        path: path.stat().st_mtime_ns for path in output.glob("part-*.parquet") if path != lost
    }
    damage_part(lost, damage)
    again = run(checkpoint, path, output)
    assert (again.rows, again.rows_kept) == (3, 4)
    assert deterministic(output) == expected
    assert {path: path.stat().st_mtime_ns for path in before} == before, (
        "the other parts are left as they are"
    )
    assert run(checkpoint, path, output).rows == 0


def test_an_input_that_changes_while_it_is_read_never_succeeds(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    class Meddler:
        def begin(self, total_rows: int, done_rows: int) -> None:
            write_rows([{"prompt": "another"}] * 7)

        def update(self, **counts: float | None) -> None:
            pass

        def end(self) -> None:
            pass

    with pytest.raises(InputRowsError, match="the input has changed since it was checked"):
        run_job(job(checkpoint, write_rows([{"prompt": "one"}] * 7), tmp_path / "out"), Meddler())
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_an_incomplete_output_is_continued(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    path, output = write_rows(ROWS), tmp_path / "out"
    run(checkpoint, path, output, part_rows=3)
    expected = deterministic(output)
    (output / "_SUCCESS").unlink()
    (output / "part-000001.parquet").unlink()
    assert run(checkpoint, path, output, part_rows=3).rows == 3
    assert deterministic(output) == expected
    assert (output / "_SUCCESS").is_file()


@pytest.mark.parametrize(
    ("settings", "differs"),
    [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"temperature": 0.5}, "temperature: 1.0 there, 0.5 here"),
        ({"ignore_eos": True}, "ignore_eos: false there, true here"),
        ({"window_full": "slide"}, 'window_full: "stop" there, "slide" here'),
        ({"part_rows": 5}, "part_rows: 512 there, 5 here"),
        ({"record_logits_digest": True}, "record_logits_digest: false there, true here"),
        ({"engine": {"dtype": "bfloat16"}}, 'dtype: "float32" there, "bfloat16" here'),
        ({"engine": {"cache_dtype": "int8"}}, 'cache_dtype: "auto" there, "int8" here'),
        (
            {"stop": ["the end"], "seed": 2, "part_rows": 5},
            'seed: 0 there, 2 here; stop: [] there, ["the end"] here; part_rows: 512 there, 5 here',
        ),
    ],
)
def test_another_job_is_refused_and_changes_nothing(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path, settings: dict[str, Any], differs: str
) -> None:
    path, output = write_rows(ROWS), tmp_path / "out"
    run(checkpoint, path, output)
    before = snapshot(output)
    with pytest.raises(OutputConflictError) as caught:
        run(checkpoint, path, output, **settings)
    assert f"another job ({differs}); name" in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert snapshot(output) == before


def test_overwrite_replaces_only_files_of_gptbatch(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    path, output = write_rows(ROWS), tmp_path / "out"
    run(checkpoint, path, output, part_rows=2)
    foreign = {"notes.txt": b"mine", "other.csv": b"mine too"}
    for name, content in foreign.items():
        (output / name).write_bytes(content)
    run(checkpoint, path, output, part_rows=4, overwrite=True, seed=1)
    assert {name: (output / name).read_bytes() for name in foreign} == foreign
    assert [row["prompt_index"] for row in deterministic(output)] == list(range(7))


def test_a_folder_with_other_files_is_refused(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    path, output = write_rows(ROWS), tmp_path / "out"
    output.mkdir()
    for name, content in (
        ("notes.txt", "mine"),
        ("_manifest.json", '{"format": "another"}'),
        ("_manifest.json", "{"),
    ):
        (output / name).write_text(content)
        for settings in ({}, {"overwrite": True}):
            with pytest.raises(
                OutputConflictError,
                match=r"holds something that gptbatch did not write|_manifest\.json: damaged",
            ):
                run(checkpoint, path, output, **settings)
        assert [p.name for p in output.iterdir()] == [name]
        (output / name).unlink()
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(OutputConflictError, match="exists and is not a folder"):
        run(checkpoint, path, file)
    with pytest.raises((OutputCreationError, OutputConflictError)):
        run(checkpoint, path, file / "below")
    assert file.read_text() == "mine"


def test_an_empty_folder_is_accepted(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    assert run(checkpoint, write_rows(ROWS), tmp_path / "out").rows == 7


def test_a_token_beyond_the_vocabulary_is_an_error_row(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    """A padding token beyond the vocabulary is an error only in a prompt that holds it."""
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_special_tokens(["[PAD]"])
    assert tokenizer.token_to_id("[PAD]") == tokenizer.get_vocab_size() - 1
    config = json.loads((model / "config.json").read_text())
    vocab_size = tokenizer.get_vocab_size() - 1
    tokenizer.save(str(model / "tokenizer.json"))
    random_model(
        vocab_size=vocab_size, **{key: config[key] for key in ("n_layer", "n_head", "n_embd")}
    ).save_pretrained(model)
    path = write_rows([{"prompt": "The king"}, {"prompt": "The [PAD] king"}])
    run_job(job(model, path, tmp_path / "plain"))
    assert [row["error"] for row in deterministic(tmp_path / "plain")] == [None, None]
    run_job(job(model, path, tmp_path / "special", parse_special=True))
    fine, wrong = deterministic(tmp_path / "special")
    assert fine["error"] is None
    assert wrong["error"] == (
        f"the prompt holds token {vocab_size}, which the model "
        f"(vocab_size {vocab_size}) does not have"
    )


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_run_on_cuda(checkpoint: Path, write_rows: WriteRows, tmp_path: Path, dtype: str) -> None:
    path = write_rows([{"prompt": f"The king {i}"} for i in range(30)])
    engine = {"device": "cuda", "dtype": dtype, "batch_size": 8}
    for name in ("a", "b"):
        summary = run(checkpoint, path, tmp_path / name, engine=engine)
        assert (summary.ok, summary.device, summary.dtype) == (30, "cuda", dtype)
    assert deterministic(tmp_path / "a") == deterministic(tmp_path / "b")
