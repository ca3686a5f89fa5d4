"""Prompts from columns: templates, messages of chats, settings of rows, and requests of OpenAI."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptbatch.jobs.cli import run_command
from gptbatch.pipeline import JobConfig, inspect_job, run_job
from gptbatch.pipeline.audit.run_reader import RunReader
from gptbatch.pipeline.config import EngineConfig, load_config
from gptbatch.pipeline.config.prompt_template import TemplateError, parse_template
from gptbatch.pipeline.errors import ConfigError, InputRowsError, ModelError, OutputConflictError
from gptbatch.pipeline.input.chat_template import check_chat_template
from gptbatch.pipeline.input.config_hash import job_identity
from gptbatch.pipeline.input.fields import OPENAI_TO_ROWS
from gptbatch.pipeline.input.open_input import open_input
from gptbatch.pipeline.input.tokenize import prompt_tokenizer
from gptbatch.pipeline.input.tokenizer import EncodedText, PromptTokenizer
from gptbatch.pipeline.input.tokenizer_loading import load_tokenizer
from gptbatch.pipeline.model.checkpoint import find_checkpoint
from gptbatch.pipeline.params.settings import SAMPLING_SETTINGS
from gptbatch.pipeline.types import Prompt
from tests.paths import REPOSITORY
from tests.test_random_tokenizers import auto_tokenizer

END_OF_TEXT = "<|endoftext|>"
DIALOGPT = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
NEEDED: dict[str, Any] = {"model": "m", "input": "i", "output": "o"}
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Command:
    """Run `gptbatch ARGUMENTS...` in tmp_path; return exit code, output, and messages and log."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, "model")

    def run(name: str, *arguments: str | Path) -> tuple[int, str, str]:
        settings = ["--model", "model", "--max-new-tokens", "3", "--attention", "padded"]
        settings += ["--batch-invariance", "off", "--threads", "1"]
        capfd.readouterr()
        caplog.clear()
        words = [name, *(settings if name == "generate" else []), *map(str, arguments)]
        code = run_command(words)
        captured = capfd.readouterr()
        return code, captured.out, captured.err + caplog.text

    return run


def write_lines(path: Path, *rows: Any) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def job(folder: Path, *rows: Any, model: Path | None = None, **settings: Any) -> JobConfig:
    """Return a job over rows; over an existing dataset where there are no rows."""
    values: dict[str, Any] = {
        "model": str(model or "model"),
        "output": str(folder / "out"),
        "max_new_tokens": 3,
        "batch_invariance": "off",
        "engine": EngineConfig(attention="padded", threads=1),
    }
    if rows:
        values["input"] = str(write_lines(folder / "rows.jsonl", *rows))
    return JobConfig.model_validate(values | settings)


def read(config: JobConfig) -> list[Prompt]:
    reader = open_input(config)
    return [row for row in reader.prompts(reader.check()) if isinstance(row, Prompt)]


def texts(config: JobConfig) -> list[str]:
    return [prompt.text for prompt in read(config)]


def problem(config: JobConfig) -> str:
    with pytest.raises(InputRowsError) as caught:
        open_input(config).check()
    return str(caught.value)


def outputs(output: Path | str) -> list[dict[str, Any]]:
    return list(RunReader(Path(output)).rows())


# -- templates -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        ("Q: {question}\nA:", [("Q: ", "question"), ("\nA:", None)]),
        ("{a}{b.c}{turns.0}", [("", "a"), ("", "b.c"), ("", "turns.0")]),
        ('{{"x": {First Name}}}', [("{", None), ('"x": ', "First Name"), ("}", None)]),
        ("{0}", [("", "0")]),
        ("{__index_level_0__}", [("", "__index_level_0__")]),
        ("{größe}", [("", "größe")]),
    ],
)
def test_a_template_is_text_with_names_of_fields(template: str, parts: list[Any]) -> None:
    assert parse_template(template) == parts


HOSTILE = {
    "{x.__class__}": "holds {x.__class__}; __class__ is an attribute of Python objects",
    "{x.a.__init__.__globals__}": "__init__ is an attribute",
    "{}": "holds {}, which names no field; write {question}",
    "{!r}": "holds {!r}, which names no field",
    "{x!r}": "holds {x!r}; conversions are not supported, write {x}",
    "{x:>10}": "holds {x:>10}; formats are not supported, write {x}",
    "{x:{y}}": "holds {x:{y}}; formats are not supported, write {x}",
    "{x:}": "holds a field with an empty format; remove its colon",
    "{x[0]}": "holds {x[0]}; write {x.0}",
    "{x['a'][b]}": "holds {x['a'][b]}; write {x.a.b}",
    "{": "has malformed braces",
    "}": "has malformed braces",
    "Q: {x": "has malformed braces",
    "{x}}": "has malformed braces",
    "{{x}": "has malformed braces",
    "{a{b}}": "has malformed braces",
    "{x!}": "has malformed braces",
    "no field": "names no field; write the name of a field in braces: {question}",
    "{{question}}": "names no field",
    "": "names no field",
    "{x}\udcff": "is not UTF-8 text",
}


