"""n samples per prompt, and rows with settings of every kind, through the command."""

from __future__ import annotations

import decimal
import hashlib
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from gptbatch.jobs.cli import run_command
from gptbatch.pipeline import JobConfig, run_job
from gptbatch.pipeline.audit.run_reader import RunReader
from gptbatch.pipeline.config import load_config
from gptbatch.pipeline.input.rows import derive_seed, sample_seed
from gptbatch.pipeline.output.schema import DETERMINISTIC_COLUMNS
from tests.launcher import Launcher
from tests.processes import wait_for

WriteRows = Callable[..., Path]
Row = dict[str, Any]


def generate(checkpoint: Path, rows: Path, output: Path, **settings: Any) -> list[Row]:
    """Run a job and return the rows of its table."""
    named = {"model": str(checkpoint), "input": str(rows), "output": str(output)}
    run_job(JobConfig.model_validate(named | {"max_new_tokens": 6, "part_rows": 4} | settings))
    return list(RunReader(output).rows())


PROMPTS: list[Row] = [{"id": f"r{i}", "prompt": "The king is " * (i % 5 + 1)} for i in range(10)]


def test_samples_of_a_prompt(checkpoint: Path, write_rows: WriteRows, tmp_path: Path) -> None:
    """The first is the row with n = 1; all have the seeds of the specification, and replay."""
    rows = write_rows(PROMPTS)
    single = generate(checkpoint, rows, tmp_path / "one")
    samples = generate(checkpoint, rows, tmp_path / "three", n=3)
    keys = [(row["prompt_id"], row["sample_index"]) for row in samples]
    assert keys == [(row["id"], index) for row in PROMPTS for index in range(3)]
    columns = [name for name in DETERMINISTIC_COLUMNS if name != "sampling_params"]
    first = [{name: row[name] for name in columns} for row in samples[::3]]
    assert first == [{name: row[name] for name in columns} for row in single]
    for row in samples:
        seed = derive_seed(0, row["prompt_id"])
        if row["sample_index"]:
            message = seed.to_bytes(8, "little") + row["sample_index"].to_bytes(4, "little")
            digest = hashlib.sha256(b"gptbatch sample seed\0" + message).digest()
            seed = int.from_bytes(digest[:8], "little") >> 1
        assert row["seed"] == seed
    assert len({tuple(row["completion_token_ids"]) for row in samples}) > 20
    # a sample is an ordinary row of its seed
    some = [
        {"id": i, "prompt": row["prompt"], "seed": row["seed"]} for i, row in enumerate(samples)
    ]
    alone = generate(checkpoint, write_rows(some), tmp_path / "alone", engine={"batch_size": 2})
    assert [row["completion"] for row in alone] == [row["completion"] for row in samples]


