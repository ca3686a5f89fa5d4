"""Write the generated parts of the documentation from the code: `python docs/generate.py`.

These are the tables of cli.md, json.md, output.md, python.md and scoring.md, and the tree of files
in architecture.md. Such a part stands between two comments, `<!-- generated: NAME -->` and
`<!-- end -->`. All other text is written by hand. tests/test_docs.py fails where a part is out of
date.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from gptbatch import pipeline
from gptbatch.jobs.generate import generate
from gptbatch.jobs.group import COMMANDS, cli
from gptbatch.jobs.options import option_groups, option_name
from gptbatch.pipeline import errors
from gptbatch.pipeline.audit.diff import DiffSummary
from gptbatch.pipeline.cluster.on_ray import RaySummary
from gptbatch.pipeline.cluster.plan import Plan
from gptbatch.pipeline.config import config_fields
from gptbatch.pipeline.dry_run import InputReport
from gptbatch.pipeline.estimate.estimate import PilotReport, RunEstimate
from gptbatch.pipeline.estimate.forecast import TimeEstimate
from gptbatch.pipeline.estimate.resources import MemoryEstimate
from gptbatch.pipeline.export.run import ExportSummary
from gptbatch.pipeline.output.finish_folder import FinishedOutput
from gptbatch.pipeline.output.schema import COLUMNS, Column
from gptbatch.pipeline.output.status import OutputStatus
from gptbatch.pipeline.score.run import ScoreSummary
from gptbatch.pipeline.score.table import COLUMNS as SCORE_COLUMNS

DOCS = Path(__file__).resolve().parent
REPOSITORY = DOCS.parent
DOCUMENTS = ("cli.md", "json.md", "output.md", "python.md", "scoring.md", "architecture.md")
SECTION = re.compile(r"(<!-- generated: ([\w -]+) -->\n).*?(<!-- end -->)", re.DOTALL)

TYPES = {
    "integer": "whole number",
    "integer range": "whole number",
    "float": "number",
    "float range": "number",
}
# types of Python as they appear in JSON
JSON_TYPES = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
    NoneType: "null",
}
# values of Python in docstrings
JSON_VALUES = {"None": "`null`", "True": "`true`", "False": "`false`"}
# dataclasses that commands print as JSON objects, by name
RESULTS = {
    result.__name__: result
    for result in (
        OutputStatus,
        InputReport,
        RunEstimate,
        TimeEstimate,
        MemoryEstimate,
        PilotReport,
        Plan,
        FinishedOutput,
        DiffSummary,
        ExportSummary,
        ScoreSummary,
        RaySummary,
    )
}
DEFAULT_IN_HELP = re.compile(r"\s*Default: (.+)\.$")

# commands that take every setting as an option; a table of their own has those options
ALL_SETTINGS = ("generate", "plan")

# exit codes that no error class of gptbatch has, or that more than the class leads to
OTHER_EXIT_CODES = {
    0: "The work is done. Error rows do not count as a failure. Nothing left to do is also 0.",
    1: "`verify` or `diff` found a difference.",
    2: "The command line is wrong: an option is unknown, is missing or has a bad value, or nothing "
    "gives a required setting.",
    70: "A bug in gptbatch. The message holds a traceback.",
}

# the folders of the tree, in the order in which a prompt passes them, and their purpose
FOLDERS = {
    "jobs": "the commands",
    "pipeline": "the library",
    "pipeline/config": "the settings of a job",
    "pipeline/params": "the sampling settings of a row",
    "pipeline/input": "from files to token ids",
    "pipeline/engine": "the loop: scheduling, sampling",
    "pipeline/model": "GPT-2: checkpoints, layers, self-test",
    "pipeline/kv_cache": "the KV cache and its attention backends",
    "pipeline/kernels": "the C++ kernels, and the Triton kernels of the CUDA path",
    "pipeline/kernels/cpu": "",
    "pipeline/kernels/cuda": "",
    "pipeline/output": "from completions to files that survive a crash",
    "pipeline/cluster": "many workers on a cluster",
    "pipeline/storage": "files and objects: paths, reading, atomic writes",
    "pipeline/audit": "checking recorded runs",
    "pipeline/score": "log probabilities of given continuations",
    "pipeline/report": "the HTML report of a run: the command `report`",
    "pipeline/report/templates": "its HTML, styles and scripts",
    "pipeline/export": "the rows of a run for other programs",
    "pipeline/estimate": "predicting a run: the command `plan`",
    "pipeline/bench": "measuring speed",
    "pipeline/doctor": "checking this machine: the command `doctor`",
    "pipeline/system": "the machine, paths, secrets",
    "configs": "bundled configs, scheduler templates and the demo",
}
TREE_WIDTH, NAME_WIDTH = 100, 28


def main() -> None:
    for name in DOCUMENTS:
        path = DOCS / name
        path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")


def updated(document: str) -> str:
    """Return the document with every generated section as the code has it now.

    Raises:
        KeyError: the document names a section that does not exist.
    """
    return SECTION.sub(
        lambda found: found[1] + "\n" + _section(found[2]) + "\n" + found[3], document
    )


def _section(name: str) -> str:
    if name in SECTIONS:
        return SECTIONS[name]()
    kind, _, subject = name.partition(" ")
    if kind == "options" and subject in COMMANDS:
        return command_options(subject)
    if kind == "keys" and subject in RESULTS:
        return result_keys(RESULTS[subject])
    raise KeyError(f"no generated section is called {name!r}")


def config_options() -> str:
    """One table of options per group of config keys."""
    titles, lines = option_groups(), []
    options = {option.name: option for option in generate.params}
    title = ""
    for key, field in config_fields().items():
        if titles[key] != title:
            title = titles[key]
            lines += [
                "",
                f"#### {_words(title)}",
                "",
                *_header("option", "config key", "values", "default", "meaning"),
            ]
        description = field.description or ""
        default = "required" if field.is_required() else _code(_yaml(field.default))
        if not default and (in_help := DEFAULT_IN_HELP.search(description)):
            default = in_help[1]
        option = options[key.replace(".", "__")]
        lines.append(
            _row(
                _code(option_name(key)),
                _code(key),
                _values(option),
                default,
                _sentence(DEFAULT_IN_HELP.sub("", description)),
            )
        )
    return "\n".join(lines[1:]) + "\n"


def commands() -> str:
    rows = [_row(f"[`{name}`](#gptbatch-{name})", text) for name, (_, text) in COMMANDS.items()]
    return "\n".join([*_header("command", "purpose"), *rows]) + "\n"


def command_options(name: str) -> str:
    """Return the usage line and the options of one command, but for those of a config key."""
    command = getattr(import_module(COMMANDS[name][0]), name.replace("-", "_"))
    context = click.Context(command, info_name=f"gptbatch {name}", parent=None)
    lines = _usage_and_options(command, context)
    if isinstance(command, click.Group):
        for child_name, child in sorted(command.commands.items()):
            child_context = click.Context(child, info_name=child_name, parent=context)
            lines += ["", *_usage_and_options(child, child_context)]
    return "\n".join(lines) + "\n"


def _usage_and_options(command: click.Command, context: click.Context) -> list[str]:
    usage = command.get_usage(context).removeprefix("Usage: ")
    has_all = command.name in ALL_SETTINGS
    keys = {key.replace(".", "__") for key in config_fields()} if has_all else set()
    rows = [
        _row(
            _code(", ".join(option.opts)),
            _values(option),
            _option_default(option),
            _sentence(DEFAULT_IN_HELP.sub("", option.help or "")),
        )
        for option in command.get_params(context)
        if isinstance(option, click.Option)
        and option.name not in keys
        and "--help" not in option.opts
    ]
    table = [*_header("option", "values", "default", "meaning"), *rows] if rows else []
    return ["```text", re.sub(r"\s+", " ", usage), "```", "", *table]


def global_options() -> str:
    context = click.Context(cli, info_name="gptbatch", **cli.context_settings)
    rows = [
        # click keeps the help option of the first context that it met
        _row(
            _code(", ".join(context.help_option_names if "--help" in option.opts else option.opts)),
            _sentence(option.help or ""),
        )
        for option in cli.get_params(context)
        if isinstance(option, click.Option)
    ]
    return "\n".join([*_header("option", "meaning"), *rows]) + "\n"


def exit_codes() -> str:
    rows = [(code, "", meaning) for code, meaning in OTHER_EXIT_CODES.items()]
    for name, error in inspect.getmembers(errors, inspect.isclass):
        if issubclass(error, errors.GptbatchError) and error is not errors.GptbatchError:
            meaning = re.sub(r"\s+", " ", (inspect.getdoc(error) or "").split("\n\n")[0])
            rows.append((error.exit_code, _code(name), _sentence(meaning)))
    lines = [_row(_code(str(code)), name, meaning) for code, name, meaning in sorted(rows)]
    return "\n".join([*_header("exit code", "Python error", "meaning"), *lines]) + "\n"


def columns(kind: str, table: tuple[Column, ...] = COLUMNS) -> str:
    rows = [
        _row(
            _code(column.name),
            _code(str(column.type).replace("item: ", "")),
            "yes" if column.nullable else "no",
            column.unit,
            column.meaning,
        )
        for column in table
        if column.kind == kind
    ]
    return "\n".join([*_header("column", "type", "may be null", "unit", "meaning"), *rows]) + "\n"


def result_keys(result: type) -> str:
    """One row per field of a dataclass, with its meaning from the docstring.

    Raises:
        KeyError: The docstring leaves a field out.
    """
    hints, meanings = get_type_hints(result), described_attributes(result)
    rows = [
        _row(_code(field.name), _json_type(hints[field.name]), _sentence(meanings[field.name]))
        for field in dataclasses.fields(result)
    ]
    return "\n".join([*_header("key", "type", "meaning"), *rows]) + "\n"


def described_attributes(described: type) -> dict[str, str]:
    """Return what a docstring says of each attribute, in terms of JSON."""
    listed = (inspect.getdoc(described) or "").partition("Attributes:\n")[2]
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", listed, re.MULTILINE)
    values = re.compile(rf"\b({'|'.join(JSON_VALUES)})\b")
    return {name: values.sub(lambda value: JSON_VALUES[value[1]], text) for name, text in found}


def _json_type(hint: Any) -> str:
    if isinstance(hint, UnionType):
        return " or ".join(map(_json_type, get_args(hint)))
    if get_origin(hint) is Literal:
        return "string"
    return "object" if dataclasses.is_dataclass(hint) else JSON_TYPES[get_origin(hint) or hint]


def python_names() -> str:
    """One row per function and type of `gptbatch.pipeline`, without the errors."""
    functions, types = [], []
    for name in pipeline.__all__:
        member = getattr(pipeline, name)
        purpose = (inspect.getdoc(member) or "").partition("\n")[0]
        if inspect.isfunction(member):
            arguments = ", ".join(inspect.signature(member).parameters)
            functions.append(_row(_code(f"{name}({arguments})"), purpose))
        elif not issubclass(member, errors.GptbatchError):
            types.append(_row(_code(name), purpose))
    return "\n".join([*_header("name", "purpose"), *functions, *types]) + "\n"


def tree() -> str:
    """Every source file with the first sentence of its docstring or leading comment."""
    lines = []
    for folder, purpose in FOLDERS.items():
        lines += ["", *_tree_line(f"{folder}/", purpose, indent=0)]
        for path in sorted((REPOSITORY / folder).iterdir()):
            if path.is_file() and (text := _purpose(path)):
                lines += _tree_line(path.name, text, indent=2)
    return "\n".join(["```text", *lines[1:], "```"]) + "\n"


def _tree_line(name: str, purpose: str, *, indent: int) -> list[str]:
    start = f"{' ' * indent}{name}".ljust(NAME_WIDTH)
    hanging = " " * NAME_WIDTH
    wrapped = textwrap.wrap(
        purpose, TREE_WIDTH, initial_indent=start, subsequent_indent=hanging, break_on_hyphens=False
    )
    return wrapped or [start.rstrip()]


def _purpose(path: Path) -> str:
    """Return the first sentence of the docstring or of the leading comment; empty for none."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".py":
        description = ast.get_docstring(ast.parse(text)) or ""
    else:
        mark = "//" if path.suffix in (".cpp", ".h", ".cu") else "#"
        lines = [line for line in text.splitlines() if not line.startswith(("#!", "#pragma"))]
        comment = list(itertools.takewhile(lambda line: line.startswith(mark), lines))
        description = "\n".join(line.lstrip(mark).strip() for line in comment)
    paragraph = re.sub(r"\s+", " ", description.split("\n\n")[0])
    return re.split(r"(?<=[.?])\s(?=[A-Z`])", paragraph)[0].rstrip(".:")