@pytest.mark.parametrize("template", HOSTILE)
def test_hostile_templates_are_refused_when_the_config_is_read(template: str) -> None:
    with pytest.raises(TemplateError, match=re.escape(HOSTILE[template])):
        parse_template(template)
    with pytest.raises(ConfigError) as caught:
        load_config(None, environment={}, options={**NEEDED, "prompt_template": template})
    assert HOSTILE[template] in str(caught.value)
    assert caught.value.keys == ("prompt_template",)


def test_the_command_names_the_option_of_a_bad_template(command: Command) -> None:
    code, _, said = command(
        "generate", "--input", "rows.jsonl", "--output", "out", "--prompt-template", "Q: {x!r}"
    )
    assert code == 2
    assert "--prompt-template: 'Q: {x!r}' holds {x!r}; conversions are not supported" in said


@pytest.mark.parametrize(
    ("row", "template", "text"),
    [
        ('{"a": "x", "b": "y"}', "{b}-{a}-{b}", "y-x-y"),
        ('{"a": "{b} {{c}} {a.__class__}", "b": "no"}', "<{a}>", "<{b} {{c}} {a.__class__}>"),
        ('{"a": "x"}', '{{"a": "{a}"}}', '{"a": "x"}'),
        ('{"a": ""}', "<{a}>", "<>"),
        ('{"a": "\\n\\u0000\\u20ac"}', "{a}", "\n\x00€"),
        ('{"a": 1e5}', "{a}", "1e5"),
        ('{"a": 1.0}', "{a}", "1.0"),
        ('{"a": 1.10}', "{a}", "1.10"),
        ('{"a": -0}', "{a}", "-0"),
        ('{"a": 1e999}', "{a}", "1e999"),
        ('{"a": 123456789012345678901234567890}', "{a}", "123456789012345678901234567890"),
        ('{"a": true, "b": false}', "{a} {b}", "true false"),
        ('{"a": {"b": {"c": "x"}}}', "{a.b.c}", "x"),
        ('{"a": ["x", {"b": 2}]}', "{a.0} {a.1.b}", "x 2"),
        ('{"a.b": "key", "a": {"b": "path"}}', "{a.b}", "key"),
        ('{"0": "x", "1": "y"}', "{1}{0}", "yx"),
        ('{"id": 7, "temperature": 0.50, "a": "x"}', "{id} {temperature} {a}", "7 0.50 x"),
        ('{"prompt": "KING:"}', "{prompt}\n", "KING:\n"),
    ],
)
def test_values_are_inserted_as_the_input_has_them(
    tmp_path: Path, row: str, template: str, text: str
) -> None:
    assert texts(job(tmp_path, row, prompt_template=template)) == [text]


@pytest.mark.parametrize(
    ("row", "template", "reason"),
    [
        (
            {"question": "x", "answer": "y"},
            "{frage}",
            "there is no field 'frage', which prompt_template names; the row has 'question', "
            "'answer' (prompt_template names the one to use)",
        ),
        ({"Question": "x"}, "{question}", "(write {Question})"),
        ({" question": "x"}, "{question}", "(write { question})"),
        ({"row": {"question": "x"}}, "{question}", "({row.question} takes the text inside)"),
        ({"a": "text"}, "{a.b}", "there is no field 'a.b'"),
        ({"a": ["x"]}, "{a.1}", "there is no field 'a.1'"),
        ({"a": ["x"]}, "{a.-1}", "there is no field 'a.-1'"),
        ({"a": None}, "{a}", "a, which prompt_template names, must be a string, a number, "),
        ({"a": ["x"]}, "{a}", "true or false, not an array"),
        ({"a": {"text": "x"}}, "{a}", "not an object ({a.text} takes the text inside)"),
        ('{"a": "\\ud800"}', "{a}", "a lone surrogate (U+D800) is not text"),
    ],
)
def test_fields_without_a_text_are_bad_rows(
    tmp_path: Path, row: Any, template: str, reason: str
) -> None:
    assert reason in problem(job(tmp_path, row, prompt_template=template))


def test_messages_about_templates_do_not_quote_values(tmp_path: Path) -> None:
    rows = [{"a": {"b": "my secret"}}, {"b": "my secret"}, {"a": ["my secret"]}]
    assert "secret" not in problem(job(tmp_path, *rows, prompt_template="{a}"))


def test_a_template_over_a_csv_file(tmp_path: Path) -> None:
    path = tmp_path / "tasks.csv"
    path.write_text('id,price,text\na,007,"{x}, ""y"""\nb,1.50,""\n')
    config = job(tmp_path, dataset=str(path), prompt_template="{price}: {text}")
    assert texts(config) == ['007: {x}, "y"', "1.50: "]


