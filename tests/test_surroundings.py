"""Paths, environments and configs as people have them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from platformdirs import user_cache_path

from jobs.cli import run_command
from pipeline.config import config_fields, environment_name, load_config
from pipeline.errors import ConfigError
from pipeline.paths import PathError, expand_path

NEEDED = {"model": "m", "input": "i", "output": "o"}
PATH_KEYS = ("model", "input", "dataset", "output")

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def gptbatch(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`gptbatch ARGUMENTS...` in this process, in an empty folder that is home too: code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(user_cache_path()))  # where the kernels are
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = run_command([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["file", "environment", "options"])
@pytest.mark.parametrize("key", PATH_KEYS)
def test_a_tilde_is_home_in_every_path_setting(key: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/users/ada")
    settings = {"model": "m", "output": "o", **({} if key == "dataset" else {"input": "i"}), key: "~/some/where"}
    (tmp_path / "job.yaml").write_text(json.dumps(settings))
    file = str(tmp_path / "job.yaml") if source == "file" else None
    environment = {environment_name(name): value for name, value in settings.items()} if source == "environment" else {}
    config = load_config(file, environment=environment, options=settings if source == "options" else {})
    assert getattr(config, key) == "/users/ada/some/where"


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
    assert expand_path("~/x", writes=True) == str(tmp_path / "home" / "x"), "an output goes home all the same"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "x").touch()
    assert expand_path("~/x") == str(tmp_path / "home" / "x")


def test_the_command_takes_home(gptbatch: Command, checkpoint: Path, tmp_path: Path) -> None:
    """In options, the config's own name and the arguments of the commands that read a run."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "prompts.jsonl").write_text('{"prompt": "The king"}\n')
    (home / "job.yaml").write_text(f"model: {checkpoint}\ninput: ~/prompts.jsonl\noutput: ~/runs/one\nmax_new_tokens: 2\n")
    code, _, stderr = gptbatch("generate", "--config", "~/job.yaml")
    assert code == 0, stderr
    assert (home / "runs" / "one" / "_SUCCESS").is_file()
    assert not (tmp_path / "~").exists()
    assert gptbatch("generate", "--config", "~/job.yaml", "--output=~/runs/two")[0] == 0
    for command in (["status", "~/runs/one"], ["diff", "~/runs/one", "~/runs/two"], ["verify", "~/runs/one"]):
        code, _, stderr = gptbatch(*command)
        assert code == 0, stderr


UNEXPANDED = ["$HOME/x", "${X}", "runs/$RUN_ID/out", "a-${X:-b}", "$(date)", "{{ ds }}", "runs/{{ds_nodash}}", "{% x %}", "%USERPROFILE%/x"]