SECTIONS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "global options": global_options,
    "config options": config_options,
    "exit codes": exit_codes,
    "tree": tree,
    "python names": python_names,
    "deterministic columns": lambda: columns("deterministic"),
    "observed columns": lambda: columns("observed"),
    "score columns": lambda: columns("deterministic", table=SCORE_COLUMNS),
}


def _header(*names: str) -> list[str]:
    return [_row(*names), "|" + "---|" * len(names)]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "&#124;") for cell in cells) + " |"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _yaml(value: Any) -> str:
    if value is None or value == []:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _option_default(option: click.Parameter) -> str:
    if option.required:
        return "required"
    value = option.to_info_dict()["default"]
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return _code(str(value))
    in_help = DEFAULT_IN_HELP.search(getattr(option, "help", None) or "")
    return in_help[1] if in_help else ""


def _values(option: click.Parameter) -> str:
    """Return the choices of an option, or the type of its value."""
    kind = getattr(option.type, "item", option.type)
    if isinstance(option, click.Option) and (option.is_flag or kind is click.BOOL):
        return "flag"
    if isinstance(kind, click.Choice):
        values = ", ".join(_code(str(choice)) for choice in kind.choices)
    else:
        values = TYPES.get(kind.name, kind.name)
    return values + (" (repeatable)" if getattr(option, "multiple", False) else "")


def _sentence(text: str) -> str:
    """One line with a capital and a full stop, with `<` escaped for Markdown."""
    line = re.sub(r"\s+", " ", text).strip().replace("<", "&lt;")
    return line[:1].upper() + line[1:] + ("" if line.endswith((".", "?")) else ".") if line else ""


def _words(title: str) -> str:
    """BatchInvariance -> Batch invariance."""
    return re.sub(r"(?<=[a-z])([A-Z])", lambda found: " " + found[1].lower(), title)


if __name__ == "__main__":
    main()