def test_a_template_over_a_parquet_file(tmp_path: Path) -> None:
    nan = float("nan")
    table = pa.table(
        {
            "whole": pa.array([5, 2**63 - 1], pa.int64()),
            "float": pa.array([1.0, 1e300], pa.float64()),
            "flag": [True, False],
            "price": pa.array([decimal.Decimal("1.50"), decimal.Decimal("2.00")]),
            "day": [datetime.date(2026, 1, 2)] * 2,
            "nested": [{"text": "x", "list": ["y"]}] * 2,
            "hole": pa.array([nan, None], pa.float64()),
            "infinite": [float("inf")] * 2,
            "bytes": [b"x"] * 2,
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    template = "{whole} {float} {flag} {price} {day} {nested.text} {nested.list.0}"
    dataset = str(tmp_path / "rows.parquet")
    first, second = texts(job(tmp_path, prompt_template=template, dataset=dataset))
    assert first == "5 1.0 true 1.50 2026-01-02 x y"
    assert second == "9223372036854775807 1e+300 false 2.00 2026-01-02 x y"
    for name, kind in (("hole", "null"), ("infinite", "infinity"), ("bytes", "a value of type")):
        assert f"true or false, not {kind}" in problem(
            job(tmp_path, prompt_template=f"{{{name}}}", dataset=dataset)
        )


def test_the_fields_of_a_template_stay_in_the_metadata(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"id": "r", "question": "Who?", "topic": {"name": "x"}, "temperature": 0.5}
    (prompt,) = read(job(tmp_path, row, prompt_template="{topic.name}: {question} {temperature}"))
    assert (prompt.prompt_id, prompt.text) == ("r", "x: Who? 0.5")
    assert prompt.params.temperature == 0.5
    assert prompt.metadata == '{"question": "Who?", "topic": {"name": "x"}}'
    assert "prompt_template names temperature: fields of these names are also" in caplog.text


def test_settings_beside_a_nested_field_of_a_template_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"body": {"text": "x", "tail": "y", "max_tokens": 5}}
    read(job(tmp_path, row, prompt_template="{body.text} {body.tail}"))
    assert "'body.max_tokens' in 1 row (did you mean max_new_tokens?)" in caplog.text


def test_a_line_feed_of_two_characters_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert texts(job(tmp_path, {"q": "x"}, prompt_template="{q}\\nA:")) == ["x\\nA:"]
    assert "prompt_template holds a backslash and an n" in caplog.text
    caplog.clear()
    assert texts(job(tmp_path, {"q": "x"}, prompt_template="{q}\nA:")) == ["x\nA:"]
    assert not caplog.messages


def test_a_template_of_the_environment_keeps_its_line_feed(tmp_path: Path) -> None:
    for given in ("Q: {q}\nA:\n", "Q: {q}\nA:\n\r"):
        environment = {"GPTBATCH_PROMPT_TEMPLATE": given}
        config = load_config(None, environment=environment, options=NEEDED)
        assert config.prompt_template == "Q: {q}\nA:\n"


def test_one_setting_says_where_prompts_come_from(tmp_path: Path) -> None:
    given = {"prompt_field": "text", "prompt_template": "{q}", "messages_field": "messages"}
    for first, second in (
        ("prompt_field", "prompt_template"),
        ("prompt_field", "messages_field"),
        ("prompt_template", "messages_field"),
    ):
        both = {**NEEDED, first: given[first], second: given[second]}
        with pytest.raises(ConfigError, match=f"{first} and {second}: .*give one"):
            load_config(None, environment={}, options=both)
        # an option replaces the setting of a file
        path = tmp_path / "job.yaml"
        path.write_text(json.dumps({**NEEDED, first: given[first]}))
        config = load_config(str(path), environment={}, options={second: given[second]})
        assert getattr(config, second) == given[second]
    with pytest.raises(ConfigError, match="messages_field and parse_special: "):
        load_config(
            None,
            environment={},
            options={**NEEDED, "messages_field": "messages", "parse_special": True},
        )


def test_a_template_without_quotes_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("prompt_template: {question}\n")
    with pytest.raises(ConfigError, match=r"prompt_template: .*; quote it to make it text"):
        load_config(str(path), environment={}, options=NEEDED)


def test_the_recorded_config_keeps_the_template(tmp_path: Path) -> None:
    """A name in it that looks like a secret is not hidden: the template is parsed again."""
    config = JobConfig(**NEEDED, prompt_template="token={word}\npassword: '{x}' {{}}\n")
    path = tmp_path / "resolved.yaml"
    path.write_text(config.to_yaml())
    assert load_config(str(path), environment={}, options={}) == config


TASKS = [
    {"id": f"t{i}", "instruction": f"Say {{word}} {i}.", "input": "KING" * (i % 2), "n": i}
    for i in range(6)
]
TEMPLATE = "{instruction}\n{input}\n{n}:"


def test_a_run_with_a_template_is_continued_verified_and_replayed(
    command: Command, tmp_path: Path
) -> None:
    write_lines(tmp_path / "rows.jsonl", *TASKS)
    run = ["generate", "--input", "rows.jsonl", "--output", "out", "--part-rows", "2"]
    run += ["--row-settings", "none"]
    assert command(*run, "--prompt-template", TEMPLATE, "--limit", "4")[0] == 0
    code, out, _ = command(*run, "--prompt-template", TEMPLATE)
    assert (code, json.loads(out)["rows_kept"]) == (0, 4)
    rows = outputs("out")
    assert [row["prompt"] for row in rows] == [TEMPLATE.format(**task) for task in TASKS]
    assert json.loads(rows[1]["metadata"]) == {
        key: value for key, value in TASKS[1].items() if key != "id"
    }
    code, out, _ = command("verify", "out", "--all")
    assert (code, json.loads(out.splitlines()[-1])["rows_checked"]) == (0, 6)
    assert "equal to the recorded row" in command("replay", "out", "--prompt-id", "t3")[1]
    code, _, said = command(*run, "--prompt-template", "{instruction}")
    assert code == 78
    assert "holds a run of another job (prompt_template: " in said
    code, _, said = command(*run)
    assert code == 78
    assert "prompt_template" in said


def test_the_template_is_part_of_the_config_hash_only_where_it_is_set(checkpoint: Path) -> None:
    found = find_checkpoint(str(checkpoint))
    tokenizer = load_tokenizer(checkpoint)

    def identity(**settings: Any) -> dict[str, Any]:
        return job_identity(JobConfig(**NEEDED, **settings), found, tokenizer)

    plain = identity()
    optional = ("prompt_template", "messages_field", "row_settings", "message_end_token")
    assert [plain.get(key) for key in optional] == [None] * 4
    # the same as in an output without these keys
    hashed = {
        key: value
        for key, value in plain.items()
        if key not in ("config_hash", "record_logits_digest", *optional)
    }
    text = json.dumps(hashed, sort_keys=True)
    assert plain["config_hash"] == hashlib.sha256(text.encode()).hexdigest()
    template = identity(prompt_template="{q}")
    assert template["prompt_template"] == "{q}"
    chat = identity(messages_field="chat")
    assert (chat["messages_field"], chat["message_end_token"]) == ("chat", 0)
    none, one = identity(row_settings=["none"]), identity(row_settings=["seed"])
    assert (none["row_settings"], one["row_settings"]) == ([], ["seed"])
    hashes = {found["config_hash"] for found in (plain, template, chat, none, one)}
    assert len(hashes) == 5


def test_error_rows_of_a_template_are_an_input_for_the_same_settings(
    command: Command, tmp_path: Path
) -> None:
    """Also where fields are called `prompt` and `error`."""
    row = {"id": "a", "prompt": "king " * 200, "error": {"at": 1.5}, "x": {"y": "z"}}
    write_lines(tmp_path / "rows.jsonl", row, {"id": "b", "error": 1})
    run = ("generate", "--on-bad-row", "record", "--prompt-template", "{prompt}{error.at}{x.y}")
    assert command(*run, "--input", "rows.jsonl", "--output", "out")[0] == 0
    first, bad = outputs("out")
    assert (first["prompt"], first["finish_reason"]) == ("king " * 200 + "1.5z", "error")
    assert "there is no field 'prompt', which prompt_template names" in bad["error"]
    errors = "out/.gptbatch/errors.jsonl"
    more = ("--context-overflow", "truncate_left")
    assert command(*run, *more, "--input", errors, "--output", "again")[0] == 0
    second = outputs("again")[0]
    assert second["finish_reason"] != "error"
    for name in ("prompt_id", "prompt", "seed"):
        assert first[name] == second[name]


OWN_SETTINGS: dict[str, Any] = {
    "seed": 5,
    "temperature": 0.5,
    "top_k": 40,
    "stop": ["END"],
    "logit_bias": {"7": -1.5},
    "n": 2,
}


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_a_corrected_error_row_is_the_row_that_it_would_have_been(
    kind: str, command: Command, tmp_path: Path
) -> None:
    """Cells of CSV and floats of tables become what JSON lines hold; other fields are unchanged."""
    row: dict[str, Any] = {"id": 12, "prompt": "KING:", **OWN_SETTINGS, "note": "007"}
    others: dict[str, Any] = {"id": 13, "prompt": "QUEEN:", "seed": None, "note": "1"}
    if kind == "csv":
        cells = {**row, "stop": '"[""END""]"', "logit_bias": '"{""7"": -1.5}"'}
        values = ",".join(map(str, cells.values()))
        for name, cell in (("good", "0.5"), ("bad", "oops")):
            Path(f"{name}.csv").write_text(f"{','.join(cells)},top_p\n{values},{cell}\n")
    elif kind == "parquet":
        # as pandas writes whole numbers of columns with gaps
        floats = {name: float(row[name]) for name in ("id", "seed", "top_k", "n")}
        for name, top_p in (("good", 0.5), ("bad", 7.0)):
            rows = [row | floats | {"top_p": top_p}]
            rows += [others | {"id": 13.0, "top_p": 7.0}] if name == "bad" else []
            pq.write_table(pa.Table.from_pylist(rows), f"{name}.parquet")
    else:
        write_lines(Path("good.jsonl"), {**row, "top_p": 0.5})
        write_lines(Path("bad.jsonl"), {**row, "top_p": "oops"})
    run = ("generate", "--on-bad-row", "record", "--dataset")
    assert command(*run, f"good.{kind}", "--output", "good")[0] == 0
    assert command(*run, f"bad.{kind}", "--output", "bad")[0] == 0
    errors = Path("bad/.gptbatch/errors.jsonl").read_text()
    lines = [json.loads(line) for line in errors.splitlines()]
    assert lines[0].items() >= {**OWN_SETTINGS, "id": "12", "note": "007"}.items()
    for line in lines:
        line["top_p"] = 0.5
    write_lines(Path("corrected.jsonl"), *lines)
    assert command("generate", "--input", "corrected.jsonl", "--output", "again")[0] == 0
    names = ("prompt_id", "seed", "sampling_params", "completion_token_ids", "top_p")
    good, again = ([[row[name] for name in names] for row in outputs(o)] for o in ("good", "again"))
    assert again[: len(good)] == good


def test_a_repeated_id_keeps_the_settings_of_its_row(command: Command, tmp_path: Path) -> None:
    row = {"id": "a", "prompt": "KING:", "seed": 5}
    second = {**row, "seed": 6, "stop": ["END"], "note": 1.50}
    write_lines(tmp_path / "rows.jsonl", row, second)
    run = ("generate", "--input", "rows.jsonl", "--on-bad-row", "record")
    assert command(*run, "--output", "out")[0] == 0
    assert command("generate", "--input", "out/.gptbatch/errors.jsonl", "--output", "again")[0] == 0
    (row,) = outputs("again")
    assert (row["prompt_id"], row["seed"], row["sampling_params"]) == (
        "line:2",
        6,
        '{"stop":["END"]}',
    )


# -- messages --------------------------------------------------------------------------------------


CHATS: list[list[Any]] = [
    ["The king is dead.", "Long live the king!"],
    [{"role": "user", "content": "To be"}, {"role": "assistant", "content": ""}, "or not"],
    [{"content": "é\u4e2d", "name": "x", "at": 1.50}],
    [f"The queen{END_OF_TEXT}The king"],
]


def encode(model: Path, chats: list[Any], **settings: Any) -> list[EncodedText]:
    """Return the tokens of chats as a job encodes their prompts."""
    rows = [{"messages": chat} for chat in chats]
    config = job(model.parent, *rows, model=model, messages_field="messages", **settings)
    checkpoint = find_checkpoint(str(model))
    tokenizer = prompt_tokenizer(config, checkpoint.special_tokens, load_tokenizer(model))
    return tokenizer.encode(texts(config))


@pytest.fixture
def model(checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy of the checkpoint with the chat template of DialoGPT."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    set_template(folder, DIALOGPT)
    return folder


def set_template(folder: Path, template: Any, **more: Any) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"chat_template": template} | more
    path.write_text(json.dumps(config))


def contents(chat: list[Any]) -> list[str]:
    return [message["content"] if isinstance(message, dict) else message for message in chat]


def test_messages_are_encoded_as_transformers_encodes_dialogpt(model: Path) -> None:
    theirs = auto_tokenizer(model)
    for chat, encoded in zip(CHATS[:3], encode(model, CHATS[:3]), strict=True):
        messages = [{"role": "user", "content": content} for content in contents(chat)]
        rendered = theirs.apply_chat_template(messages, tokenize=False)
        assert encoded.token_ids == theirs(rendered, add_special_tokens=False)["input_ids"]
        assert encoded.token_ids[-1] == theirs.eos_token_id == 0


def test_a_message_cannot_hold_the_end_of_a_message(model: Path) -> None:
    (encoded,) = encode(model, CHATS[3:])
    assert encoded.token_ids.count(0) == 1
    assert encoded.token_ids[-1] == 0
    assert encoded.has_special_text
    text = f"The queen{END_OF_TEXT}The king"
    assert PromptTokenizer(load_tokenizer(model), start_token=None).decode(
        encoded.token_ids[:-1]
    ) == (text)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x"}, "there is no field 'chat', which messages_field names; the row has 'text'"),
        ({"messages": ["x"]}, "(--messages-field messages takes the messages)"),
        ({"text": "x"}, "the row has 'text' (--messages-field FIELD takes the messages)"),
        ({"chat": None}, "chat must be an array of messages, not null"),
        ({"chat": "x"}, "chat must be an array of messages, not a string"),
        ({"chat": {"content": "x"}}, "chat must be an array of messages, not an object"),
        ({"chat": []}, "chat must hold at least one message"),
        ({"chat": ["x", 5]}, "chat.1 must be a string or an object with content, not a number"),
        ({"chat": [None]}, "chat.0 must be a string or an object with content, not null"),
        ({"chat": [["x"]]}, "chat.0 must be a string or an object with content, not an array"),
        (
            {"chat": [{"from": "human", "value": "x"}]},
            "there is no field 'chat.0.content'; the message has 'from', 'value'",
        ),
        ({"chat": [{"content": None}]}, "chat.0.content must be a string, not null"),
        ({"chat": [{"content": [{"text": "x"}]}]}, "chat.0.content must be a string, not an array"),
        ('{"chat": ["\\ud800"]}', "a lone surrogate (U+D800) is not text"),
    ],
)
def test_bad_messages_are_bad_rows(tmp_path: Path, row: Any, reason: str) -> None:
    assert reason in problem(job(tmp_path, row, messages_field="chat"))


