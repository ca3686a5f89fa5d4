"""The documentation is true: tables match the code, links work, and the examples run offline."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import fnmatch
import importlib.util
import inspect
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq
import pytest

from gptbatch.jobs.cli import run_command
from gptbatch.jobs.group import COMMANDS
from gptbatch.jobs.options import option_name
from gptbatch.pipeline import PartSource, Progress, Stop, errors
from gptbatch.pipeline.config import config_fields
from gptbatch.pipeline.doctor.examine import examine_machine
from gptbatch.pipeline.output.schema import COLUMNS
from gptbatch.pipeline.output.summary import RunSummary
from tests.paths import PYTHONPATH, REPOSITORY
from tests.processes import LIMIT_S

DOCS = REPOSITORY / "docs"
README = REPOSITORY / "README.md"
PAGES = [README, REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
TEXTS = {path: path.read_text(encoding="utf-8") for path in [*PAGES, REPOSITORY / "CHANGELOG.md"]}
MAX_README_BYTES = 7 * 1024
MAX_BLOCKS_NOT_RUN = 10
LANGUAGES = {"console", "python", "text"}

# an optional marker, then a fenced block; blocks that need an engine are run by test_recipes.py
BLOCK = re.compile(
    r"(?:<!-- (?:not run: (?P<reason>[^\n]+)|needs (?P<needs>\w+)) -->\n)?"
    r"```(?P<language>\w*)\n(?P<body>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# a path in backticks: a known top-level folder, or a file of the top level
PATH = re.compile(
    r"`((?:pipeline|jobs|configs|docs|tests|benchmarks|examples|src)/[\w./*-]*"
    r"|Makefile|pyproject\.toml|constraints\.txt|[A-Z]{3,}\.md)`"
)
PLACEHOLDER = "..."


def named(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def without_blocks(text: str) -> str:
    return BLOCK.sub("", text)


# -- tables ------------------------------------------------------------------------------------


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generated_tables_are_up_to_date() -> None:
    generator = load_generator()
    for name in generator.DOCUMENTS:
        text = (DOCS / name).read_text(encoding="utf-8")
        expected = generator.updated(text)
        assert text == expected, f"docs/{name} is out of date: run `python docs/generate.py`"


def test_the_tree_of_files_has_every_folder() -> None:
    folders = load_generator().FOLDERS
    found = {named(path.parent) for path in (REPOSITORY / "pipeline").rglob("*.py")}
    assert found <= folders.keys()
    assert all((REPOSITORY / folder).is_dir() for folder in folders)


def test_every_option_command_exit_code_and_column_is_documented() -> None:
    cli, output = TEXTS[DOCS / "cli.md"], TEXTS[DOCS / "output.md"]
    for key in config_fields():
        assert f"| `{option_name(key)}` | `{key}` |" in cli
    for command in COMMANDS:
        assert f"## gptbatch {command}\n" in cli
    codes = {
        error.exit_code
        for _, error in inspect.getmembers(errors, inspect.isclass)
        if issubclass(error, errors.GptbatchError)
    }
    for code in codes | {0, 1, 2}:
        assert f"| `{code}` |" in cli
    for column in COLUMNS:
        assert f"| `{column.name}` | `" in output


# -- form --------------------------------------------------------------------------------------


def test_readme_is_short() -> None:
    assert len(README.read_bytes()) <= MAX_README_BYTES


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_prose_is_wrapped_at_100_columns(page: Path) -> None:
    for number, line in enumerate(TEXTS[page].splitlines(), 1):
        if not line.startswith("|") and "](" not in line:
            assert len(line) <= 100, f"{named(page)}:{number}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_blocks_have_a_language_and_few_are_not_run(page: Path) -> None:
    for block in BLOCK.finditer(TEXTS[page]):
        assert block["language"] in LANGUAGES, block[0]
    assert TEXTS[page].count("\n```") == 2 * len(BLOCK.findall(TEXTS[page]))


def test_few_blocks_are_not_run() -> None:
    blocks = [block for text in TEXTS.values() for block in BLOCK.finditer(text)]
    runnable = [block for block in blocks if block["language"] != "text"]
    assert len(runnable) >= 40
    assert sum(block["reason"] is not None for block in runnable) <= MAX_BLOCKS_NOT_RUN


@pytest.mark.parametrize("page", TEXTS, ids=named)
def test_nothing_private_is_in_the_text(page: Path) -> None:
    assert not re.search(r"(?<!\w)/(home|root|tmp|work)/", TEXTS[page])


# -- links and paths ---------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(text), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower().replace(" ", "-")
        for heading in headings
    }


@pytest.mark.parametrize("page", TEXTS, ids=named)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in LINK.findall(without_blocks(TEXTS[page])):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{named(page)}: {target}"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{named(page)}: {target}"


def test_every_page_is_linked_from_readme() -> None:
    linked = {target.partition("#")[0] for target in LINK.findall(TEXTS[README])}
    assert {named(page) for page in PAGES if page != README} <= linked


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_paths_of_the_repository_exist(page: Path) -> None:
    for path in PATH.findall(TEXTS[page]):
        assert list(REPOSITORY.glob(path.rstrip("/"))), f"{named(page)}: {path}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_targets_of_make_exist(page: Path) -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for targets in re.findall(r"(?:`|^\$ )make ([a-z -]+)", TEXTS[page], re.MULTILINE):
        for target in targets.split():
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{named(page)}: {target}"


WALK = re.compile(r"^\| \d+ \| `([\w/.]+)` \| `([\w.]+)` \|", re.MULTILINE)


def test_the_functions_of_the_walks_exist() -> None:
    steps = WALK.findall(TEXTS[DOCS / "architecture.md"])
    assert len(steps) >= 20
    for path, name in steps:
        code = (REPOSITORY / path).read_text(encoding="utf-8")
        for part in name.split("."):
            assert re.search(rf"\b(def|class) {part}\b", code), f"{path}: {name}"


# -- messages and variables --------------------------------------------------------------------

CODE = [path for folder in ("jobs", "pipeline") for path in (REPOSITORY / folder).rglob("*.py")]
MIN_WORDS = 5
FORMAT_FIELD = re.compile(r"%(?:\.\d+)?[sdf]")
# a name that is read from the environment; the last two are those of shards.py
VARIABLES = (
    re.compile(r"environ(?:ment)?(?:\.get|\.setdefault)?[(\[]\"([A-Z_]+)\""),
    re.compile(r"_number\(environment, \"(\w+)\""),
    re.compile(r"_from_pair\(\"(\w+)\", \"(\w+)\"\)"),
)


def texts_of_code() -> str:
    """Return all texts of the code, a line each; `...` stands for values that are inserted."""
    texts = []
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (
                    str(part.value) if isinstance(part, ast.Constant) else PLACEHOLDER
                    for part in node.values
                )
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(FORMAT_FIELD.sub(PLACEHOLDER, node.value))
    return "\n".join(texts)


def test_the_messages_of_troubleshooting_are_those_of_the_code() -> None:
    code = texts_of_code()
    spans = re.findall(r"`([^`]+)`", TEXTS[DOCS / "troubleshooting.md"])
    messages = [" ".join(span.split()) for span in spans if not span.startswith("gptbatch ")]
    messages = [message for message in messages if len(message.split()) >= MIN_WORDS]
    assert len(messages) >= 30
    for message in messages:
        for fragment in message.split(PLACEHOLDER):
            assert fragment.strip() in code, message


def test_variables_of_the_environment_are_documented() -> None:
    found: set[str] = set()
    for path in CODE:
        text = path.read_text(encoding="utf-8")
        for pattern in VARIABLES:
            for match in pattern.finditer(text):
                found.update(match.groups())
    assert {"CXX", "GOMP_SPINCOUNT", "SLURM_PROCID", "WORLD_SIZE"} <= found
    for name in found:
        assert f"`{name}`" in TEXTS[DOCS / "operations.md"], name


# -- examples ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    def shows(self, expected: str) -> bool:
        """Whether its output is as the page shows it; `...` stands for any text."""
        pattern = "[[]".join(expected.strip().split("[")).replace(PLACEHOLDER, "*")
        pattern = pattern.replace("?", "[?]")
        outputs = (self.stdout, self.stderr, self.stdout + self.stderr)
        return any(fnmatch.fnmatchcase(tidy(output), tidy(pattern)) for output in outputs)


def tidy(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


@pytest.fixture(scope="session")
def demo_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the demo once, for all examples that read its output."""
    folder = tmp_path_factory.mktemp("demo")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        assert run_command(["generate", "--config", "demo"]) == 0
    return folder / "out"