@pytest.mark.parametrize("key", PATH_KEYS)
@pytest.mark.parametrize("text", UNEXPANDED)
def test_variables_that_nothing_expanded_are_refused(text: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = {**NEEDED, key: text} if key != "dataset" else {"model": "m", "output": "o", "dataset": text}
    with pytest.raises(ConfigError, match="which nothing has expanded") as caught:
        load_config(None, environment={}, options=options)
    assert caught.value.keys == (key,)
    assert repr(text) in str(caught.value)
    Path(text).mkdir(parents=True)
    load_config(None, environment={}, options=options)


@pytest.mark.parametrize("text", ["cost$", "100%", "50%_of_it", "a{b}", "$5", "x$", "{a}", "a$-b", "50% off 20%"])
def test_names_with_such_characters_are_names(text: str) -> None:
    assert expand_path(text) == text


URLS = [
    ("s3://bucket/run", "s3:"),
    ("S3A://bucket/run", "s3a:"),
    ("gs://bucket/run", "gs:"),
    ("file:///data/x", "give the path: /data/x"),
    ("file:/data/x", "give the path: /data/x"),
    ("dbfs:/runs/1", "/dbfs/..."),
    ("abfss://c@a.dfs.core.windows.net/x", "abfss:"),
    ("https://example.org/x.jsonl", "https:"),
    ("hf://datasets/acme/prompts", "--dataset acme/prompts"),
    ("https://huggingface.co/gpt2", "--model gpt2"),
    ("https://huggingface.co/datasets/acme/prompts/", "--dataset acme/prompts"),
    ("something+new://x", "something+new:"),
]


@pytest.mark.parametrize("key", PATH_KEYS)
@pytest.mark.parametrize(("text", "advice"), URLS)
def test_urls_are_refused_at_once(text: str, advice: str, key: str, gptbatch: Command, tmp_path: Path) -> None:
    options = {**NEEDED, key: text} if key != "dataset" else {"model": "m", "output": "o", "dataset": text}
    code, stdout, stderr = gptbatch("generate", *[word for name, value in options.items() for word in (f"--{name}", value)])
    assert (code, stdout) == (2, "")
    assert f"--{key}: {text!r} is a URL" in stderr.replace("***", "c")
    assert advice in stderr
    assert list(tmp_path.iterdir()) == []


def test_a_config_behind_a_url(gptbatch: Command) -> None:
    code, _, stderr = gptbatch("generate", "--config", "s3://bucket/job.yaml")
    assert code == 78
    assert "is a URL" in stderr


@pytest.mark.parametrize("text", ["run:1", "nightly-2026-11-27T02:55", "a::b", "c:drive", "x:/y", "mailto:you"])
def test_a_colon_makes_no_url(text: str) -> None:
    assert expand_path(text, writes=True) == expand_path(text) == text


def test_a_file_under_a_urls_name_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:" / "bucket").mkdir(parents=True)
    assert expand_path("s3://bucket") == "s3://bucket"


@pytest.mark.parametrize("text", ["a\0b", "half \ud83d of a pair"])
def test_names_that_no_file_can_have(text: str) -> None:
    with pytest.raises(PathError, match="no name that a file can have"):
        expand_path(text)


# -- environment -------------------------------------------------------------------------------------------------------

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
def test_variables_of_a_service_called_gptbatch_are_passed_over(name: str) -> None:
    assert load_config(None, environment={name: SERVICE[name]}, options=NEEDED) == load_config(None, environment={}, options=NEEDED)


def test_no_setting_is_passed_over() -> None:
    values: dict[str, Any] = {"seed": 5, "engine.threads": 3, "top_k": 7}
    environment = SERVICE | {environment_name(key): str(value) for key, value in values.items()}
    config = load_config(None, environment=environment, options=NEEDED)
    assert (config.seed, config.engine.threads, config.top_k) == (5, 3, 7)
    assert not set(SERVICE) & {environment_name(key) for key in config_fields()}


@pytest.mark.parametrize("name", [environment_name(key) for key in config_fields()])
def test_an_empty_variable_is_unset(name: str) -> None:
    assert load_config(None, environment={name: ""}, options=NEEDED) == load_config(None, environment={}, options=NEEDED)


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
    with pytest.raises(ConfigError, match=f"environment variable {name}: no such setting.*{nearest}"):
        load_config(None, environment={name: "5"}, options=NEEDED)


# -- config files ------------------------------------------------------------------------------------------------------


def _bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    return "\n".join(lines + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)])


HOSTILE = [
    ('seed: !!int ""', "a number has 1 to 100 characters, not 0"),
    ('temperature: !!float ""', "a number has 1 to 100 characters, not 0"),
    ('seed: !!int "-"', "not readable as YAML"),
    ("temperature: !!float _", "not readable as YAML"),
    ("output: !!timestamp 2001-99-99", "not readable as YAML"),
    ("output: !!timestamp x", "not readable as YAML"),
    ("seed: " + "9" * 5000, "a number has 1 to 100 characters, not 5000"),
    ("seed: 0x" + "f" * 5000, "a number has 1 to 100 characters"),
    ("seed: " + ":".join(["59"] * 3000), "a number has 1 to 100 characters"),
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
def test_hostile_configs_are_refused_at_once(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), environment={}, options=NEEDED)
    assert time.process_time() - began < 10, "seconds of this process, not of the clock; the bomb takes for ever"
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    lines = str(caught.value).splitlines()
    assert len(lines) <= 21
    assert max(map(len, lines)) < 1500


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_config_in_any_unicode(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes("prompt_field: größe\noutput: 2026-11-27\n".encode(encoding))
    config = load_config(str(path), environment={}, options={"model": "m", "input": "i"})
    assert (config.prompt_field, config.output) == ("größe", "2026-11-27")


def test_a_number_where_text_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("output: 7")
    with pytest.raises(ConfigError, match="output: input should be a valid string, not 7; quote it to make it text"):
        load_config(str(path), environment={}, options={"model": "m", "input": "i"})