@pytest.mark.parametrize("rows", ['id,chat\na,"[""x""]"\n', "id,chat\na,\n", "chat\nx\n"])
def test_a_cell_of_a_csv_file_holds_no_messages(tmp_path: Path, rows: str) -> None:
    (tmp_path / "chats.csv").write_text(rows)
    config = job(tmp_path, dataset=str(tmp_path / "chats.csv"), messages_field="chat")
    assert "chat must be an array of messages, which a cell of a CSV file cannot" in problem(config)


def test_the_prompt_of_a_chat_is_its_json(tmp_path: Path) -> None:
    row = '{"id": "r", "x": {"chat": [{"role": "a", "content": "{b}", "at": 1.50}, "c"]}, "y": 1}'
    (prompt,) = read(job(tmp_path, row, messages_field="x.chat"))
    assert prompt.text == '[{"role": "a", "content": "{b}", "at": 1.50}, "c"]'
    assert (prompt.prompt_id, prompt.metadata) == ("r", '{"y": 1}')


def test_messages_of_a_parquet_file(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "The king"}, {"role": "assistant", "content": "is dead."}]
    pq.write_table(pa.table({"messages": [chat]}), tmp_path / "rows.parquet")
    dataset = str(tmp_path / "rows.parquet")
    (text,) = texts(job(tmp_path, dataset=dataset, messages_field="messages"))
    assert json.loads(text) == chat


