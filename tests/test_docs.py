"""README keeps up: every command, option, config key, column and exit code stands in it, and its examples run."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gptbatch.jobs.group import COMMANDS
from gptbatch.jobs.options import option_name
from gptbatch.pipeline import errors
from gptbatch.pipeline.config import config_fields
from gptbatch.pipeline.output.schema import COLUMNS
from tests.paths import PYTHONPATH, REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def option_rows() -> list[str]:
    """The table of options, as README must have it."""
    rows = []
    for key, field in config_fields().items():
        default = (
            "needed"
            if field.is_required()
            else ""
            if field.default is None
            else f"`{str(field.default).replace('True', 'true').replace('False', 'false')}`"
        )
        rows.append(
            f"| `{option_name(key)}` | `{key}` | {default} | {(field.description or '').replace('|', '&#124;')} |"
        )
    return rows


def column_rows() -> list[str]:
    """The table of columns, as README must have it."""
    rows = []
    for column in COLUMNS:
        type_, nullable = str(column.type).replace("item: ", ""), "yes" if column.nullable else "no"
        rows.append(
            f"| `{column.name}` | `{type_}` | {nullable} | {column.unit} | {column.meaning} |"
        )
    return rows


@pytest.mark.parametrize("row", option_rows() + column_rows())
def test_every_option_key_and_column_is_documented(row: str) -> None:
    assert row in README.splitlines()


def test_deterministic_and_observed_columns_stand_apart() -> None:
    places = [README.index(f"| `{column.name}` | `") for column in COLUMNS]
    assert places == sorted(places)
    first_observed = next(i for i, column in enumerate(COLUMNS) if column.kind == "observed")
    assert places[first_observed - 1] < README.index("Observed columns") < places[first_observed]


def test_every_command_is_documented() -> None:
    for name in COMMANDS:
        assert f"gptbatch {name}" in README


def test_every_exit_code_is_documented() -> None:
    codes = {
        error.exit_code
        for _, error in inspect.getmembers(errors, inspect.isclass)
        if issubclass(error, errors.GptbatchError)
    }
    for code in codes | {0, 2, 75}:
        assert re.search(rf"^\| {code} \|", README, re.MULTILINE), code


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_examples_run(tmp_path: Path) -> None:
    """All of them, in order, in one empty folder that holds a run of the demo and a file of prompts."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "KING:"}\n')
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "HF_HOME": str(tmp_path / "hf")}
    demo = [sys.executable, "-m", "gptbatch", "generate", "--config", "demo"]
    subprocess.run(demo, cwd=tmp_path, env=environment, check=True, capture_output=True)
    examples = blocks("python")
    assert len(examples) >= 3
    for example in examples:
        script = tmp_path / ("test_example.py" if "def test_" in example else "example.py")
        script.write_text(example)
        command = (
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", script.name]
            if "def test_" in example
            else [sys.executable, script.name]
        )
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, example + done.stdout + done.stderr


def test_nothing_private_is_in_the_text() -> None:
    for path in ("README.md", "CHANGELOG.md"):
        text = (REPOSITORY / path).read_text(encoding="utf-8")
        assert not re.search(r"(?<!\w)/(home|root|tmp|work)/", text), path
