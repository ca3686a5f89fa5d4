"""Paths, environment variables, configs, and limits of the process."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from platformdirs import user_cache_path

from gptbatch.jobs.cli import run_command
from gptbatch.jobs.failures import find_exhausted_resource, find_failed_library
from gptbatch.jobs.generate import generate
from gptbatch.jobs.group import COMMANDS, cli
from gptbatch.jobs.messages import LogFormatter, print_message
from gptbatch.jobs.options import option_groups, option_name
from gptbatch.pipeline.config import (
    JobConfig,
    config_fields,
    environment_name,
    find_config,
    load_config,
)
from gptbatch.pipeline.errors import ConfigError, ModelError
from gptbatch.pipeline.output.error_rows import describe_errors
from gptbatch.pipeline.output.lock import open_lock
from gptbatch.pipeline.output.placement import check_placement
from gptbatch.pipeline.output.progress_file import ProgressFile, read_progress
from gptbatch.pipeline.output.runs import list_runs, open_run_folder
from gptbatch.pipeline.system.machine import CpuUse
from gptbatch.pipeline.system.openmp import limit_spinning
from gptbatch.pipeline.system.paths import PathError, expand_path
from gptbatch.pipeline.system.redact import redact
from tests.launcher import Launcher
from tests.processes import LIMIT_S, child_environment

NEEDED = {"model": "m", "input": "i", "output": "o"}
PATH_KEYS = ("model", "input", "dataset", "output")

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def gptbatch(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Command:
    """Run `gptbatch ARGUMENTS...` in this process, in an empty home folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(user_cache_path()))  # where the kernels are
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = run_command([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


# -- paths -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["file", "environment", "options"])
@pytest.mark.parametrize("key", PATH_KEYS)
def test_a_tilde_is_home_in_every_path_setting(
    key: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/users/ada")
    settings = {
        "model": "m",
        "output": "o",
        **({} if key == "dataset" else {"input": "i"}),
        key: "~/some/where",
    }
    (tmp_path / "job.yaml").write_text(json.dumps(settings))
    file = str(tmp_path / "job.yaml") if source == "file" else None
    environment = (
        {environment_name(name): value for name, value in settings.items()}
        if source == "environment"
        else {}
    )
    config = load_config(
        file, environment=environment, options=settings if source == "options" else {}
    )
    assert one_path(config, key) == "/users/ada/some/where"


def one_path(config: JobConfig, key: str) -> str:
    """Return the value of a path setting; `input` is a list of one."""
    value = getattr(config, key)
    (path,) = value if isinstance(value, list) else [value]
    assert isinstance(path, str)
    return path


def test_home_of_a_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert expand_path("~root/x") == os.path.expanduser("~root") + "/x" != "~root/x"
    with pytest.raises(PathError, match="there is no user 'nobody-called-so'"):
        expand_path("~nobody-called-so/x")
    (tmp_path / "~nobody-called-so").touch()
    assert expand_path("~nobody-called-so") == "~nobody-called-so"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "x").touch()
    assert expand_path("~/x") == "~/x", "only the literal file exists"
    assert expand_path("~/x", writes=True) == str(tmp_path / "home" / "x"), (
        "an output goes home all the same"
    )
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "x").touch()
    assert expand_path("~/x") == str(tmp_path / "home" / "x")


def test_the_command_expands_a_tilde(gptbatch: Command, checkpoint: Path, tmp_path: Path) -> None:
    """In options, in --config, and in the arguments of the commands that read a run."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "prompts.jsonl").write_text('{"prompt": "The king"}\n')
    (home / "job.yaml").write_text(
        f"model: {checkpoint}\ninput: ~/prompts.jsonl\noutput: ~/runs/one\nmax_new_tokens: 2\n"
    )
    code, _, stderr = gptbatch("generate", "--config", "~/job.yaml")
    assert code == 0, stderr
    assert (home / "runs" / "one" / "_SUCCESS").is_file()
    assert not (tmp_path / "~").exists()
    assert gptbatch("generate", "--config", "~/job.yaml", "--output=~/runs/two")[0] == 0
    for command in (
        ["status", "~/runs/one"],
        ["diff", "~/runs/one", "~/runs/two"],
        ["verify", "~/runs/one"],
    ):
        code, _, stderr = gptbatch(*command)
        assert code == 0, stderr


UNEXPANDED = [
    "`date`",
    "runs/`date +%F`/x",
    "$1/out",
    "run-$2",
    "$@",
    "$HOME/x",
    "${X}",
    "runs/$RUN_ID/out",
    "a-${X:-b}",
    "$(date)",
    "{{ ds }}",
    "runs/{{ds_nodash}}",
    "{% x %}",
    "%USERPROFILE%/x",
]


@pytest.mark.parametrize("key", PATH_KEYS)
@pytest.mark.parametrize("text", UNEXPANDED)
def test_unexpanded_variables_are_rejected(
    text: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = (
        {**NEEDED, key: text}
        if key != "dataset"
        else {"model": "m", "output": "o", "dataset": text}
    )
    with pytest.raises(ConfigError, match="which nothing has expanded") as caught:
        load_config(None, environment={}, options=options)
    assert caught.value.keys == (key,)
    assert repr(text) in str(caught.value)
    Path(text).mkdir(parents=True)
    load_config(None, environment={}, options=options)


@pytest.mark.parametrize(
    "text",
    [
        "cost$",
        "100%",
        "50%_of_it",
        "a{b}",
        "x$",
        "{a}",
        "a$-b",
        "50% off 20%",
        "run-%Y-%m-%d",
        "it`s",
    ],
)
def test_file_names_with_dollar_signs_or_braces_are_accepted(text: str) -> None:
    assert expand_path(text) == text


URLS = [
    ("S3A://bucket/run", "s3a:"),
    ("s3:/bucket/run", "s3:"),
    ("file:///data/x", "give the path: /data/x"),
    ("file:/data/x", "give the path: /data/x"),
    ("dbfs:/runs/1", "/dbfs/..."),
    ("https://example.org/x.jsonl", "https:"),
    ("hf://datasets/acme/prompts", "--dataset acme/prompts"),
    ("https://huggingface.co/gpt2", "--model gpt2"),
    ("https://huggingface.co/datasets/acme/prompts/", "--dataset acme/prompts"),
    ("something+new://x", "something+new:"),
]


STORES = ["s3://bucket/run", "gs://bucket/run", "abfss://c@a.dfs.core.windows.net/x"]


@pytest.mark.parametrize(
    ("key", "text", "advice"),
    [(key, *url) for key in PATH_KEYS for url in URLS]
    + [(key, url, "which is not supported") for key in ("model", "dataset") for url in STORES],
)
def test_urls_are_rejected(
    text: str, advice: str, key: str, gptbatch: Command, tmp_path: Path
) -> None:
    options = (
        {**NEEDED, key: text}
        if key != "dataset"
        else {"model": "m", "output": "o", "dataset": text}
    )
    code, stdout, stderr = gptbatch(
        "generate", *[word for name, value in options.items() for word in (f"--{name}", value)]
    )
    assert (code, stdout) == (2, "")
    assert f"--{key}: {text!r} is a URL" in stderr.replace("***", "c")
    assert advice in stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    ["s3://bucket/a//b", "gs://bucket/../b", "s3://bucket/$OUT", "s3://b?x=1/o", "s3://b/a\tb"],
)
def test_names_of_objects_are_checked(text: str, gptbatch: Command) -> None:
    code, _, stderr = gptbatch("generate", "--model", "m", "--input", "in.jsonl", "--output", text)
    assert code == 2
    assert "--output" in stderr


def test_a_config_url_is_rejected(gptbatch: Command) -> None:
    code, _, stderr = gptbatch("generate", "--config", "s3://bucket/job.yaml")
    assert code == 78
    assert "is a URL" in stderr


@pytest.mark.parametrize(
    "text", ["run:1", "nightly-2026-11-27T02:55", "a::b", "c:drive", "x:/y", "mailto:you"]
)
def test_a_colon_makes_no_url(text: str) -> None:
    assert expand_path(text, writes=True) == expand_path(text) == text


def test_an_existing_file_with_the_name_of_a_url_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:" / "bucket").mkdir(parents=True)
    assert expand_path("s3://bucket") == "s3://bucket"


@pytest.mark.parametrize("key", PATH_KEYS)
@pytest.mark.parametrize("text", [" ", "   ", "\t", "\n"])
def test_a_blank_path_is_rejected(text: str, key: str) -> None:
    options = (
        {**NEEDED, key: text}
        if key != "dataset"
        else {"model": "m", "output": "o", "dataset": text}
    )
    with pytest.raises(ConfigError, match="is blank") as caught:
        load_config(None, environment={}, options=options)
    named = "input.0" if key == "input" else key
    assert f"{named}: {text!r}" in str(caught.value)


@pytest.mark.parametrize("text", ["a\0b", "half \ud83d of a pair"])
def test_invalid_file_names(text: str) -> None:
    with pytest.raises(PathError, match="no name that a file can have"):
        expand_path(text)


# -- environment -----------------------------------------------------------------------------------

SERVICE = {
    "GPTBATCH_SERVICE_HOST": "10.96.0.17",
    "GPTBATCH_SERVICE_PORT": "80",
    "GPTBATCH_SERVICE_PORT_METRICS": "9090",
    "GPTBATCH_PORT": "tcp://10.96.0.17:80",
    "GPTBATCH_PORT_80_TCP": "tcp://10.96.0.17:80",
    "GPTBATCH_PORT_80_TCP_PROTO": "tcp",
    "GPTBATCH_PORT_80_TCP_PORT": "80",
    "GPTBATCH_PORT_80_TCP_ADDR": "10.96.0.17",
    "GPTBATCH_WORKER_SERVICE_HOST": "fd00::1",
    "GPTBATCH_WORKER_2_PORT_8080_UDP_PORT": "8080",
    "GPTBATCH_WORKER_PORT": "udp://10.0.0.1:8080",
    "GPTBATCH_API_PORT_7_SCTP_ADDR": "10.0.0.1",
    "GPTBATCH_NAME": "/web/gptbatch",
    "GPTBATCH_DB_NAME": "/web/gptbatch_db",
    "GPTBATCH_ENV_PYTHON_VERSION": "3.11",
    "GPTBATCH_DB_ENV_LANG": "C",
}


@pytest.mark.parametrize("name", SERVICE)
def test_variables_of_a_service_called_gptbatch_are_ignored(name: str) -> None:
    assert load_config(None, environment={name: SERVICE[name]}, options=NEEDED) == load_config(
        None, environment={}, options=NEEDED
    )


def test_no_setting_is_ignored_as_a_service_variable() -> None:
    values: dict[str, Any] = {"seed": 5, "engine.threads": 3, "top_k": 7}
    environment = SERVICE | {environment_name(key): str(value) for key, value in values.items()}
    config = load_config(None, environment=environment, options=NEEDED)
    assert (config.seed, config.engine.threads, config.top_k) == (5, 3, 7)
    assert not set(SERVICE) & {environment_name(key) for key in config_fields()}


@pytest.mark.parametrize("name", [environment_name(key) for key in config_fields()])
def test_an_empty_variable_is_unset(name: str) -> None:
    assert load_config(None, environment={name: ""}, options=NEEDED) == load_config(
        None, environment={}, options=NEEDED
    )


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("GPTBATCH_SEDE", "GPTBATCH_SEED"),
        ("GPTBATCH_MODEL_NAME", "GPTBATCH_MODEL"),
        ("GPTBATCH_OUTPUT_PORT", "GPTBATCH_OUTPUT"),
        ("GPTBATCH_THREADS", "GPTBATCH_ENGINE_THREADS"),
        ("GPTBATCH_SERVICE_HOSTS", ""),
    ],
)
def test_a_typo_is_an_error_with_the_nearest_name(name: str, nearest: str) -> None:
    with pytest.raises(
        ConfigError, match=f"environment variable {name}: no such setting.*{nearest}"
    ):
        load_config(None, environment={name: "5"}, options=NEEDED)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("seed", "5", 5),
        ("temperature", "0.5", 0.5),
        ("ignore_eos", "true", True),
        ("engine.device", "cpu", "cpu"),
        ("output", "out", "out"),
        ("prompt_field", "text", "text"),
        ("skip_row", '["a"]', ["a"]),
        ("limit", "", None),
    ],
)
@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_line_ends_of_a_file_of_variables(key: str, text: str, value: Any, end: str) -> None:
    options = {name: given for name, given in NEEDED.items() if name != key}
    config = load_config(None, environment={environment_name(key): text + end}, options=options)
    assert (
        getattr(config.engine if key.startswith("engine.") else config, key.removeprefix("engine."))
        == value
    )


@pytest.mark.parametrize("key", PATH_KEYS)
@pytest.mark.parametrize("text", [" x", "x ", "\tx", "  "])
def test_blanks_around_a_path_in_the_environment(
    key: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = environment_name(key)
    with pytest.raises(ConfigError) as caught:
        load_config(None, environment={name: text}, options={})
    assert f"environment variable {name}: {text!r} begins or ends with blanks" in str(caught.value)
    (tmp_path / text).touch()
    config = load_config(None, environment={name: text}, options=_others(key))
    assert one_path(config, key) == text


def _others(key: str) -> dict[str, str]:
    return {
        name: value
        for name, value in NEEDED.items()
        if name != key and (key, name) != ("dataset", "input")
    }


# -- config files ----------------------------------------------------------------------------------


def _bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    return "\n".join(
        lines + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    )


HOSTILE = [
    ('seed: !!int ""', "a number has 1 to 100 characters, not 0"),
    ('temperature: !!float ""', "a number has 1 to 100 characters, not 0"),
    ('seed: !!int "-"', "not readable as YAML (seed: '-' is no int, line 1, column 7)"),
    (
        'top_k: 5\nengine:\n  threads: !!int "0x"',
        "not readable as YAML (threads: '0x' is no int, line 3, column 12)",
    ),
    ("skip_row: [a, !!int '+']", "not readable as YAML ('+' is no int, line 1, column 15)"),
    (
        "ignore_eos: !!bool maybe",
        "not readable as YAML (ignore_eos: 'maybe' is no bool, line 1, column 13)",
    ),
    ("temperature: !!float _", "temperature: '_' is no float, line 1, column 14"),
    ("output: !!timestamp 2001-99-99", "output: '2001-99-99' is no timestamp, line 1, column 9"),
    ("output: !!timestamp x", "output: 'x' is no timestamp, line 1, column 9"),
    (
        "seed: 010",
        (
            "seed: 010 is octal in YAML 1.1 and decimal in YAML 1.2; "
            "write 10, or quote it to make it text, line 1, column 7"
        ),
    ),
    ("output: -0_17", "output: -0_17 is octal in YAML 1.1 and decimal in YAML 1.2; write -17"),
    ("skip_row: [a, 00]", "00 is octal in YAML 1.1 and decimal in YAML 1.2; write 0, or quote it"),
    ("seed: 1:30", "seed: input should be a valid integer, not '1:30'"),
    ("temperature: 1:30.5", "temperature: input should be a valid number, not '1:30.5'"),
    (
        "batch_invariance: off",
        (
            "batch_invariance: input should be 'auto', 'require', 'portable' or 'off', not False; "
            "YAML reads off, no and false without quotes as a boolean"
        ),
    ),
    (
        "prompt_field: yes",
        "YAML reads on, yes and true without quotes as a boolean; quote the word: 'on'",
    ),
    (
        "skip_row: [a, no]",
        "skip_row.1: input should be a valid string, not False; YAML reads off, no and false",
    ),
    ("skip_row: [a, 5]", "skip_row.1: input should be a valid string, not 5; quote it"),
    ("row_settings: [seed, x]", "row_settings.1: input should be 'none', "),
    ("seed: " + "9" * 5000, "a number has 1 to 100 characters, not 5000"),
    ("seed: 0x" + "f" * 5000, "a number has 1 to 100 characters"),
    ("seed: !!int " + ":".join(["59"] * 3000), "a number has 1 to 100 characters"),
    ("skip_row: " + "[" * 200 + "]" * 200, "nested deeper than 16 levels"),
    ("skip_row: " + "{a: " * 200 + "1" + "}" * 200, "nested deeper than 16 levels"),
    (_bomb(9), "the alias *a0 in line 2 is not supported; write the value out"),
    ("skip_row: &a [*a]", "the alias *a in line 1 is not supported"),
    ("<<: {seed: 1}", "there is no key '<<'"),
    ("base: &b {seed: 1}\n<<: *b", "the alias *b in line 2 is not supported"),
    ("? [seed]\n: 1", "a key must be text"),
    ("seed: !!python/object/apply:os.getpid []", "could not determine a constructor"),
    ('seed: "\\uD83D', "not readable as YAML"),
    ("seed: \x00", "not readable as YAML"),
    ("x: " + "y" * 2**20, "more than 1024 KiB"),
    ("\n".join(f"key{n}: {n}" for n in range(20_000)), "and 19980 more"),
    ("seed: " + "x" * 100_000, "... (100002 characters)"),
]


@pytest.mark.parametrize(("text", "message"), HOSTILE, ids=[text[:20] for text, _ in HOSTILE])
def test_hostile_configs_are_rejected(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    # a parser that expands the bomb never returns
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), environment={}, options=NEEDED)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    lines = str(caught.value).splitlines()
    assert len(lines) <= 21
    assert max(map(len, lines)) < 1500


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_config_in_each_unicode_encoding(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes("prompt_field: größe\noutput: 2026-11-27\n".encode(encoding))
    config = load_config(str(path), environment={}, options={"model": "m", "input": "i"})
    assert (config.prompt_field, config.output) == ("größe", "2026-11-27")


def test_a_number_where_text_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("output: 7")
    with pytest.raises(
        ConfigError, match="output: input should be a valid string, not 7; quote it to make it text"
    ):
        load_config(str(path), environment={}, options={"model": "m", "input": "i"})


def test_yaml_words_and_times(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        "batch_invariance: 'off'\noutput: 1:30\nprompt_field: 12:30:45\n"
        "ignore_eos: yes\nseed: 0\ntop_k: 0x1f\n"
    )
    config = load_config(str(path), environment={}, options={"model": "m", "input": "i"})
    assert (config.batch_invariance, config.output, config.prompt_field, config.ignore_eos) == (
        "off",
        "1:30",
        "12:30:45",
        True,
    )
    assert (config.seed, config.top_k) == (0, 31)


def test_a_config_from_a_pipe(tmp_path: Path) -> None:
    """As `--config <(envsubst < job.yaml)` and `--config /dev/stdin` give it, and a named pipe."""
    content = b"model: m\ninput: i\noutput: o\nseed: 7\n"
    read, write = os.pipe()
    os.write(write, content)
    os.close(write)
    assert load_config(f"/dev/fd/{read}", environment={}, options={}).seed == 7
    os.close(read)
    fifo = tmp_path / "job.yaml"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=(content,))
    writer.start()
    assert load_config(str(fifo), environment={}, options={}).seed == 7
    writer.join()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".", "is a folder"),
        ("/dev", "is a folder"),
        ("/dev/zero", "more than 1024 KiB"),
        ("/dev/null", ""),
    ],
)
def test_config_paths_that_are_no_files(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config(name, environment={}, options={})
    assert message in str(caught.value)
    (tmp_path / "demo").mkdir()
    assert find_config("demo").name == "demo.yaml", "the bundled one"


# -- messages --------------------------------------------------------------------------------------

TOKEN = "hf_" + "hunTer2" * 5  # as the hub makes them: 34 letters and digits of both cases
SECRETS = [
    ("https://ada:hunter2@host/x", "https://***@host/x"),
    ("https://ada:hun/ter2@host/x", "https://***@host/x"),
    ("https://ada:hun@ter2@host/x", "https://***@host/x"),
    ("https://ada:h/u@n/t@er2@host", "https://***@host"),
    ("https:/ada:hunter2@host/x", "https:/***@host/x"),
    ("https:///ada:hunter2@host/x", "https:///***@host/x"),
    ("https://hunter2@host/x", "https://***@host/x"),
    ("https://hunter2@en:secret@host/", "https://***@host/"),
    ("ftp://a:b'hunter2@host", "ftp://***@host"),
    ("postgres://ada:h hunter2@host/db", "postgres://ada:***@host/db"),
    ("//ada:hunter2@host/share", "//***@host/share"),
    (f"'{TOKEN}'", "'***'"),
    (f"x_{TOKEN}", "x_***"),
    (f"/nowhere/{TOKEN}/x", "/nowhere/***/x"),
    ("ghp_hunter2hunter2hunter2hunter2hunter2h", "***"),
    ("github_pat_11ABC_hunter2hunter2hunter2", "***"),
    ("glpat-hunter2-hunter2_hunter2", "***"),
    ("sk-hunter2hunter2hunter2", "***"),
    ("sk-proj-Hunter2-hunter2_hunter2", "***"),
    ("eyJhunter2hunter2.eyJhunter2hunter2.hunter2hunter2", "***"),
    ("AKIAHUNTER2HUNTER2AB", "***"),
    ("https://host/x?token=hunter2&a=1", "https://host/x?token=***&a=1"),
    ("https://host/x#access_token=hunter2", "https://host/x#access_token=***"),
    ("https://host/x?sv=1&sig=hunter2%2B&se=2", "https://host/x?sv=1&sig=***&se=2"),
    (
        "https://s3/x?X-Amz-Credential=hunter2/2026&X-Amz-Signature=hunter2&X-Amz-Security-Token=hunter2",
        "https://s3/x?X-Amz-Credential=***&X-Amz-Signature=***&X-Amz-Security-Token=***",
    ),
    (
        "https://host/x?X-Goog-Signature=hunter2&X-Goog-Date=5",
        "https://host/x?X-Goog-Signature=***&X-Goog-Date=5",
    ),
    ("AccountName=x;AccountKey=hunter2==;", "AccountName=x;AccountKey=***;"),
    ("api_key=hunter2", "api_key=***"),
    ("--token=hunter2", "--token=***"),
    ("{'password': 'hun ter2', 'x': 1}", "{'password': '***', 'x': 1}"),
    ('{"client_secret": "hunter2"}', '{"client_secret": "***"}'),
    ("Authorization: Bearer hunter2hunter2", "Authorization: Bearer ***"),
    ("Authorization: Basic hunter2hunter2==", "Authorization: Basic ***"),
]


@pytest.mark.parametrize(("text", "shown"), SECRETS)
def test_secrets_are_hidden(text: str, shown: str) -> None:
    assert redact(f"{text} and more") == f"{shown} and more"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "https://host/path@v1",
            "http://host:8080/x",
            "mail ada@host.org",
            "a: b@c",
            "half_hf_ x",
            "/scratch:/teams:x/a@b/gpt2",
        ),
        *(
            "/scratch/hf_checkpoints/gpt2",
            "out/hf_datasets",
            "hf_experiments",
            "hf_transformers_checkpoints_of_november_2026",
        ),
        *(
            "sk-learn-experiments-of-the-last-week",
            "ghp_runs",
            "tokens=5",
            '"eos_token": "<|endoftext|>"',
            "key: 'value'",
        ),
    ],
)
def test_text_without_secrets_is_unchanged(text: str) -> None:
    assert redact(text) == text


LIKE_SECRETS = [
    TOKEN,
    "sk-hunter2hunter2hunter2",
    "AKIAHUNTER2HUNTER2AB",
    "run?key=5",
    "password=x y",
    "token=1",
]


@pytest.mark.parametrize("name", LIKE_SECRETS)
def test_file_names_are_not_redacted(name: str, tmp_path: Path) -> None:
    """In messages, and in the recorded settings of a run."""
    folder = tmp_path / "my files" / name
    folder.mkdir(parents=True)
    (folder / "a b").touch()
    path = str(folder / "a b")
    config = JobConfig(model=path, input=str(folder), output=path)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(config.to_yaml())
    assert load_config(str(resolved), environment={}, options={}) == config
    plain = tmp_path / name.replace(" ", "")
    plain.mkdir()
    message = f"in {plain}/x: no {plain}: '{plain}'"
    assert redact(message) == message
    plain.rmdir()
    assert "***" in redact(f"{plain} and more")


@pytest.mark.parametrize(
    "value", ["environment-token", "environment-token\n", " environment-token\r\n"]
)
@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_the_hub_token_of_the_environment_is_hidden(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert redact("get environment-token: no") == "get ***: no"


HARD = [
    ":/",
    "://",
    "://a:",
    "@:/",
    "https://a:b@",
    "x ://u:p q",
    "hf_",
    "sk-",
    "sk-a",
    "eyJ",
    "eyJaaaaaaaaaaaa.",
    "token=",
    "?key=a/",
]
HARD += [
    "'password': '",
    "a_",
    "a-",
    "a",
    "bearer ",
    "authorization: ",
    "//",
    "//a:",
    "//u:p@h ",
    "password",
    f"{TOKEN}/",
    "\0",
]


@pytest.mark.parametrize("unit", HARD)
def test_redaction_takes_linear_time(unit: str) -> None:
    """Four times the text takes four times the CPU time; a quadratic pattern takes 16 times."""
    seconds = []
    for size in (25_000, 100_000):
        text = unit * (size // len(unit))
        samples = []
        # the least of three is free of what other processes cost
        for _ in range(3):
            began = time.process_time()
            redact(text)
            samples.append(time.process_time() - began)
        seconds.append(min(samples))
    assert seconds[1] < 0.5 or seconds[1] < 9 * seconds[0]


def test_lines_of_a_message_have_a_maximum_length(capfd: pytest.CaptureFixture[str]) -> None:
    print_message("x" * 5000 + "\nshort")
    assert capfd.readouterr().err == "gptbatch: " + "x" * 4000 + "... (5000 characters)\n  short\n"


@pytest.mark.parametrize("secret", [text for text, _ in SECRETS])
@pytest.mark.parametrize(
    "option",
    ["--temperature", "--device", "--seed", "--max-row-errors", "--model", "--output", "--unknown"],
)
def test_option_errors_hide_secrets(option: str, secret: str, gptbatch: Command) -> None:
    code, stdout, stderr = gptbatch("generate", "--input", "nowhere.jsonl", option, secret)
    assert (code, stdout) == (2, "")
    assert "hunter2" not in stderr
    assert "ter2" not in stderr


CONTROL = [
    "\x1b]0;title\x07",
    "\x1b[2J",
    "\x9b2J",
    "a\ngptbatch: all is well",
    "a\rb",
    "\u202egnp.exe",
    "\x7f",
    "b\x08",
]


@pytest.mark.parametrize("text", CONTROL)
def test_control_characters_do_not_reach_the_terminal(text: str, gptbatch: Command) -> None:
    for arguments in (
        ("generate", "--model", "bundled:demo/model", "--output", "out", "--input", text),
        ("generate", "--model", text, "--output", "out", "--input", "x"),
        ("generate", "--device", text),
        ("generate", "--config", text),
        ("status", text),
        ("verify", text),
        (text,),
    ):
        code, _, stderr = gptbatch(*arguments)
        assert code in (2, 66, 78), stderr
        assert not [
            character for character in stderr if character != "\n" and not character.isprintable()
        ]
        assert not [line for line in stderr.splitlines()[1:] if line.startswith("gptbatch: ")]


def test_a_log_record_is_cleaned(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise RuntimeError("https://ada:hunter2@host \x1b[2J")
    except RuntimeError:
        record = logging.LogRecord(
            "gptbatch", logging.ERROR, "x.py", 1, "a tensor \x1b]0;x\x07", None, sys.exc_info()
        )
    shown = LogFormatter().format(record)
    assert "hunter2" not in shown
    assert "\x1b" not in shown
    assert "a tensor \\x1b]0;x\\x07" in shown
    assert all(line.startswith("  ") for line in shown.splitlines()[1:])


def test_text_from_an_output_folder_is_cleaned(
    checkpoint: Path, gptbatch: Command, tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The king"}\n')
    options = [
        "--model",
        checkpoint,
        "--input",
        "prompts.jsonl",
        "--output",
        "out",
        "--max-new-tokens",
        "2",
    ]
    assert gptbatch("generate", *options)[0] == 0
    (progress,) = (tmp_path / "out").glob(".gptbatch/runs/*/progress.json")
    progress.write_text(json.dumps(json.loads(progress.read_text()) | {"updated_at": "\x1b[2J"}))
    _, stdout, stderr = gptbatch("status", "out")
    assert "\x1b" not in stdout + stderr


@pytest.mark.parametrize(
    "option", ["--seed", "--temperature", "--device", "--on-bad-row", "--threads"]
)
def test_long_values_are_cut(option: str, gptbatch: Command) -> None:
    code, _, stderr = gptbatch("generate", option, "9" * 50_000)
    assert code == 2
    assert len(stderr) < 2000


@pytest.mark.parametrize("length", [256, 5000])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_an_output_whose_name_is_too_long(
    length: int, dry: list[str], checkpoint: Path, gptbatch: Command, tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The king"}\n')
    name = "r" * (length - 256) + "x" * 256
    code, stdout, stderr = gptbatch(
        "generate", "--model", checkpoint, "--input", "prompts.jsonl", "--output", name, *dry
    )
    assert (code, stdout) == (73, "")
    assert stderr == (
        f"gptbatch: {name[:200]}... ({len(name)} characters): cannot be created: "
        "the name is too long\n"
    )


# -- standard output, the current folder, libraries ------------------------------------------------

CLOSED = (
    "gptbatch: standard output is closed, but the result is written there; "
    "redirect it to a file or to /dev/null\n"
)
COMMAND_LINES = [
    ["status", "x"],
    ["verify", "x"],
    ["generate", "--output", "/x"],
    ["diff", "x", "y"],
    ["generate", "--help"],
]


def shell(command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a shell with this code as `gptbatch`."""
    program = f'gptbatch() {{ "{sys.executable}" -m gptbatch "$@"; }}; {command}'
    return subprocess.run(
        ["bash", "-c", program],
        cwd=cwd,
        env=child_environment(**environment),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


@pytest.mark.parametrize("arguments", COMMAND_LINES)
def test_a_deleted_current_folder(arguments: list[str], gptbatch: Command, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    try:
        assert gptbatch(*arguments) == (
            66,
            "",
            "gptbatch: the current folder no longer exists; cd elsewhere\n",
        )
    finally:
        os.chdir(tmp_path)


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("gptbatch generate --nope 2>/dev/full", 2, ""),
        ("gptbatch status nowhere 2>/dev/full", 66, ""),
        ("gptbatch generate --nope 2>&-", 2, ""),
        (
            "gptbatch generate --help >/dev/full",
            74,
            "gptbatch: standard output: cannot be written (No space left on device)\n",
        ),
        (
            "gptbatch --version >/dev/full",
            74,
            "gptbatch: standard output: cannot be written (No space left on device)\n",
        ),
        (
            "gptbatch status nowhere >&-",
            74,
            (
                "gptbatch: standard output is closed, but the result is written there; "
                "redirect it to a file or to /dev/null\n"
            ),
        ),
        ("gptbatch generate --help | true; exit ${PIPESTATUS[0]}", 74, ""),
        ("_GPTBATCH_COMPLETE=bash_source gptbatch >/dev/null", 0, ""),
        ("_GPTBATCH_COMPLETE=zsh_source gptbatch >/dev/null", 0, ""),
    ],
)
def test_standard_files_that_are_full_or_closed(
    command: str, code: int, said: str, tmp_path: Path
) -> None:
    done = shell(command, tmp_path)
    assert (done.returncode, done.stderr) == (code, said)


def test_a_lost_summary_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The king"}\n')
    line = f"gptbatch generate --model {checkpoint} --input prompts.jsonl --output out --dry-run"
    done = shell(f"{line} >/dev/full", tmp_path)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        74,
        "gptbatch: standard output: cannot be written (No space left on device)",
    )