def test_a_run_of_chats_is_continued_verified_and_replayed(
    command: Command, tmp_path: Path
) -> None:
    rows = [{"id": f"c{i}", "messages": chat} for i, chat in enumerate(CHATS)]
    rows.append({"id": "long", "messages": [*CHATS[0], "king " * 200]})
    write_lines(tmp_path / "rows.jsonl", *rows)
    run = ("generate", "--messages-field", "messages", "--part-rows", "2")
    first = (*run, "--input", "rows.jsonl", "--output", "out")
    assert command(*first, "--limit", "2")[0] == 0
    code, out, said = command(*first)
    assert (code, json.loads(out)["rows_kept"], json.loads(out)["errors"]) == (0, 2, 1)
    assert "special token in a message: 1; it is plain text there" in said
    recorded = outputs("out")
    assert [json.loads(row["prompt"]) for row in recorded] == [row["messages"] for row in rows]
    code, out, _ = command("verify", "out", "--all")
    summary = json.loads(out.splitlines()[-1])
    assert (code, summary["rows_checked"], summary["mismatches"]) == (0, 4, 0)
    for row in rows[:4]:
        out = command("replay", "out", "--prompt-id", str(row["id"]))[1]
        assert "equal to the recorded row" in out
    again = (*run, "--context-overflow", "truncate_left", "--output", "again")
    assert command(*again, "--input", "out/.gptbatch/errors.jsonl")[0] == 0
    (row,) = outputs("again")
    assert (row["prompt"], row["finish_reason"]) == (recorded[4]["prompt"], "length")
    code, out, _ = command("verify", "again", "--all")
    assert (code, json.loads(out.splitlines()[-1])["rows_checked"]) == (0, 1)
    code, _, said = command("generate", "--input", "rows.jsonl", "--output", "out")
    assert code in (65, 78)