def test_a_part_has_about_as_many_samples_as_it_has_rows_otherwise(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = write_rows([{"prompt": "a"}] * 7)
    table = generate(checkpoint, rows, tmp_path / "out", n=200, part_rows=None, max_new_tokens=1)
    parts = sorted((tmp_path / "out").glob("part-*.parquet"))
    assert [pq.read_metadata(path).num_rows for path in parts] == [400, 400, 400, 200]
    assert len(table) == 1400


def test_seeds_of_neighbouring_samples_differ() -> None:
    """Not seed + i, by which sample 1 of seed 7 equals sample 0 of seed 8."""
    seeds = [sample_seed(seed, index) for seed in range(200) for index in range(20)]
    assert len(set(seeds)) == len(seeds)
    assert [sample_seed(seed, 0) for seed in range(200)] == list(range(200))


def test_rows_with_an_n_of_their_own(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Row] = [{**row, "n": 1 + i % 3} for i, row in enumerate(PROMPTS)]
    rows[2]["prompt"] = "king " * 300  # too long
    del rows[5]["prompt"]  # bad
    output = tmp_path / "out"
    path = write_rows(rows)
    table = generate(checkpoint, path, output, on_bad_row="record", n=2)
    counts = {row["id"]: row["n"] for row in rows}
    counts["r5"] = 2
    expected = [(name, index) for name, n in counts.items() for index in range(n)]
    assert sorted((row["prompt_id"], row["sample_index"]) for row in table) == sorted(expected)
    assert [row["prompt_index"] for row in table] == sorted(row["prompt_index"] for row in table)
    manifest = json.loads((output / "_manifest.json").read_text())
    assert (manifest["rows"], manifest["errors"]) == (10, 2)
    assert sum(part["samples"] for part in manifest["parts"]) == len(table)
    assert {row["error"] is None for row in table if row["prompt_id"] == "r2"} == {False}
    errors = (output / ".gptbatch/errors.jsonl").read_text()
    lines = [json.loads(line) for line in errors.splitlines()]
    assert [(line["id"], line.get("n", 1)) for line in lines] == [("r2", 3), ("r5", 3)]
    assert run_command(["verify", str(output), "--all"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["rows_checked"], summary["samples_checked"]) == (8, len(table) - 5)
    assert (summary["error_rows_skipped"], summary["mismatches"]) == (2, 0)
    assert run_command(["replay", str(output), "--prompt-id", "r4", "--sample", "1", "--json"]) == 0
    replayed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (replayed["equal"], replayed["sample_index"]) == (True, 1)
    assert run_command(["replay", str(output), "--prompt-id", "r4", "--sample", "7"]) == 66
    other = tmp_path / "other"
    generate(checkpoint, path, other, on_bad_row="record", n=2, engine={"batch_size": 3})
    assert run_command(["diff", str(output), str(other)]) == 0


def test_logprobs_do_not_depend_on_sampling_settings(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    """They are of the model's own logits, at every temperature (vllm#9453)."""
    token = 77
    settings: list[Row] = [
        {"temperature": 0.3},
        {"temperature": 1.7, "top_k": 3},
        {"temperature": 0},
        {"repetition_penalty": 1.5, "presence_penalty": 2.0, "top_p": 0.5},
    ]
    rows = [{"prompt": "The king", "allowed_token_ids": [token], **some} for some in settings]
    table = generate(checkpoint, write_rows(rows), tmp_path / "out", logprobs=3)
    assert [row["completion_token_ids"] for row in table] == [[token] * 6] * 4
    for name in ("token_logprobs", "top_logprob_ids", "top_logprobs", "cumulative_logprob"):
        assert all(row[name] == table[0][name] for row in table)


def test_diff_pairs_samples(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(PROMPTS)
    generate(checkpoint, rows, tmp_path / "a", n=3)
    generate(checkpoint, rows, tmp_path / "b", n=2)
    assert run_command(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["equal"], summary["missing_in_b"], summary["missing_in_a"]) == (20, 10, 0)
    assert run_command(["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--common"]) == 0
    said = capsys.readouterr().out.splitlines()[:2]
    assert said == [
        "20 samples are in both runs: all are equal",
        "10 samples are only in A, and not compared",
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"n": 2, "temperature": 0}, "n is 2, and temperature 0 gives equal samples"),
        ({"min_new_tokens": 9}, "min_new_tokens is 9, above max_new_tokens (6)"),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output needs stop"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"bad_words": ["x" * 1000] * 9}, "bad_words have 9000 bytes in all"),
        ({"stop": ["a", ""]}, "stop must not be empty"),
        ({"stop": "\ufffd"}, "stop must not hold U+FFFD"),
        ({"stop": [["a"]]}, "stop must be a string or a list of strings, not an array"),
        ({"logit_bias": {"5": 101}}, "logit_bias must be -100 to 100, not 101"),
        ({"logit_bias": {"five": 1}}, "logit_bias must have token ids as keys, not 'five'"),
        ({"logit_bias": [5]}, "logit_bias must be an object of numbers by token id"),
        ({"presence_penalty": 2.5}, "presence_penalty must be -2 to 2, not 2.5"),
        ({"repetition_penalty": 0}, "repetition_penalty must be 0.01 to 1000, not 0"),
        ({"stop": ["a"] * 65}, "stop has 65 items; at most 64 are possible"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must hold token ids from 0, not -1"),
        ({"logprobs": 21}, "logprobs must be 0 to 20, not 21"),
        ({"n": 0}, "n must be 1 to 10000, not 0"),
        ({"include_stop_str_in_output": "yes"}, "include_stop_str_in_output must be true or false"),
    ],
)
def test_bad_settings_are_refused(
    row: Row,
    message: str,
    checkpoint: Path,
    write_rows: WriteRows,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a row, before the model loads. Contradictions also between options."""
    rows = write_rows([{"prompt": "a"}, {"prompt": "b", **row}])
    arguments = ["generate", "--model", str(checkpoint), "--output", str(tmp_path / "out")]
    command = [*arguments, "--max-new-tokens", "6", "--input", str(rows)]
    assert run_command(command) == 65
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    plain = write_rows([{"prompt": "a"}])
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"max_new_tokens": 6, **row}))
    assert run_command([*arguments, "--config", str(config), "--input", str(plain)]) == 78
    name = next(iter(row))
    assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop_token_ids": [300]}, "stop_token_ids holds token 300, which the model"),
        ({"allowed_token_ids": [3, 4000]}, "allowed_token_ids holds token 4000"),
        ({"logit_bias": {"999": 1.0}}, "logit_bias holds token 999"),
    ],
)
def test_tokens_that_the_model_lacks(
    settings: Row,
    message: str,
    checkpoint: Path,
    write_rows: WriteRows,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a row it is an error row; in the config, the run is refused."""
    table = generate(
        checkpoint, write_rows([{"prompt": "a", **settings}, {"prompt": "b"}]), tmp_path / "out"
    )
    assert message in table[0]["error"]
    assert table[1]["error"] is None
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(settings))
    arguments = ["--model", str(checkpoint), "--input", str(write_rows([{"prompt": "a"}]))]
    output = tmp_path / "other"
    code = run_command(["generate", *arguments, "--config", str(config), "--output", str(output)])
    assert code == 78
    assert message in capsys.readouterr().err
    assert not output.exists()


ALL_SETTINGS: Row = {
    "repetition_penalty": 1.1,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.2,
    "no_repeat_ngram_size": 3,
    "logit_bias": {"30": 2.0, "31": -3.5},
    "allowed_token_ids": list(range(250)),
    "bad_words": ["ee", "\n"],
    "min_new_tokens": 2,
    "stop": ["a", "t"],
    "include_stop_str_in_output": True,
    "stop_token_ids": [40, 41],
    "n": 3,
    "logprobs": 2,
    "top_p": 0.95,
    "min_p": 0.001,
    "top_k": 100,
}


def test_a_run_with_every_setting_is_resumed_verified_and_compared(
    checkpoint: Path,
    write_rows: WriteRows,
    tmp_path: Path,
    launcher: Launcher,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = write_rows([{"id": f"r{i}", "prompt": "The king " * (1 + i % 3)} for i in range(24)])
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({**ALL_SETTINGS, "max_new_tokens": 12, "part_rows": 4}))
    arguments = ["generate", "--config", str(config), "--model", str(checkpoint)]
    arguments += ["--input", str(rows), "--threads", "1", "--batch-size", "4"]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert run_command([*arguments, "--output", str(undisturbed)]) == 0
    child = launcher.start(*arguments, "--output", killed, fault=("slow step", "0.02"))
    wait_for(lambda: len(list(killed.glob("part-*.parquet"))) >= 2, "2 parts")
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (killed / "_SUCCESS").exists()
    assert run_command([*arguments, "--output", str(killed)]) == 0
    tables = [
        pq.read_table(folder, columns=DETERMINISTIC_COLUMNS) for folder in (undisturbed, killed)
    ]
    assert tables[0].equals(tables[1])
    assert tables[0].num_rows == 72
    assert set(tables[0]["stop_reason"].to_pylist()) > {"stop_string", "stop_token"}
    capsys.readouterr()
    assert run_command(["verify", str(killed), "--all"]) == 0
    *_, said, summary = capsys.readouterr().out.splitlines()
    assert said.startswith("72 samples of ")
    assert json.loads(summary)["samples_checked"] == 72
    assert run_command(["diff", str(undisturbed), str(killed)]) == 0
    replay = ["replay", str(killed), "--prompt-id", "r7", "--sample", "2"]
    assert run_command([*replay, "--trace"]) == 0
    assert "equal to the recorded row" in capsys.readouterr().out
    changes = ["--no-include-stop-str-in-output", "--stop", "king", "--logit-bias", '{"5": 1}']
    assert run_command([*replay, *changes, "--json"]) == 0
    changed = json.loads(capsys.readouterr().out.splitlines()[-1])["changed"]
    assert changed["stop"] == ["king"]


def test_verify_finds_changed_logprobs_and_stop_strings(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(PROMPTS)
    for name, change in (
        ("token_logprobs", lambda values: [values[0] - 1e-3, *values[1:]]),
        ("top_logprob_ids", lambda values: [values[0] ^ 1, *values[1:]]),
        ("stop_string", lambda value: "other"),
        ("sampling_params", lambda value: '{"logit_bias":{"7":100.0},"logprobs":1}'),
    ):
        output = tmp_path / name
        generate(checkpoint, rows, output, logprobs=1, presence_penalty=1.0)
        path = output / "part-000000.parquet"
        table = pq.read_table(path)
        values = table[name].to_pylist()
        values[1] = change(values[1])
        index = table.schema.get_field_index(name)
        field = table.schema.field(name)
        changed = table.set_column(index, field, pa.array(values, field.type))
        pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)
        capsys.readouterr()
        assert run_command(["verify", str(output), "--all"]) == 1, name
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["mismatches"] == 1


def pad_vocabulary(checkpoint: Path, folder: Path, rows: int) -> Path:
    """Copy a checkpoint and give its model more tokens than its tokenizer has."""
    shutil.copytree(checkpoint, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    (name,) = [name for name in tensors if name.endswith("wte.weight")]
    padding = torch.zeros(rows, tensors[name].shape[1])
    tensors[name] = torch.cat([tensors[name], padding])
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] += rows
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_model_with_more_tokens_than_its_tokenizer(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokens without text do not disturb stop strings and bad words."""
    model = pad_vocabulary(checkpoint, tmp_path / "model", 32)
    table = generate(
        model,
        write_rows(PROMPTS),
        tmp_path / "out",
        stop=["e"],
        bad_words=["zz"],
        logit_bias={"310": 4.0, "331": 4.0},
        n=8,
        max_new_tokens=20,
    )
    stopped = [row for row in table if row["stop_reason"] == "stop_string"]
    assert any(set(row["completion_token_ids"]) & {310, 331} for row in stopped)
    assert run_command(["verify", str(tmp_path / "out"), "--all"]) == 0
    capsys.readouterr()


def test_errors_jsonl_keeps_what_a_row_says(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    """Also a value that is the default, where the run has another."""
    own = {"n": 1, "stop": [], "min_new_tokens": 0, "repetition_penalty": 1.0}
    rows = write_rows([{"id": "long", "prompt": "king " * 300, **own}])
    settings: Row = {"n": 4, "stop": ["X"], "min_new_tokens": 2, "repetition_penalty": 1.1}
    generate(checkpoint, rows, tmp_path / "out", **settings)
    (line,) = (tmp_path / "out/.gptbatch/errors.jsonl").read_text().splitlines()
    assert json.loads(line).items() >= own.items()


@pytest.mark.parametrize(
    "column",
    [
        '{"n":"x"}',
        '{"stop":[1]}',
        '{"stop":5}',
        '{"repetition_penalty":"a"}',
        '{"allowed_token_ids":["a"]}',
        '{"allowed_token_ids":[99999]}',
        '{"logprobs":1.5}',
        '{"no_repeat_ngram_size":1.5}',
        '{"bad_words":["\\ud800"]}',
        '{"logit_bias":{"5":"a"}}',
        '{"logit_bias":[1]}',
        '{"min_new_tokens":true}',
        '{"include_stop_str_in_output":"x"}',
        '{"other":1}',
        "[]",
        "{",
    ],
)
def test_damaged_settings_are_reported(
    column: str,
    checkpoint: Path,
    write_rows: WriteRows,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    generate(checkpoint, write_rows(PROMPTS[:2]), output)
    path = output / "part-000000.parquet"
    table = pq.read_table(path)
    index = table.schema.get_field_index("sampling_params")
    field = table.schema.field("sampling_params")
    changed = table.set_column(index, field, pa.array([column, None], field.type))
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)
    assert run_command(["verify", str(output), "--all"]) == 1
    assert "mismatch" in capsys.readouterr().out
    # a token that the model lacks is no damage: such a row cannot be replayed
    code = 66 if "99999" in column else 74
    assert run_command(["replay", str(output), "--prompt-id", "r0"]) == code


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--logit-bias", '{"99999": 5}'], "logit_bias holds token 99999"),
        (["--allowed-token-ids", "99999"], "allowed_token_ids holds token 99999"),
        (["--stop-token-ids", "99999"], "stop_token_ids holds token 99999"),
        (["--min-new-tokens", "500"], "min_new_tokens is 500, above max_new_tokens (6)"),
        (["--logit-bias", '{"5": 1, "5": 2}'], "should hold each token once"),
        (["--stop", "\udcff"], "must be UTF-8 text"),
        (["--bad-words", "\udcff"], "must be UTF-8 text"),
    ],
)
def test_options_of_replay_are_checked(
    options: list[str],
    message: str,
    checkpoint: Path,
    write_rows: WriteRows,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    generate(checkpoint, write_rows(PROMPTS[:1]), output)
    is_misspelt = message.startswith(("should", "must"))
    code = 2 if is_misspelt else 78
    assert run_command(["replay", str(output), "--prompt-id", "r0", *options]) == code
    assert message in capsys.readouterr().err


def test_texts_in_the_environment(checkpoint: Path) -> None:
    """A line feed is a text, and a text may begin with a bracket."""

    def config(**variables: str) -> JobConfig:
        needed = {"model": "m", "input": "i", "output": "o"}
        environment = {f"GPTBATCH_{name}": value for name, value in variables.items()}
        return load_config(None, environment=environment, options=needed)

    assert config(STOP="\n").stop == ["\n"]
    assert config(STOP="END\n", BAD_WORDS="[INST]").stop == ["END\n"]
    assert config(BAD_WORDS="[INST]").bad_words == ["[INST]"]
    assert config(STOP='["a", "\\n"]').stop == ["a", "\n"]
    assert config(STOP_TOKEN_IDS="[5, 6]", LOGIT_BIAS='{"5": 1}').stop_token_ids == [5, 6]


def test_settings_in_the_columns_of_tables(checkpoint: Path, tmp_path: Path) -> None:
    table = pa.table(
        {
            "prompt": ["a", "b"],
            "logit_bias": pa.array([[("5", 1.5)], None], pa.map_(pa.string(), pa.float64())),
            "stop": pa.array([["x", "\n"], None], pa.list_(pa.string())),
            "top_p": pa.array([decimal.Decimal("0.50"), None]),
            "n": pa.array([2.0, None]),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = generate(checkpoint, tmp_path / "rows.parquet", tmp_path / "parquet")
    assert [row["sampling_params"] for row in rows] == [
        '{"logit_bias":{"5":1.5},"stop":["x","\\n"],"n":2}'
    ] * 2 + [None]
    assert [row["top_p"] for row in rows] == [0.5, 0.5, 1.0]
    path = tmp_path / "rows.csv"
    path.write_text(
        "prompt,stop,logit_bias,stop_token_ids,include_stop_str_in_output\n"
        'a,[END],"{""5"": 1}","[7, 8]",True\n'
        'b,"[""x"", ""y""]",,,\n'
    )
    rows = generate(checkpoint, path, tmp_path / "csv", input=None, dataset=str(path))
    assert [row["sampling_params"] for row in rows] == [
        '{"logit_bias":{"5":1.0},"stop":["[END]"],"include_stop_str_in_output":true,'
        '"stop_token_ids":[7,8]}',
        '{"stop":["x","y"]}',
    ]


def test_the_recorded_config_is_the_same_job(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    """Stop strings that look like secrets are recorded as they are."""
    stop = ["https://user:secret@host/?token=abc"]
    generate(checkpoint, write_rows(PROMPTS[:1]), tmp_path / "out", stop=stop)
    recorded = load_config(str(tmp_path / "out/.gptbatch/config.yaml"), environment={}, options={})
    assert recorded.stop == stop


def test_a_bad_row_loses_nothing(checkpoint: Path, write_rows: WriteRows, tmp_path: Path) -> None:
    """It keeps its id, and its line of errors.jsonl is the row as it was, to be corrected."""
    row = {"id": "bad", "prompt": "KING:", "temperature": -1, "seed": 7, "topic": "x"}
    rows = write_rows([row, {"id": "a", "prompt": ["KING:"], "topic": "y"}])
    first, second = generate(checkpoint, rows, tmp_path / "out", on_bad_row="record")
    assert (first["prompt_id"], first["prompt"]) == ("bad", "KING:")
    assert (second["prompt_id"], second["prompt"]) == ("a", "")
    errors = (tmp_path / "out/.gptbatch/errors.jsonl").read_text()
    lines = [json.loads(line) for line in errors.splitlines()]
    assert lines[0].items() >= row.items()
    assert lines[1].items() >= {"id": "a", "prompt": ["KING:"], "topic": "y"}.items()


def test_the_input_digest_of_bad_rows_stays(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    """It is that of the rows as they were read, so that outputs of earlier versions go on."""
    rows = [
        {"id": 5, "prompt": "KING:", "temperature": -1, "seed": None, "topic": "x"},
        {"id": "a", "prompt": ["KING:"], "top_k": 3},
        {"id": "b", "prompt": "KING:"},
    ]
    generate(checkpoint, write_rows(rows), tmp_path / "out", on_bad_row="record")
    manifest = json.loads((tmp_path / "out/_manifest.json").read_text())
    digest = "9da4cf886835a46b05653e81eb67ec4a36c1ffb599cef8fe9f6eb3b523bd0755"
    assert manifest["identity"]["input_digest"] == digest


def test_corrected_rows_with_nested_fields_are_as_if_right_at_first(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    fields: Row = {"prompt_field": "p.text", "id_field": "meta.id", "on_bad_row": "record"}
    rows: list[Row] = [
        {"meta": {"id": 5, "k": 1}, "p": {"text": "KING:", "page": 2}, "seed": 3},
        {"meta": {"id": "b"}, "p": {"text": "A queen"}, "seed": 4},
    ]
    right = generate(checkpoint, write_rows(rows), tmp_path / "right", **fields)
    wrong = [rows[0] | {"seed": "x"}, rows[1] | {"p": {"text": 7}}]
    generate(checkpoint, write_rows(wrong), tmp_path / "wrong", **fields)
    lines = (tmp_path / "wrong/.gptbatch/errors.jsonl").read_text().splitlines()
    mended = [json.loads(lines[0]) | {"seed": 3}, json.loads(lines[1]) | {"p.text": "A queen"}]
    again = generate(checkpoint, write_rows(mended), tmp_path / "again", **fields)
    names = ("prompt_id", "prompt", "seed", "metadata", "completion_token_ids")
    assert [[row[name] for name in names] for row in again] == [
        [row[name] for name in names] for row in right
    ]


def test_a_bad_row_with_a_used_id_gets_another_one(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = write_rows([{"id": "b", "prompt": "KING:"}, {"id": "b", "prompt": "L", "seed": "x"}])
    _, bad = generate(checkpoint, rows, tmp_path / "out", on_bad_row="record")
    line = json.loads((tmp_path / "out/.gptbatch/errors.jsonl").read_text())
    assert bad["prompt_id"] == line["id"] == "line:2"
    assert "seed" in bad["error"]
    assert "id 'b' was already used on line 1" in bad["error"]


def test_verify_and_diff_tell_rows_from_samples(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows([{"prompt": "The king"}, {"prompt": "A queen"}])
    for name, seed in (("a", 0), ("b", 1)):
        generate(checkpoint, path, tmp_path / name, n=3, seed=seed)
    assert run_command(["verify", str(tmp_path / "a"), "--rows", "4"]) == 0
    *_, said, summary = capsys.readouterr().out.splitlines()
    assert said.startswith("4 samples of 2 rows checked, 0 mismatches")
    assert (json.loads(summary)["rows_checked"], json.loads(summary)["samples_checked"]) == (2, 4)
    # also where each of them is of another row
    assert run_command(["verify", str(tmp_path / "a"), "--rows", "2"]) == 0
    assert capsys.readouterr().out.startswith("2 samples of 2 rows checked, 0 mismatches")
    assert run_command(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    first, *rows, summary = capsys.readouterr().out.splitlines()
    assert first.startswith("6 samples are in both runs: ")
    assert any(line.startswith("row '0' sample 0: ") for line in rows)
    counts = json.loads(summary)
    assert [counts[f"{unit}_a"] for unit in ("rows", "samples")] == [2, 6]
    assert run_command(["replay", str(tmp_path / "a"), "--prompt-id", "9"]) == 66
    assert "the run has 6 samples of 2 rows" in capsys.readouterr().err