@pytest.mark.parametrize("closed", [(), (0,), (1,), (0, 1), (1, 2), (0, 1, 2)])
def test_no_file_gets_the_descriptor_of_a_closed_standard_file(closed: tuple[int, ...]) -> None:
    program = (
        "import os; from gptbatch.jobs.cli import open_standard_files as o; o(); "
        "d = os.open('/dev/null', 0); os._exit(d if d > 2 else 100)"
    )
    command = f'exec "{sys.executable}" -c "{program}" ' + " ".join(
        f"{number}>&-" for number in closed
    )
    done = subprocess.run(
        ["bash", "-c", command],
        env=child_environment(),
        timeout=LIMIT_S,
        check=False,
    )
    assert 3 <= done.returncode < 10


LIBRARIES = [
    ("tqdm", "TQDM_MININTERVAL", "raise ValueError(\"could not convert string to float: 'abc'\")"),
    (
        "torch",
        "TORCH_LOGS",
        "raise ValueError('Invalid log settings: x\\n' + 'valid are many ' * 1000)",
    ),
    ("huggingface_hub", "HF_HUB_ETAG_TIMEOUT", "int('abc')"),
    ("pyarrow", "ARROW_DEFAULT_MEMORY_POOL", "{}['abc']"),
]


@pytest.mark.parametrize(("library", "variable", "code"), LIBRARIES)
def test_a_library_that_fails_on_import(
    library: str,
    variable: str,
    code: str,
    gptbatch: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A library that rejects an environment variable is no bug of gptbatch."""
    (tmp_path / f"{library}.py").write_text(f"def read():\n    {code}\n\n\nread()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, library, raising=False)
    monkeypatch.setenv(variable, "a\nbc")
    monkeypatch.setattr(
        "gptbatch.jobs.generate.load_config", lambda *arguments, **settings: import_module(library)
    )
    exit_code, stdout, stderr = gptbatch("generate")
    sys.modules.pop(library, None)
    assert (exit_code, stdout) == (78, "")
    assert stderr.startswith(f"gptbatch: the library {library} cannot be imported (")
    assert "; correct or unset these environment variables: " in stderr
    assert f" {variable}=a" in stderr
    assert len(stderr) < 1500
    assert "Traceback" not in stderr


def test_a_missing_or_broken_library(
    gptbatch: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "gptbatch.jobs.generate.load_config",
        lambda *arguments, **settings: import_module("nowhere_to_be_found.x"),
    )
    code, _, stderr = gptbatch("generate")
    assert code == 78
    assert "the library nowhere_to_be_found cannot be imported (ModuleNotFoundError: " in stderr
    assert "; install it again" in stderr


def test_an_error_in_gptbatch_is_reported_as_a_bug(
    gptbatch: Command, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """During an import of gptbatch too, and during a call of a library."""
    for error in (
        ImportError("cannot import name 'x'"),
        ModuleNotFoundError("No module named 'gptbatch.pipeline.x'", name="gptbatch.pipeline.x"),
    ):
        assert find_failed_library(error) is None
    monkeypatch.setattr(
        "gptbatch.jobs.generate.load_config",
        lambda *arguments, **settings: click.style("x", fg="no colour"),
    )
    assert gptbatch("generate")[0] == 70


def test_an_eof_error_is_not_reported_as_stopped(
    gptbatch: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An EOFError, which click turns into Abort, must not give exit code 75, which is retried."""

    def fail(*arguments: Any, **settings: Any) -> None:
        raise EOFError("ended before the end-of-stream marker")

    monkeypatch.setattr("gptbatch.jobs.generate.load_config", fail)
    assert gptbatch("generate")[0] == 70


# -- limits ----------------------------------------------------------------------------------------

SHORTAGES: list[tuple[BaseException, str]] = [
    (MemoryError(), "out of memory"),
    (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory"
        ),
        "out of memory",
    ),
    (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "out of memory"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
    (RuntimeError("std::bad_alloc"), "out of memory"),
    (RuntimeError("can't start new thread"), "no more threads"),
    (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "no more threads"),
    (
        Exception(
            "The global thread pool has not been initialized: "
            "ThreadPoolBuildError { kind: IOError(Os { code: 11 }) } os error 11"
        ),
        "no more",
    ),
]


@pytest.mark.parametrize(
    ("error", "message"),
    SHORTAGES,
    ids=[type(error).__name__ + str(n) for n, (error, _) in enumerate(SHORTAGES)],
)
def test_a_lack_of_memory_or_threads_is_reported(
    error: BaseException, message: str, gptbatch: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised directly, and as the cause of an error with another message."""

    def fail(*arguments: Any, **settings: Any) -> None:
        raise error

    def blame(*arguments: Any, **settings: Any) -> None:
        try:
            raise error
        except BaseException as cause:
            raise ModelError("the weights cannot be read") from cause

    for stand_in in (fail, blame):
        monkeypatch.setattr("gptbatch.jobs.generate.load_config", stand_in)
        code, _, stderr = gptbatch("generate")
        assert code == 75
        assert stderr.startswith(f"gptbatch: {message}")
        assert "Traceback" not in stderr


def test_other_errors_are_not_reported_as_a_lack_of_resources() -> None:
    for error in (
        ValueError("out of memory"),
        OSError(errno.ENOSPC, "full"),
        ModelError("out of memory"),
        RuntimeError("x"),
    ):
        assert find_exhausted_resource(error) is None


@pytest.mark.parametrize(
    ("limit_kib", "arguments"),
    [(300_000, ["status", "out"]), (1_000_000, ["verify", "out"]), (150_000, ["generate"])],
)
def test_a_small_address_space_is_reported(
    limit_kib: int, arguments: list[str], tmp_path: Path
) -> None:
    command = f'ulimit -v {limit_kib}; exec "{sys.executable}" -m gptbatch {" ".join(arguments)}'
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 78, done.stderr
    assert f"the address space is limited to {limit_kib / 2**20:.2f} GiB (ulimit -v)" in done.stderr


def test_too_few_threads_are_reported(gptbatch: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    code, _, stderr = gptbatch("status", "out")
    assert code == 75
    assert "no more threads or processes can be started" in stderr


# -- shared machines -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}),
        ({"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5", "KMP_BLOCKTIME": "1"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_openmp_threads_spin_briefly(
    before: dict[str, str], after: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    environment = dict(before)
    limit_spinning(environment)
    assert environment == after


def test_the_spin_count_is_not_set_after_torch_is_imported() -> None:
    environment: dict[str, str] = {}
    limit_spinning(environment)
    assert environment == {}


def test_the_library_sets_the_spin_count_without_heavy_imports() -> None:
    program = (
        "import sys, os, gptbatch.pipeline as pipeline; "
        "assert os.environ['GOMP_SPINCOUNT'] == '1000'; assert 'pydantic' not in sys.modules; "
        "pipeline.run_job, pipeline.JobConfig, pipeline.load_config; "
        "assert 'torch' not in sys.modules; assert 'run_job' in dir(pipeline)"
    )
    environment = {
        name: value
        for name, value in child_environment().items()
        if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        check=True,
        timeout=LIMIT_S,
    )


def test_a_run_logs_what_it_loads_and_shared_cores(
    launcher: Launcher, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The king"}\n{"prompt": "The queen"}\n')
    options: list[str | Path] = [
        "--model",
        checkpoint,
        "--input",
        tmp_path / "prompts.jsonl",
        "--max-new-tokens",
        "2",
        "--threads",
        "1",
    ]
    code, child = launcher.run("generate", *options, "--output", "out")
    assert code == 0, child.stderr
    assert (
        f"gptbatch.loading INFO: loading {checkpoint} as float32 on cpu with 1 thread for 2 rows\n"
        in child.stderr
    )


def test_status_shows_shared_cores_of_a_running_job(
    checkpoint: Path, gptbatch: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The king"}\n')
    options = [
        "--model",
        checkpoint,
        "--input",
        "prompts.jsonl",
        "--output",
        "out",
        "--max-new-tokens",
        "2",
        "--threads",
        "1",
    ]
    assert gptbatch("generate", *options)[0] == 0
    (before,) = list_runs(tmp_path / "out" / ".gptbatch")
    recorded = read_progress(before.path)
    assert recorded is not None
    assert recorded.threads == 1
    seen = []

    def describe(own_threads: int, use: CpuUse) -> str:
        seen.append((own_threads, use))
        return "other programs used 2.0 of 2 CPUs"

    monkeypatch.setattr("gptbatch.jobs.status.describe_cores", describe)
    assert "cores " not in gptbatch("status", "out")[1]
    work = tmp_path / "out" / ".gptbatch"
    (tmp_path / "out" / "_SUCCESS").unlink()
    with open_lock(work):
        assert "cores " not in gptbatch("status", "out")[1]
        with open_run_folder(work) as run:
            progress = ProgressFile(
                run.path, run.writer, rows_total=1, rows_kept=0, error_rows_kept=0
            )
            progress.threads = 3
            progress.write("running")
            shown = [gptbatch("status", "out")[1] for _ in range(2)]
    assert all("\ncores    shared: other programs used 2.0 of 2 CPUs\n" in text for text in shown)
    assert [threads for threads, _ in seen] == [3, 3]
    assert seen[0][1] is not seen[1][1]


def test_status_says_what_is_left_and_names_parts_only_where_no_run_writes_them(
    checkpoint: Path, gptbatch: Command, tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The king"}\n' * 3)
    options = ["--model", checkpoint, "--input", "prompts.jsonl", "--output", "out"]
    assert gptbatch("generate", *options, "--max-new-tokens", "2", "--part-rows", "1")[0] == 0
    (tmp_path / "out" / "part-000001.parquet").unlink()
    shown = gptbatch("status", "out")[1]
    assert "rows     2 of 3, 1 left\n" in shown
    assert "parts    2 of 3, 1 left (part 1)\n" in shown
    with open_lock(tmp_path / "out" / ".gptbatch"):
        shown = gptbatch("status", "out")[1]
        assert "parts    2 of 3, 1 left\n" in shown
        assert "missing" not in shown


# -- options ---------------------------------------------------------------------------------------


def test_the_help_of_generate_has_a_heading_for_every_option() -> None:
    shown = CliRunner().invoke(cli, ["generate", "--help"]).output
    places = [
        shown.index(f"\n{title}:\n")
        for title in (
            "Model",
            "Input",
            "Output",
            "Sampling",
            "Batch invariance",
            "Engine",
            "Run",
            "Examples",
        )
    ]
    assert places == sorted(places)
    assert set(option_groups()) == set(config_fields())
    assert all(option_groups().values())
    for key in config_fields():
        assert shown.count(f"  {option_name(key)} ") == 1, key
    for line in shown[places[-1] :].splitlines()[2:]:
        if line.strip():
            words = line.split()
            assert words[:2] == ["gptbatch", "generate"]
            generate.make_context("generate", words[2:])


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_given_twice_is_an_error_in_every_command(name: str, gptbatch: Command) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.multiple:
            words = [parameter.opts[0]] if parameter.is_flag else [parameter.opts[0], "1"]
            code, stdout, stderr = gptbatch(name, *words, *words)
            assert (code, stdout) == (2, "")
            assert f"{parameter.opts[0]} is given twice" in stderr
    assert gptbatch("generate", "--skip-row", "a", "--skip-row", "b")[0] == 2, (
        "may be given many times; what it lacks is a model"
    )


# -- error rows ------------------------------------------------------------------------------------


def test_error_rows_are_counted_at_the_end_and_in_the_dry_run(
    launcher: Launcher, checkpoint: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": "The king"}, {"prompt": "king " * 100}, {"prompt": "queen " * 100}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: list[str | Path] = [
        "--model",
        checkpoint,
        "--input",
        tmp_path / "prompts.jsonl",
        "--max-new-tokens",
        "2",
    ]
    options += ["--output", tmp_path / "out"]
    said = (
        "2 of 3 rows are errors: 2 too_long "
        "(context_overflow: truncate_left keeps the end of such prompts)"
    )
    code, child = launcher.run("generate", *options, "--dry-run")
    assert (code, child.stderr.count(said)) == (0, 1)
    code, child = launcher.run("generate", *options)
    assert (code, child.stderr.count(said)) == (0, 1)
    assert child.summary["errors"] == 2
    code, child = launcher.run(
        "generate", *options, "--context-overflow", "truncate_left", "--output", tmp_path / "other"
    )
    assert code == 2, "given twice"
    options[-1] = tmp_path / "other"
    code, child = launcher.run("generate", *options, "--context-overflow", "truncate_left")
    assert (code, "errors" in child.stderr) == (0, False)


@pytest.mark.parametrize(
    ("kinds", "rows", "said"),
    [
        ({}, 5, ""),
        ({"too_long": 0}, 5, ""),
        (
            {"not_finite": 1},
            1,
            "1 of 1 row is an error: 1 not_finite (dtype: float32 has the widest range)",
        ),
        (
            {"new_kind": 2, "empty_prompt": 1},
            9,
            "3 of 9 rows are errors: 1 empty_prompt (give them a prompt), 2 new_kind",
        ),
    ],
)
def test_the_message_about_error_rows(kinds: dict[str, int], rows: int, said: str) -> None:
    assert describe_errors(kinds, rows) == said


# -- where an output may stand ---------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"prompt": "The king"}\n')
    return folder


@pytest.mark.parametrize(
    "output", ["data", "data/out", "data/runs/../deeper/out", "link/out", "./data/../data/x"]
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_an_output_inside_its_dataset_is_rejected(
    output: str, dry: list[str], data: Path, checkpoint: Path, gptbatch: Command, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(data)
    code, stdout, stderr = gptbatch(
        "generate", "--model", checkpoint, "--dataset", "data", "--output", output, *dry
    )
    assert (code, stdout) == (78, "")
    assert f"{output}: lies inside the folder of its own dataset (data)" in stderr
    assert [path.name for path in data.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("output", ["out", "data-out", "deep/data/out"])
def test_an_output_beside_its_dataset_is_accepted(output: str, data: Path) -> None:
    check_placement(JobConfig(model="m", dataset=str(data), output=str(data.parent / output)))


@pytest.mark.parametrize(
    ("output", "warned"),
    [
        ("by-seed/seed=1", "seed=1"),
        ("temperature=0.5/top_k=40/run", "temperature=0.5, top_k=40"),
        ("SEED=3", "SEED=3"),
        ("model=gpt2/x", ""),
        ("seed-1", ""),
        ("=", ""),
    ],
)
def test_a_folder_named_like_a_column_gives_a_warning(
    output: str, warned: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_placement(JobConfig(model="m", input="i", output=str(tmp_path / output)))
    assert [
        f"folder name {warned} for a column" in record.getMessage() for record in caplog.records
    ] == ([True] if warned else [])


# -- names -----------------------------------------------------------------------------------------

LATIN = os.fsdecode(b"mod\xe8le")
NAMES = [LATIN, "run:1", "nightly-2026-11-27T02:55", "a::b", "50% [v2] {x} 'quoted\"\t"]


@pytest.mark.parametrize("name", NAMES)
def test_unusual_names_of_model_input_and_output(
    name: str, checkpoint: Path, launcher: Launcher, tmp_path: Path
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    shutil.copytree(checkpoint, folder / f"model {name}")
    (folder / f"{name}.jsonl").write_text('{"prompt": "The king"}\n{"prompt": "The queen"}\n')
    arguments = [
        "--model",
        f"model {name}",
        "--input",
        f"{name}.jsonl",
        "--output",
        name,
        "--max-new-tokens",
        "2",
        "--threads",
        "1",
    ]
    code, child = launcher.run("generate", *arguments, cwd=folder)
    assert code == 0, child.stderr
    assert "�" not in child.stderr
    code, child = launcher.run("generate", *arguments, cwd=folder)
    assert (code, child.summary["rows_kept"]) == (0, 2)
    for command in (
        ["status", name],
        ["verify", name, "--all"],
        ["replay", name, "--prompt-id", "1"],
    ):
        code, child = launcher.run(*command, cwd=folder)
        assert code == 0, child.stderr
    manifest = json.loads((folder / name / "_manifest.json").read_bytes())
    assert manifest["model"] == f"model {name}"