@pytest.mark.parametrize("prompt", ["not JSON", "[]", "[5]", "[" * 5000, '{"a": 1}', "[1e999]"])
def test_a_recorded_chat_that_was_changed_is_a_mismatch(
    command: Command, tmp_path: Path, prompt: str
) -> None:
    write_lines(tmp_path / "rows.jsonl", {"messages": CHATS[0]})
    run = ("generate", "--messages-field", "messages", "--input", "rows.jsonl", "--output", "out")
    assert command(*run)[0] == 0
    (path,) = Path("out").glob("part-*.parquet")
    table = pq.read_table(path)
    (row,) = table.to_pylist()
    pq.write_table(pa.Table.from_pylist([row | {"prompt": prompt}], schema=table.schema), path)
    code, out, said = command("verify", "out", "--all")
    assert code == 1, said
    assert "its prompt is 0 tokens, but prompt_tokens is" in out


ACCEPTED = [
    None,
    [],
    DIALOGPT,
    "{%- for m in messages -%}{{ m['content'] + eos_token }}{%- endfor -%}",
    '{% for message in messages %}\n{{ message["content"] }}{{ eos_token }}{% endfor %}\n',
    [{"name": "tool", "template": "x"}, {"name": "default", "template": DIALOGPT}],
]
REFUSED = [
    "{% for message in messages %}{{ message.content }}{% endfor %}",
    "{% for message in messages %}{{ message.content }}\n{{ eos_token }}{% endfor %}",
    "{% for message in messages %}{{ message.role }}{{ eos_token }}{% endfor %}",
    "{% for message in messages %}{{ bos_token }}{{ message.content }}{{ eos_token }}{% endfor %}",
    f"{DIALOGPT}{{% if add_generation_prompt %}}Assistant:{{% endif %}}",
    f" {DIALOGPT}",
    5,
    {"default": DIALOGPT},
    [{"name": "tool", "template": DIALOGPT}],
    [5],
]


@pytest.mark.parametrize("template", ACCEPTED, ids=repr)
def test_chat_templates_that_are_that_of_dialogpt(model: Path, template: Any) -> None:
    set_template(model, template)
    check_chat_template(model)


@pytest.mark.parametrize("template", REFUSED, ids=repr)
def test_other_chat_templates_are_refused(model: Path, tmp_path: Path, template: Any) -> None:
    set_template(model, template)
    with pytest.raises(ModelError, match=r"tokenizer_config.json: its chat_template .* is not"):
        inspect_job(job(tmp_path, {"messages": ["x"]}, model=model, messages_field="messages"))


def test_a_file_with_a_chat_template_takes_precedence(model: Path) -> None:
    path = model / "chat_template.jinja"
    path.write_text(DIALOGPT + "\n")
    set_template(model, "other")
    check_chat_template(model)
    set_template(model, DIALOGPT)
    path.write_bytes(b"\xff{{ messages }}")
    with pytest.raises(ModelError, match=r"chat_template\.jinja: its chat_template"):
        check_chat_template(model)


def test_a_chat_template_does_not_matter_to_other_prompts(model: Path, tmp_path: Path) -> None:
    set_template(model, "{{ messages }}")
    assert inspect_job(job(tmp_path, {"prompt": "The king"}, model=model)).rows == 1