def test_the_table_of_readme_is_the_output_of_the_demo(demo_output: Path) -> None:
    rows = {row["prompt_id"]: row for row in pq.read_table(demo_output / "demo").to_pylist()}
    shown = re.findall(
        r"^\| (demo-\d+) \|(.*)\|(.*)\| (\w+) \| (\d+) \|$", TEXTS[README], re.MULTILINE
    )
    assert len(shown) == 3
    for prompt_id, prompt, completion, finish_reason, seed in shown:
        row = rows[prompt_id]
        assert (row["finish_reason"], str(row["seed"])) == (finish_reason, seed)
        for text, cell in ((row["prompt"], prompt), (row["completion"], completion)):
            assert text.replace("\n", "⏎").strip().startswith(cell.strip().removesuffix("…"))


def test_the_keys_of_json_files_are_documented(demo_output: Path) -> None:
    folder = demo_output / "demo"
    manifest = json.loads((folder / "_manifest.json").read_text(encoding="utf-8"))
    (path,) = folder.glob(".gptbatch/runs/*/progress.json")
    progress = json.loads(path.read_text(encoding="utf-8"))
    documented = {
        "output.md": manifest,
        "batch-invariance.md": manifest["environment"],
        "schedulers.md": progress,
        "cli.md": [field.name for field in dataclasses.fields(RunSummary)],
    }
    for page, keys in documented.items():
        for key in keys:
            assert f"`{key}`" in TEXTS[DOCS / page], f"docs/{page}: {key}"


