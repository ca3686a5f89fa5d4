"""The command in a child process: exit codes, messages, standard output and standard error."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from gptbatch.jobs.cli import run_command
from gptbatch.jobs.group import COMMANDS, cli
from gptbatch.pipeline import JobConfig
from tests.conftest import run_fresh, run_gptbatch
from tests.launcher import Launcher
from tests.processes import LIMIT_S, child_environment, wait_for

WriteRows = Callable[..., Path]


@pytest.fixture
def in_process(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `gptbatch ARGUMENTS...` in this process, for commands that load no model."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = run_command([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


InProcess = Callable[..., tuple[int, str, str]]


def test_generate_writes_rows_and_prints_a_summary(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    path = write_rows([{"prompt": f"secret {i}"} for i in range(5)])
    command = [
        "generate",
        "--model",
        str(checkpoint),
        "--input",
        str(path),
        "--output",
        "out",
        "--max-new-tokens",
        "4",
        "--threads",
        "1",
    ]
    ran = run_gptbatch(*command, cwd=tmp_path)
    assert ran.code == 0, ran.stderr
    assert len(ran.stdout.splitlines()) == 1
    assert list(ran.summary) == [
        "output",
        "rows",
        "ok",
        "errors",
        "rows_kept",
        "complete",
        "rows_capped",
        "batch_size_halvings",
        "samples",
        "prompt_tokens",
        "completion_tokens",
        "load_s",
        "generate_s",
        "wall_s",
        "tokens_per_s",
        "device",
        "dtype",
        "batch_invariance",
        "config_hash",
    ]
    assert (
        ran.summary["output"],
        ran.summary["rows"],
        ran.summary["ok"],
        ran.summary["rows_kept"],
    ) == ("out", 5, 5, 0)
    completions = pq.read_table(tmp_path / "out" / "part-000000.parquet")["completion"].to_pylist()
    for text in ("secret", *(c for c in completions if len(c) > 3)):
        assert text not in ran.stdout + ran.stderr, "prompts and completions are never logged"
    again = run_gptbatch(*command, cwd=tmp_path)
    assert (again.code, again.summary["rows"], again.summary["rows_kept"]) == (0, 0, 5)


def test_prompts_from_standard_input(checkpoint: Path, tmp_path: Path) -> None:
    rows = b'{"prompt": "The king"}\n{"prompt": "The queen"}\n'
    settings = ["--model", str(checkpoint), "--max-new-tokens", "3"]
    ran = run_fresh("generate", *settings, "--output", tmp_path / "out", "--input", "-", stdin=rows)
    assert ran.code == 0, ran.stderr
    assert pq.read_table(tmp_path / "out" / "part-000000.parquet")["prompt"].to_pylist() == [
        "The king",
        "The queen",
    ]
    bad = run_fresh(
        "generate", *settings, "--output", tmp_path / "other", "--input", "-", stdin=b"{}\n"
    )
    assert bad.code == 65
    assert "<stdin>:1: there is no field 'prompt'" in bad.stderr


def test_generate_reads_a_dataset_split(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("question,seed\nThe king,1\nThe queen,\n")
    ran = run_gptbatch(
        *(
            "generate",
            "--model",
            checkpoint,
            "--dataset",
            tmp_path / "data",
            "--split",
            "train[:1]",
            "--prompt-field",
            "question",
        ),
        *("--output", tmp_path / "out", "--max-new-tokens", "3"),
        env={"HF_HOME": str(tmp_path / "hf")},
    )
    assert ran.code == 0, ran.stderr
    assert pq.read_table(tmp_path / "out" / "part-000000.parquet")["seed"].to_pylist() == [1]


def test_a_dry_run_loads_no_model_and_writes_nothing(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    path = write_rows(
        [{"prompt": ""}, {"prompt": "The king"}, {"prompt": "The king is dead. " * 60}]
    )
    program = (
        "import sys; from gptbatch.jobs.cli import run_command; code = run_command(sys.argv[1:]); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; sys.exit(code)"
    )
    arguments = [
        "generate",
        "--model",
        checkpoint,
        "--input",
        path,
        "--output",
        tmp_path / "out",
        "--dry-run",
    ]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["rows"], report["n_positions"], report["too_long"]) == (3, 64, 1)
    assert (
        report["prompt_tokens_min"]
        == 1
        < report["prompt_tokens_median"]
        < 64
        < report["prompt_tokens_max"]
    )
    assert (
        report["prompt_tokens"] == 1 + report["prompt_tokens_median"] + report["prompt_tokens_max"]
    )
    assert not (tmp_path / "out").exists()
    write_rows(["{}"])
    bad = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert bad.returncode == 65


def test_a_complete_output_is_recognised_without_torch(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    path = write_rows([{"prompt": "The king"}])
    arguments = [
        "generate",
        "--model",
        str(checkpoint),
        "--input",
        str(path),
        "--output",
        str(tmp_path / "out"),
        "--max-new-tokens",
        "2",
    ]
    assert run_command(arguments) == 0
    program = (
        "import sys; from gptbatch.jobs.cli import run_command; run_command(sys.argv[1:]); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows_kept"] == 1


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--seed", "-1"], 2, "--seed: input should be greater than or equal to 0, not -1"),
        (
            ["--seed", str(2**63)],
            2,
            "--seed: input should be less than or equal to 9223372036854775807",
        ),
        (["--seed", "x"], 2, "'x' is not a valid integer"),
        (
            ["--temperature", "-0.5"],
            2,
            "--temperature: input should be greater than or equal to 0, not -0.5",
        ),
        (["--temperature", "nan"], 2, "--temperature: input should be a finite number"),
        (["--temperature", "inf"], 2, "--temperature: input should be a finite number"),
        (["--top-k", "-1"], 2, "--top-k: input should be greater than or equal to 0, not -1"),
        (
            ["--max-new-tokens", "0"],
            2,
            "--max-new-tokens: input should be greater than or equal to 1",
        ),
        (["--limit", "9" * 30], 2, "--limit: input should be less than or equal to"),
        (["--batch-size", "0"], 2, "--batch-size: input should be greater than or equal to 1"),
        (["--dtype", "float64"], 2, "'float64' is not one of 'float32', 'bfloat16', 'float16'"),
        (
            ["--greedy", "--temperature", "1"],
            2,
            "--greedy and --temperature cannot be given together",
        ),
        (["--seed", "1", "--seed", "2"], 2, "--seed is given twice; it takes one value"),
        (["--ignore-eos", "--no-ignore-eos"], 2, "--ignore-eos is given twice"),
        (["--input", "a", "--input", "b"], 66, "a: no such file"),
        (["--config", "demo", "--config", "demo"], 2, "--config is given twice"),
        (["--colour"], 2, "No such option '--colour'"),
        (["--dataset", "data"], 2, "give either input or dataset, not both"),
        (["--stop-token-ids", "13,x"], 2, "'--stop-token-ids': 'x' is not a valid integer"),
        (["--row-settings", "seed,sed"], 2, "'--row-settings': 'sed' is not one of"),
        (["--include-stop-str-in-output"], 2, "include_stop_str_in_output"),
        (
            ["--config", "nowhere.yaml"],
            78,
            (
                "nowhere.yaml: no such config file, nor a bundled config "
                "(demo, gpt2-cpu, gpt2-cpu-fast, gpt2-cuda, gpt2-cuda-fast)"
            ),
        ),
        (["--model", "no/such/model"], 78, "no/such/model: no such folder"),
        (["--model", "./nothing"], 78, "./nothing: no such folder\n"),
        (["--model", "bundled:nothing"], 78, "bundled:nothing: no such folder"),
        (["--input", "nowhere.jsonl"], 66, "nowhere.jsonl: no such file"),
        (["--dtype", "float16", "--device", "cpu"], 78, "engine.dtype is float16"),
    ],
)
def test_invalid_options(
    checkpoint: Path,
    write_rows: WriteRows,
    tmp_path: Path,
    in_process: InProcess,
    options: list[str],
    code: int,
    message: str,
) -> None:
    path = write_rows([{"prompt": "The king"}])
    base = {"--model": checkpoint, "--input": path, "--output": tmp_path / "out"}
    words = [word for name, value in base.items() if name not in options for word in (name, value)]
    ended, stdout, stderr = in_process("generate", *words, *options)
    assert (ended, stdout) == (code, "")
    assert message in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "options", "code"),
    [
        # Nothing gives a required setting.
        ("top_k: 1", ["--input", "a"], 2),
        ("top_k: 1", ["--output", "o"], 2),
        # The file is wrong.
        ("top_k: -1", ["--input", "a", "--output", "o"], 78),
        ("{input: a, dataset: b}", ["--output", "o"], 78),
        ("include_stop_str_in_output: true", ["--input", "a", "--output", "o"], 78),
        # An option is wrong, alone or with the file.
        ("top_k: 1", ["--input", "a", "--output", "o", "--top-k", "-1"], 2),
        ("shard: 0/2", ["--input", "a", "--output", "o", "--overwrite"], 2),
    ],
)
def test_the_exit_code_says_whether_the_command_line_is_wrong(
    in_process: InProcess, tmp_path: Path, file: str, options: list[str], code: int
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(file)
    ended, _, stderr = in_process("generate", "--model", "m", "--config", path, *options)
    assert ended == code, stderr


def test_the_nearest_command_is_named(in_process: InProcess) -> None:
    code, _, stderr = in_process("generat", "--model", "m")
    assert (code, "no such command: 'generat'; did you mean generate?" in stderr) == (2, True)
    code, _, stderr = in_process("xyz")
    assert (code, "no such command: 'xyz'; known are generate, plan" in stderr) == (2, True)


@pytest.mark.parametrize(
    ("options", "variables", "expected"),
    [
        ([], {}, {"stop": ["x"], "stop_token_ids": [5], "allowed_token_ids": [1, 2]}),
        (["--stop", "[]"], {}, {"stop": []}),
        (["--stop", "a,b", "--stop", "c"], {}, {"stop": ["a,b", "c"]}),
        (["--stop-token-ids", "[]"], {}, {"stop_token_ids": []}),
        (
            ["--stop-token-ids", "13,198", "--stop-token-ids", "7"],
            {},
            {"stop_token_ids": [13, 198, 7]},
        ),
        (["--allowed-token-ids", "[]"], {}, {"allowed_token_ids": None}),
        (["--row-settings", "seed,n"], {}, {"row_settings": ["seed", "n"]}),
        (["--row-settings", "seed, n"], {}, {"row_settings": ["seed", "n"]}),
        ([], {"STOP_TOKEN_IDS": "13, 198"}, {"stop_token_ids": [13, 198]}),
        ([], {"STOP": "a,b"}, {"stop": ["a,b"]}),
        ([], {"STOP": "[]", "STOP_TOKEN_IDS": "[]"}, {"stop": [], "stop_token_ids": []}),
    ],
)
def test_lists_are_replaced_and_emptied(
    in_process: InProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    variables: dict[str, str],
    expected: dict[str, Any],
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("{stop: x, stop_token_ids: 5, allowed_token_ids: [1, 2]}")
    for name, value in variables.items():
        monkeypatch.setenv(f"GPTBATCH_{name}", value)
    found: list[JobConfig] = []
    monkeypatch.setattr("gptbatch.jobs.generate.inspect_job", found.append)
    base = ("--model", "m", "--input", "a", "--output", "o", "--config", path, "--dry-run")
    in_process("generate", *base, *options)
    assert {name: getattr(found[0], name) for name in expected} == expected


def test_an_empty_item_of_a_list_is_an_error(in_process: InProcess) -> None:
    """As of a variable of the shell that is not set."""
    for option in ("--stop", "--stop-token-ids", "--row-settings"):
        code, _, stderr = in_process("generate", "--model", "m", "--input", "a", option, "")
        assert code == 2
        assert f"'{option}': must not be empty; [] stands for an empty list" in stderr


def test_missing_required_settings(checkpoint: Path, in_process: InProcess, tmp_path: Path) -> None:
    code, _, stderr = in_process("generate", "--model", checkpoint)
    assert code == 2
    assert (
        "output is required: give it as an option, in the config file or as GPTBATCH_OUTPUT"
        in stderr
    )
    code, _, stderr = in_process("generate", "--model", checkpoint, "--output", tmp_path / "out")
    assert code == 2
    assert "give either input or dataset" in stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["--device", "cuda"],
            "engine.device is cuda, but torch finds no CUDA device here; use cpu or auto",
        ),
        (["--dtype", "float16"], "engine.dtype is float16, which is slow and inaccurate on a CPU"),
    ],
)
def test_cuda_without_a_gpu(
    checkpoint: Path,
    write_rows: WriteRows,
    tmp_path: Path,
    in_process: InProcess,
    settings: list[str],
    message: str,
    dry: list[str],
) -> None:
    path = write_rows([{"prompt": "The king"}])
    options = ["--model", checkpoint, "--input", path, "--output", tmp_path / "out"]
    code, _, stderr = in_process("generate", *options, *settings, *dry)
    assert code == 78
    assert message in stderr
    assert not (tmp_path / "out").exists()


BAD_ROWS: list[tuple[list[dict[str, Any] | str], str]] = [
    ([{"prompt": "a"}, '{"prompt": "b"'], ":2: not valid JSON"),
    ([{"prompt": "a"}, {"text": "b"}], ":2: there is no field 'prompt'"),
    ([{"prompt": 7}], ":1: prompt must be a string, not a number"),
    (
        [{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}],
        ":2: id 'x' was already used on line 1; ids must be unique",
    ),
    (['{"prompt": "a", "temperature": NaN}'], ":1: not valid JSON: NaN is no JSON number"),
    ([{"prompt": "a", "temperature": -1}], ":1: temperature must be 0 to 1e+300, not -1"),
    ([{"prompt": "a", "top_k": -1}], ":1: top_k must be 0 to 2147483647, not -1"),
    (
        [{"prompt": "a", "seed": 2**63}],
        ":1: seed must be 0 to 9223372036854775807, not 9223372036854775808",
    ),
]


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS)
def test_bad_rows_stop_the_run_before_anything_is_loaded(
    checkpoint: Path,
    write_rows: WriteRows,
    tmp_path: Path,
    in_process: InProcess,
    rows: list[dict[str, Any] | str],
    message: str,
) -> None:
    path = write_rows(rows)
    code, stdout, stderr = in_process(
        "generate", "--model", checkpoint, "--input", path, "--output", tmp_path / "out"
    )
    assert (code, stdout) == (65, "")
    assert f"{path}{message}" in stderr
    assert not (tmp_path / "out").exists()


def test_a_missing_split(checkpoint: Path, tmp_path: Path, in_process: InProcess) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "a"}\n')
    base = ["generate", "--model", checkpoint, "--output", tmp_path / "out"]
    code, _, stderr = in_process(*base, "--dataset", tmp_path / "data", "--split", "validation")
    assert code == 66
    assert "[validation]: there is no split 'validation'" in stderr


def test_an_output_folder_with_other_files(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path, in_process: InProcess
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    path = write_rows([{"prompt": "a"}])
    code, _, stderr = in_process(
        "generate", "--model", checkpoint, "--input", path, "--output", tmp_path / "out"
    )
    assert code == 78
    assert (
        f"{tmp_path / 'out'}: holds something that gptbatch did not write; name another output"
        in stderr
    )
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("temprature: 0.5", "there is no key 'temprature'; did you mean temperature?"),
        ("engine: {dtyp: float32}", "there is no key 'engine.dtyp'; did you mean engine.dtype?"),
        ("seed: -1", "seed: input should be greater than or equal to 0, not -1"),
        ("seed: '5'", "seed: input should be a valid integer, not '5'"),
        ("seed: true", "seed: input should be a valid integer, not True"),
        ("temperature: .nan", "temperature: input should be a finite number, not nan"),
        ("window_full: roll", "window_full: input should be 'stop' or 'slide', not 'roll'"),
        ("seed: 1\nseed: 2", "the key 'seed' stands twice"),
        ("[1, 2]", "a mapping of keys to values is needed"),
        ("a: [", "not readable as YAML"),
        ("engine: 5", "engine must be a mapping"),
        ("engine: false", "engine must be a mapping"),
        ("seed: 2001-99-99", "seed: input should be a valid integer, not '2001-99-99'"),
        ("seed: !!int abc", "not readable as YAML"),
        ("a: " + "[" * 3000, "not readable as YAML"),
    ],
)
def test_invalid_config_files(
    checkpoint: Path,
    write_rows: WriteRows,
    tmp_path: Path,
    in_process: InProcess,
    content: str,
    message: str,
) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(content)
    path = write_rows([{"prompt": "a"}])
    base = [
        "generate",
        "--config",
        config,
        "--model",
        checkpoint,
        "--input",
        path,
        "--output",
        tmp_path / "out",
    ]
    code, _, stderr = in_process(*base)
    assert code == 78
    assert str(config) in stderr
    assert message in stderr


def test_an_unexpected_error_is_a_bug_with_a_traceback(
    in_process: InProcess, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr("gptbatch.jobs.generate.load_config", lambda *args, **kwargs: 1 / 0)
    code, _, _ = in_process("generate")
    assert code == 70
    assert "this is a bug in gptbatch" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_ctrl_c_prints_how_to_continue(
    launcher: Launcher, checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    path = write_rows([{"prompt": f"{i}"} for i in range(600)])
    output = tmp_path / "out"
    child = launcher.start(
        *("generate", "--model", checkpoint, "--input", path, "--output", output),
        fault=("slow step", "0.01"),
    )
    wait_for((output / "_manifest.json").exists, "the manifest")
    child.send_signal(signal.SIGINT)
    assert child.wait() == 75
    assert "stopped by SIGINT; 0 parts are written" in child.stderr
    assert "Traceback" not in child.stderr
    assert not (output / "_SUCCESS").exists()


def test_progress_is_plain_lines_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from gptbatch.jobs import progress

    clock = iter([0.0, 1.0, 10.0, 11.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    lines = progress.Lines()
    lines.begin(100, 0)
    for rows, errors in ((1, 0), (20, 1), (30, 2)):
        lines.update(rows=rows, errors=errors, completion_tokens=rows * 50, remaining_s=40.3)
    lines.end()
    assert capfd.readouterr().err.splitlines() == [
        "20 of 100 rows, 1 error, 100 tokens/s, about 40 s left"
    ]


def test_check_model_of_an_equal_model(checkpoint: Path) -> None:
    ran = run_gptbatch("check-model", checkpoint)
    assert ran.code == 0, ran.stderr
    assert ran.summary["agree"] is True
    assert ran.summary["parameters"] == ran.summary["parameters_transformers"]
    assert 0 < ran.summary["largest_logit_difference"] < 1e-4
    assert ran.summary["greedy_tokens_equal"] == ran.summary["greedy_tokens_compared"] > 60
    assert re.search(
        r"parameters, including the LM head: gptbatch ([\d,]+), transformers \1\n", ran.stdout
    )


def test_check_model_of_a_different_model(
    checkpoint: Path, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptbatch.pipeline.model.config import GPTConfig

    monkeypatch.setattr(GPTConfig, "attention_scale", lambda self, layer: 0.3)
    code, stdout, stderr = in_process("check-model", checkpoint)
    assert code == 78
    assert json.loads(stdout.splitlines()[-1])["agree"] is False
    assert "the model of gptbatch and transformers do not agree" in stderr


def test_the_help_of_plan_names_generate_instead_of_its_settings() -> None:
    shown = CliRunner().invoke(cli, ["plan", "--help"]).output
    assert "gptbatch generate --help" in shown
    assert "--price-per-hour" in shown
    assert "--temperature" not in shown


def test_every_command_has_help() -> None:
    for name in COMMANDS:
        result = CliRunner().invoke(cli, [name, "--help"])
        assert result.exit_code == 0
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        assert command.help
        assert result.output.startswith(f"Usage: gptbatch {name}") or name in result.output