def test_messages_need_an_eos_token(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    for end, named in ((None, "none"), (7, "7")):
        (model / "config.json").write_text(json.dumps(config | {"eos_token_id": end}))
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
        with pytest.raises(
            ModelError, match=f"that of the tokenizer is 0, those of the model are {named}"
        ):
            inspect_job(job(tmp_path, {"messages": ["x"]}, model=model, messages_field="messages"))


# -- settings of rows ------------------------------------------------------------------------------


ROW = {"id": "a", "prompt": "The king", "seed": 5, "temperature": 0.25, "top_k": 3, "x": 1}


def test_row_settings_name_the_fields_that_are_settings(tmp_path: Path) -> None:
    (prompt,) = read(job(tmp_path, ROW))
    assert (prompt.params.seed, prompt.params.top_k, prompt.metadata) == (5, 3, '{"x": 1}')
    (prompt,) = read(job(tmp_path, ROW, row_settings=["temperature"]))
    assert (prompt.params.temperature, prompt.params.top_k) == (0.25, 0)
    assert json.loads(prompt.metadata or "") == {"x": 1, "seed": 5, "top_k": 3}
    (prompt,) = read(job(tmp_path, ROW, row_settings="none", temperature=0.5))
    assert (prompt.params.temperature, prompt.params.top_k) == (0.5, 0)
    assert json.loads(prompt.metadata or "") == {
        "x": 1,
        "seed": 5,
        "temperature": 0.25,
        "top_k": 3,
    }


def test_every_setting_can_be_metadata(tmp_path: Path) -> None:
    """A value that is no setting does no harm then."""
    fields: dict[str, Any] = {name: {"any": ["value"]} for name in SAMPLING_SETTINGS}
    (prompt,) = read(job(tmp_path, {"prompt": "x", **fields}, row_settings=[]))
    assert json.loads(prompt.metadata or "") == fields
    assert "if seed is no setting here, name those that are with --row-settings" in problem(
        job(tmp_path, {"prompt": "x", "seed": {}})
    )


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("none", []),
        ([], []),
        (["none"], []),
        ("seed", ["seed"]),
        (["top_k", "seed", "seed"], ["seed", "top_k"]),
    ],
)
def test_names_of_row_settings(given: Any, names: list[str]) -> None:
    config = load_config(None, environment={}, options={**NEEDED, "row_settings": given})
    assert config.row_settings == names
    environment = {"GPTBATCH_ROW_SETTINGS": given if isinstance(given, str) else json.dumps(given)}
    assert load_config(None, environment=environment, options=NEEDED).row_settings == names


def test_unknown_names_of_row_settings() -> None:
    with pytest.raises(ConfigError, match=r"row_settings\.1: input should be 'none', 'seed'"):
        load_config(None, environment={}, options={**NEEDED, "row_settings": ["seed", "topk"]})
    with pytest.raises(ConfigError, match="row_settings: 'none' must be given alone"):
        load_config(None, environment={}, options={**NEEDED, "row_settings": ["none", "seed"]})


def test_the_index_of_a_row_is_its_id_without_an_id_field(command: Command, tmp_path: Path) -> None:
    row = {"id": "same", "prompt": "king " * 200}
    write_lines(tmp_path / "rows.jsonl", row, {**row, "prompt": "The king"})
    code, _, said = command("generate", "--input", "rows.jsonl", "--output", "out")
    assert code == 65
    assert "an empty id_field uses the row index instead, so ids and seeds change" in said
    run = ("generate", "--id-field", "", "--row-settings", "none")
    assert command(*run, "--input", "rows.jsonl", "--output", "out")[0] == 0
    rows = outputs("out")
    assert [row["prompt_id"] for row in rows] == ["0", "1"]
    assert [row["metadata"] for row in rows] == ['{"id": "same"}'] * 2
    (line,) = Path("out/.gptbatch/errors.jsonl").read_text().splitlines()
    assert json.loads(line) == row | {"gptbatch_error": rows[0]["error"]}


def test_the_dry_run_prints_settings_and_metadata(command: Command, tmp_path: Path) -> None:
    rows = [
        {"question": "Who?", "seed": 1, "max_tokens": 5, "topic": "a"},
        {"question": "What?", "seed": 2, "top_k": 5, "topP": 0.5, "temprature": 0, "topic": "b"},
    ]
    write_lines(tmp_path / "rows.jsonl", *rows)
    run = ["generate", "--input", "rows.jsonl", "--output", "out", "--dry-run"]
    run += ["--prompt-template", "Q: {question}"]
    code, out, said = command(*run)
    assert code == 0
    lines = [line.removeprefix("gptbatch: ") for line in said.splitlines()]
    assert "fields of the prompt: question" in lines
    assert "fields that are settings: seed, top_k (1 of 2 rows)" in lines
    assert (
        "fields that are metadata: question, max_tokens (1 of 2 rows), topic, topP (1 of 2 rows), "
        "temprature (1 of 2 rows)"
    ) in lines
    for name, meant in (
        ("max_tokens", "max_new_tokens"),
        ("topP", "top_p"),
        ("temprature", "temperature"),
    ):
        assert f"'{name}' in 1 row (did you mean {meant}?)" in said
    report = json.loads(out)
    assert report["setting_fields"] == {"seed": 2, "top_k": 1}
    assert report["metadata_fields"]["topic"] == 2
    assert report["prompt_fields"] == ["question"]
    code, out, said = command(*run, "--row-settings", "none")
    assert "fields that are settings: none\n" in said
    # without settings, no field is a misspelt one
    assert "did you mean" not in said