def keys_of(value: object) -> set[str]:
    """Return the keys of an object and of all objects in it."""
    if isinstance(value, list):
        return set().union(*map(keys_of, value))
    if isinstance(value, dict):
        return set(value).union(*map(keys_of, value.values()))
    return set()


def test_the_keys_of_doctor_are_documented() -> None:
    found = examine_machine().to_json()
    # names of packages and of environment variables
    listed = {*found.pop("versions"), *found["extras"], *found["hugging_face"].pop("variables")}
    section = TEXTS[DOCS / "cli.md"].partition("## gptbatch doctor")[2].partition("\n## ")[0]
    for key in keys_of(found) - listed | {"versions", "variables"}:
        assert f"`{key}`" in section, key


def documented_keys(heading: str) -> set[str]:
    """Return the keys in the tables below a heading of json.md."""
    section = TEXTS[DOCS / "json.md"].partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    tables = [block for block in section.strip().split("\n\n") if block.startswith("| key |")]
    cells = [line.split("|")[1] for table in tables for line in table.splitlines()]
    return set(re.findall(r"`(\w+)`", " ".join(cells)))


@pytest.mark.parametrize(
    ("heading", "arguments"),
    [
        ("status --json", ["status", "OUT", "--json"]),
        ("verify", ["verify", "OUT", "--rows", "1"]),
        ("replay --json", ["replay", "OUT", "--prompt-id", "demo-199", "--trace", "--json"]),
        ("diff", ["diff", "OUT", "OUT"]),
        ("export", ["export", "OUT", "--to", "rows.jsonl"]),
        ("report", ["report", "OUT", "OUT", "--html", "report.html"]),
    ],
)
def test_the_keys_of_results_are_documented(
    heading: str,
    arguments: list[str],
    demo_output: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    output = str(demo_output / "demo")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run_command([output if word == "OUT" else word for word in arguments]) == 0
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("{")]
    assert set().union(*map(json.loads, lines)) == documented_keys(heading)


def test_the_methods_of_protocols_are_documented() -> None:
    for protocol in (Progress, Stop, PartSource):
        for name, _ in inspect.getmembers(protocol, inspect.isfunction):
            if not name.startswith("_"):
                assert f"`{name}(" in TEXTS[DOCS / "python.md"], f"{protocol.__name__}.{name}"