def test_settings_of_the_run_without_effect_are_named(command: Command, tmp_path: Path) -> None:
    """The lines of errors.jsonl hold the settings of their rows."""
    write_lines(tmp_path / "rows.jsonl", {"prompt": "king " * 100}, {"prompt": "queen " * 100})
    run = ("generate", "--temperature", "0.5")
    assert command(*run, "--input", "rows.jsonl", "--output", "out")[0] == 0
    again = (*run, "--input", "out/.gptbatch/errors.jsonl", "--output", "again", "--dry-run")
    said = "have no effect, since every row has its own: "
    assert said not in command(*again)[2], "the values are equal"
    assert f"{said}top_k; --row-settings" in command(*again, "--top-k", "5")[2]
    code, _, stderr = command(*again, "--top-k", "5", "--row-settings", "seed")
    assert (code, said in stderr) == (0, False)


def test_the_lines_of_the_dry_run_are_short(command: Command, tmp_path: Path) -> None:
    rows = [{"prompt": "x", **{f"k{i}.{j}": 1 for j in range(50)}} for i in range(40)]
    write_lines(tmp_path / "rows.jsonl", *rows)
    code, out, said = command("generate", "--input", "rows.jsonl", "--output", "out", "--dry-run")
    assert code == 0
    (line,) = [line for line in said.splitlines() if "fields that are metadata" in line]
    assert line.endswith(" (1 of 40 rows), 970 more")
    assert len(json.loads(out)["metadata_fields"]) == 1000


def test_row_settings_of_another_run_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    config = job(tmp_path, ROW, model=checkpoint, row_settings=["seed"])
    run_job(config)
    with pytest.raises(OutputConflictError, match=r'row_settings: \["seed"\] there'):
        run_job(config.model_copy(update={"row_settings": ["temperature"]}))


# -- requests of OpenAI's batch API ----------------------------------------------------------------


def request(number: int, **body: Any) -> dict[str, Any]:
    return {
        "custom_id": f"r-{number}",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "gpt2", **body},
    }


PROMPTS = [request(1, prompt="The king", max_tokens=2, temperature=0), request(2, prompt="To be")]
MESSAGES = [
    request(
        1,
        messages=[{"role": "user", "content": "The king"}],
        max_completion_tokens=2,
        top_p=1,
        logprobs=True,
        top_logprobs=3,
        stop=["a"],
    )
]


@pytest.mark.parametrize(
    ("rows", "chat"), [(PROMPTS, False), (MESSAGES, True)], ids=["prompts", "chats"]
)
@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_requests_of_openai_become_rows_by_the_command_of_the_message(
    command: Command, tmp_path: Path, rows: list[Any], chat: bool
) -> None:
    write_lines(tmp_path / "batch.jsonl", *rows)
    run = ("generate", "--output", "out")
    code, _, said = command(*run, "--input", "batch.jsonl")
    assert code == 65
    assert "(requests of OpenAI's batch API: jq -c " in said
    found = re.search(r"jq -c .* > rows\.jsonl", said)
    assert found is not None
    assert found[0] == OPENAI_TO_ROWS
    subprocess.run(
        ["bash", "-c", found[0].replace("FILE", shlex.quote("batch.jsonl"))], check=True, timeout=60
    )
    more = ("--messages-field", "messages") if chat else ()
    assert ("--messages-field messages reads the chats" in said) == chat
    assert command(*run, *more, "--input", "rows.jsonl")[0] == 0
    recorded = outputs("out")
    assert [row["prompt_id"] for row in recorded] == [row["custom_id"] for row in rows]
    assert recorded[0]["max_new_tokens"] == 2
    assert json.loads(recorded[0]["metadata"]) == {"model": "gpt2"}
    if not chat:
        assert (recorded[0]["temperature"], recorded[1]["max_new_tokens"]) == (0, 3)


def test_a_row_with_messages_names_messages_field(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "x"}], "y": 1}
    assert "(--messages-field messages takes the messages)" in problem(job(tmp_path, row))
    assert OPENAI_TO_ROWS in problem(job(tmp_path, *MESSAGES, messages_field="messages"))
    assert OPENAI_TO_ROWS in problem(job(tmp_path, *MESSAGES, prompt_template="{messages}"))


def test_the_command_of_the_message_stands_in_the_documentation() -> None:
    page = (REPOSITORY / "docs" / "input.md").read_text(encoding="utf-8")
    shown = " ".join(page.replace("\n>", " ").split())
    assert OPENAI_TO_ROWS.replace("FILE", "batch.jsonl") in shown


def test_an_empty_cell_is_empty_text_in_a_template(tmp_path: Path) -> None:
    """Csv of Python and pandas write an empty text as an empty cell. In JSON null stays refused."""
    path = tmp_path / "tasks.csv"
    path.write_text("id,instruction,input\na,Name a fruit,\nb,Add,1 + 1\n")
    config = job(tmp_path, dataset=str(path), prompt_template="{instruction}\n{input}\nA:")
    assert texts(config) == ["Name a fruit\n\nA:", "Add\n1 + 1\nA:"]