@pytest.fixture
def reader_folder(tmp_path: Path, demo_output: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder in which the demo was run, with `gptbatch` on the path, and go there."""
    folder = tmp_path / "work"
    folder.mkdir()
    shutil.copytree(demo_output, folder / "out")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, program in (("python", ""), ("gptbatch", "-m gptbatch")):
        command = bin_folder / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" {program} "$@"\n')
        command.chmod(0o755)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return folder


def console_steps(body: str) -> Iterator[tuple[str, str]]:
    """Yield each command of a console block (`$ `, then `> `) and the output shown for it."""
    command: list[str] = []
    output: list[str] = []
    for line in [*body.splitlines(), "$ "]:
        if line.startswith("$ "):
            if command:
                yield "\n".join(command), "\n".join(output)
            command, output = [line[2:]], []
        elif line.startswith("> ") and not output:
            command.append(line[2:])
        else:
            output.append(line)


# a command without shell syntax, but for variables in front and a file for its output
PLAIN = re.compile(
    r"(?P<variables>(?:\w+=\S+ )*)gptbatch (?P<arguments>[^|<>;&*$]*)(?:> (?P<to>\S+))?"
)


def run_console(command: str, capfd: pytest.CaptureFixture[str]) -> Ended:
    """Run a plain `gptbatch ...` in this process, which has torch loaded; others in bash."""
    plain = PLAIN.fullmatch(command.replace("\\\n", " "))
    if plain is None:
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        return Ended(done.returncode, done.stdout, done.stderr)
    variables = dict(word.split("=", 1) for word in plain["variables"].split())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        capfd.readouterr()
        code = run_command(shlex.split(plain["arguments"]))
    ended = Ended(code, *capfd.readouterr())
    if plain["to"]:
        Path(plain["to"]).write_text(ended.stdout, encoding="utf-8")
    return ended


# names that an example writes, in a shell and in Python
WRITTEN_BY_COMMANDS = re.compile(r"(?<!\S)(?:--output|--to|--html|>>?|mkdir) +([\w./-]+)")
WRITTEN_BY_PYTHON = re.compile(r'(?:output=|Path\(|open\()"([\w./-]+)"')


def written_names(page: Path) -> Iterator[str]:
    """Yield the names that the examples of a page write."""
    for block in BLOCK.finditer(TEXTS[page]):
        if block["reason"]:
            continue
        if block["language"] == "python":
            yield from WRITTEN_BY_PYTHON.findall(block["body"])
        elif block["language"] == "console":
            for command, _ in console_steps(block["body"]):
                words = command.replace("\\\n", " ").partition("<<'END'")[0]
                yield from WRITTEN_BY_COMMANDS.findall(words)


def test_no_two_pages_write_one_name() -> None:
    """All pages can be followed in one folder."""
    pages: dict[str, set[str]] = {}
    for page in PAGES:
        for name in written_names(page):
            pages.setdefault(name, set()).add(page.name)
    assert {name: on for name, on in pages.items() if len(on) > 1} == {}
    assert {"out/try", "try.jsonl", "from-python.jsonl", "many", "compared.html"} <= pages.keys()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("reader_folder")
@pytest.mark.parametrize("page", PAGES, ids=named)
def test_the_examples_run(page: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The blocks of a page, in order, in one folder. A failure is shown by `$ echo $?`."""
    if re.search(r"^\$ jq ", TEXTS[page], re.MULTILINE) and shutil.which("jq") is None:
        pytest.skip("jq is not installed")
    for block in BLOCK.finditer(TEXTS[page]):
        body = block["body"]
        if block["reason"] or block["needs"] or block["language"] == "text":
            continue
        if block["language"] == "python":
            run_python(body, tmp_path)
            continue
        ended = Ended(0, "", "")
        for command, expected in console_steps(body):
            if command == "echo $?":
                assert expected.strip() == str(ended.code), body
                ended = Ended(0, "", "")
                continue
            assert ended.code == 0, (body, ended)
            ended = run_console(command, capfd)
            if expected.strip():
                assert ended.shows(expected), (command, expected, ended)
        assert ended.code == 0, (body, ended)


def run_python(body: str, folder: Path) -> None:
    names: dict[str, object] = {"__name__": "example"}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(body, "example.py", "exec"), names)
        for name, value in names.items():
            if name.startswith("test_") and callable(value):
                (folder / name).mkdir()
                value(folder / name)
