"""Output folders that are damaged, mixed, shared by two jobs, or malicious."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptbatch.jobs.cli import run_command
from gptbatch.pipeline import JobConfig, run_job
from gptbatch.pipeline.audit.run_reader import RunReader
from gptbatch.pipeline.errors import (
    OutOfMemoryError,
    OutputConflictError,
    OutputCreationError,
    StorageError,
)
from gptbatch.pipeline.input.input_digest import input_digest
from gptbatch.pipeline.output import part_writer
from gptbatch.pipeline.output.claim import claim, write_manifest
from gptbatch.pipeline.output.file_hashes import FileHashes
from gptbatch.pipeline.output.finish import finish
from gptbatch.pipeline.output.folder import OutputFolder
from gptbatch.pipeline.output.json_models import Part
from gptbatch.pipeline.output.part_file import FOOTER_KEY, inspect_part
from gptbatch.pipeline.output.part_plan import PartPlan
from gptbatch.pipeline.output.part_writer import PartWriter
from gptbatch.pipeline.output.schema import FORMAT
from gptbatch.pipeline.output.status import output_status
from gptbatch.pipeline.output.stray_tables import find_stray_tables
from gptbatch.pipeline.storage.atomic_write import FileWriter
from gptbatch.pipeline.types import Sample
from tests.test_diff import FACTS, IDENTITY, completion, many, row_defaults, write_run

Command = Callable[..., tuple[int, str, str]]
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def finished(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a checkpoint, prompts, and a run of 7 rows in parts of 3."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(checkpoint, folder / "model")
    rows = [{"id": f"r{i}", "prompt": f"The king {i}"} for i in range(7)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_job(job(folder))
    return folder


def job(folder: Path, **settings: Any) -> JobConfig:
    return JobConfig(
        **{
            "model": str(folder / "model"),
            "input": str(folder / "prompts.jsonl"),
            "output": str(folder / "out"),
            "part_rows": 3,
            "max_new_tokens": 4,
            "engine": {"threads": 1, "attention": "padded"},
            **settings,
        }
    )


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the run that a test may damage."""
    return Path(shutil.copytree(finished / "out", tmp_path / "out"))


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """Run `gptbatch ARGUMENTS...`; return exit code, standard output and standard error."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run_command([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        assert not any(
            ord(character) < 32 and character not in "\n\r\t"
            for character in captured.out + captured.err
        )
        return code, captured.out, captured.err

    return run


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_footer(path: Path, change: Callable[[dict[str, Any]], object] | str) -> None:
    table = pq.read_table(path)
    footer = json.loads(table.schema.metadata[FOOTER_KEY])
    if not isinstance(change, str):
        change(footer)
    text = change if isinstance(change, str) else json.dumps(footer)
    pq.write_table(table.replace_schema_metadata({FOOTER_KEY: text}), path)


# -- types of what is read back --------------------------------------------------------------------

HUGE = 10**1000
MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "parts: [1]": lambda m: m.update(parts=[1]),
    "parts: {}": lambda m: m.update(parts={}),
    "parts: null": lambda m: m.update(parts=None),
    "parts.0.rows": lambda m: m["parts"][0].update(rows="3"),
    "parts.0.name": lambda m: m["parts"][0].update(name="../../etc/passwd"),
    "parts.0 without a digest": lambda m: m["parts"][0].pop("content_digest"),
    "rows: many": lambda m: m.update(rows="many"),
    "rows: huge": lambda m: m.update(rows=HUGE),
    "rows: -1": lambda m: m.update(rows=-1),
    "rows: NaN": lambda m: m.update(rows=float("nan")),
    "complete: 1": lambda m: m.update(complete=1),
    "identity: null": lambda m: m.update(identity=None),
    "identity.rows: many": lambda m: m["identity"].update(rows="many"),
    "identity.rows: huge": lambda m: m["identity"].update(rows=HUGE),
    "identity.part_rows: 0": lambda m: m["identity"].update(part_rows=0),
    "identity.part_rows: [1]": lambda m: m["identity"].update(part_rows=[1]),
    "identity.config_hash": lambda m: m["identity"].update(config_hash=5),
    "identity.model_digest": lambda m: m["identity"].update(model_digest="\x1b]0;x\x07"),
    "environment: []": lambda m: m.update(environment=[]),
    "environment.x: {}": lambda m: m["environment"].update(x={"y": 1}),
    "versions: 5": lambda m: m.update(versions=5),
    "model_path: 5": lambda m: m.update(model_path=5),
    "error_kinds": lambda m: m.update(error_kinds={"\x1b[31m": 1}),
    "error_kinds: [1]": lambda m: m.update(error_kinds=[1]),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_with_wrong_types_is_rebuilt_from_the_parts(
    output: Path, command: Command, name: str
) -> None:
    manifest = output / "_manifest.json"
    change_json(manifest, MANIFESTS[name])
    code, stdout, _ = command("status", output)
    assert code == 0
    assert "problem  _manifest.json is missing or damaged" in stdout
    assert RunReader(output).n_rows == 7
    for part in output.glob("part-*"):
        part.unlink()
    for arguments in (
        ("status", output),
        ("verify", output),
        ("diff", output, output),
        ("replay", output, "--prompt-id", "r1"),
    ):
        code, _, stderr = command(*arguments)
        assert code == 66
        assert "_manifest.json is damaged, or not written by gptbatch: " in stderr


@pytest.mark.parametrize(
    "content",
    [
        "",
        "null",
        "5",
        "[]",
        '"gptbatch-2"',
        "{",
        DEEP,
        '{"format": "gptbatch-2"}',
        '{"format": ' + DEEP + "}",
        "\ufffe",
    ],
)
def test_a_manifest_of_other_content_is_refused_or_rebuilt(
    output: Path, command: Command, content: str
) -> None:
    (output / "_manifest.json").write_text(content)
    assert command("status", output)[0] in (0, 66)
    assert command("diff", output, output)[0] in (0, 66)


FOOTERS: dict[str, Callable[[dict[str, Any]], object] | str] = {
    "no JSON": "{",
    "a list": "[1]",
    "null": "null",
    "deep": DEEP,
    "rows: many": lambda f: f.update(rows="many"),
    "rows: huge": lambda f: f.update(rows=HUGE),
    "rows: 4": lambda f: f.update(rows=4),
    "first_row: 3.0": lambda f: f.update(first_row=3.0),
    "error_kinds: [1]": lambda f: f.update(error_kinds=[1]),
    "error_kinds": lambda f: f.update(error_kinds={"\x1b]0;x\x07": 1}),
    "identity: 5": lambda f: f.update(identity=5),
    "identity.rows: true": lambda f: f["identity"].update(rows=True),
    "environment: null": lambda f: f.update(environment=None),
    "no identity": lambda f: f.pop("identity"),
    "no format": lambda f: f.pop("format"),
}


@pytest.mark.parametrize("name", FOOTERS)
def test_a_footer_with_wrong_types_is_damage(output: Path, command: Command, name: str) -> None:
    change_footer(output / "part-000001.parquet", FOOTERS[name])
    code, stdout, _ = command("status", output)
    assert (code, "damaged 1: generated again by a run of the same shard" in stdout) == (0, True)
    for arguments in (("verify", output), ("diff", output, output)):
        code, _, stderr = command(*arguments)
        assert (code, "part-000001.parquet: cannot be read (" in stderr) == (74, True)
        assert "delete it, and run the command of the run again" in stderr


def test_a_part_with_a_damaged_footer_is_generated_again(finished: Path, output: Path) -> None:
    change_footer(output / "part-000001.parquet", lambda footer: footer.update(rows="many"))
    summary = run_job(job(finished, output=str(output)))
    assert (summary.rows, summary.rows_kept) == (3, 4)


SMALL_FILES = ["progress.json", "crash_journal.json", "records.jsonl", "lock"]
SMALL_CONTENTS = {
    "nothing": "",
    "null": "null",
    "a list": "[1]",
    "deep": DEEP,
    "other types": json.dumps(
        {
            "rows_total": "many",
            "tokens_per_s": [],
            "parts_in_flight": "12",
            "crashes_per_part": {"-1": "x"},
            "prompt_id": 5,
            "host": {},
            "pid": "\x1b[31m",
            "parts": {"part-000000.parquet": {"stat": "x", "sha256": 5}},
            "files": [],
            "input": 5,
        }
    ),
    "huge": json.dumps({"rows_total": 1, "rows_done": 1, "error_rows": 1}).replace("1", str(HUGE)),
    "NaN": (
        '{"rows_total": NaN, "parts_in_flight": [NaN], "crashes_per_part": {}, '
        '"prompt_id": null, "pid": NaN, "parts": NaN}'
    ),
}


@pytest.mark.parametrize("content", SMALL_CONTENTS.values(), ids=SMALL_CONTENTS)
def test_damaged_small_files_are_ignored(
    finished: Path, output: Path, command: Command, content: str
) -> None:
    (folder,) = (output / ".gptbatch" / "runs").iterdir()
    for path in (
        *(folder / name for name in SMALL_FILES),
        output / ".gptbatch" / "digests.json",
        output / ".gptbatch" / "lock",
    ):
        path.write_text(content)
    code, stdout, _ = command("status", output)
    assert (code, "7 of 7" in stdout) == (0, True)
    assert command("diff", output, output)[0] == 0
    (output / "part-000002.parquet").unlink()
    assert run_job(job(finished, output=str(output))).rows == 1


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        ("seed: many", 78, "config.yaml: "),
        ("engine: 5", 78, "field required"),
        ("nonsense: 1", 78, "nonsense"),
        ("[1]", 74, "mapping"),
        ("a: &a [1]\nb: *a", 74, "alias"),
        ("{" * 50_000, 74, "config.yaml: "),
        ('seed: !!int ""', 74, "config.yaml: "),
        ("seed: 2026-99-99", 78, "config.yaml: "),
        (f"seed: {'9' * 5000}", 74, "config.yaml: "),
    ],
)
def test_unreadable_settings_are_reported(
    output: Path, command: Command, content: str, code: int, message: str
) -> None:
    path = output / ".gptbatch" / "config.yaml"
    path.write_text(
        path.read_text().replace("seed: 0\n", content + "\n")
        if content.startswith(("seed", "nonsense"))
        else content
    )
    for arguments in (("verify", output), ("replay", output, "--prompt-id", "r1")):
        found, _, stderr = command(*arguments)
        assert (found, "config.yaml" in stderr, message in stderr) == (code, True, True), stderr
        assert len(stderr) < 1000


def change_column(
    path: Path, name: str, values: list[Any], type_: pa.DataType | None = None
) -> None:
    table = pq.read_table(path)
    place = table.schema.get_field_index(name)
    column = pa.array(values, type_ or table.schema.field(name).type)
    pq.write_table(
        table.set_column(place, pa.field(name, column.type), column).replace_schema_metadata(
            table.schema.metadata
        ),
        path,
    )


@pytest.mark.parametrize(
    ("name", "values", "code", "message"),
    [
        ("seed", [None, 1, 2], 74, "seed is null in a row"),
        ("prompt_id", [None] * 3, 74, "prompt_id is null in a row"),
        (
            "completion_token_ids",
            [[1, None], [1], [2]],
            74,
            "completion_token_ids is null in a row",
        ),
        ("completion_token_ids", ["a", "b", "c"], 74, "part-000000.parquet: cannot be read"),
        ("seed", [-1] * 3, 1, "its seed is -1"),
        ("temperature", [float("nan")] * 3, 1, "its temperature is nan"),
        ("top_k", [-7] * 3, 1, "its top_k is -7"),
        ("max_new_tokens", [0] * 3, 1, "its max_new_tokens is 0"),
        ("prompt", [None] * 3, 1, "it has no prompt"),
        (
            "completion_token_ids",
            [[2**31 - 1] * 4] * 3,
            1,
            "which the model (vocab_size 300) does not have",
        ),
        ("prompt_tokens_dropped", [-5] * 3, 1, "its prompt_tokens_dropped is -5"),
    ],
)
def test_rows_that_no_run_writes_are_mismatches(
    output: Path, command: Command, name: str, values: list[Any], code: int, message: str
) -> None:
    type_ = pa.string() if isinstance(values[0], str) else None
    change_column(output / "part-000000.parquet", name, values, type_)
    found, stdout, stderr = command("verify", output, "--all")
    assert (found, message in stdout + stderr) == (code, True), stdout + stderr
    assert command("diff", output, output)[0] in (0, 74)
    assert command("replay", output, "--prompt-id", "r0")[0] in (0, 66, 74)


def test_a_pickle_is_read_only_with_allow_pickle(
    output: Path, tmp_path: Path, command: Command, checkpoint: Path
) -> None:
    """The author of the folder may have changed its model_path and allow_pickle."""
    model = tmp_path / "pickled"
    shutil.copytree(checkpoint, model)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    change_json(output / "_manifest.json", lambda manifest: manifest.update(model_path=str(model)))
    config = output / ".gptbatch" / "config.yaml"
    config.write_text(config.read_text().replace("allow_pickle: false", "allow_pickle: true"))
    for arguments in (("verify", output), ("replay", output, "--prompt-id", "r1")):
        code, _, stderr = command(*arguments)
        assert (code, "pickle" in stderr) == (78, True)
        assert f"reading the checkpoint {model}, which {output} names" in stderr
        assert "give --allow-pickle" in stderr
        assert "not where it was" not in stderr


def test_a_missing_model_folder_falls_back_to_the_settings(
    output: Path, tmp_path: Path, command: Command
) -> None:
    change_json(
        output / "_manifest.json",
        lambda manifest: manifest.update(model_path=str(tmp_path / "gone")),
    )
    config = output / ".gptbatch" / "config.yaml"
    lines = [
        f"model: {tmp_path / 'elsewhere'}" if line.startswith("model: ") else line
        for line in config.read_text().splitlines()
    ]
    config.write_text("\n".join(lines) + "\n")
    code, _, stderr = command("verify", output)
    assert code == 78
    assert f"reading the checkpoint {tmp_path / 'elsewhere'}, which {output} names" in stderr
    assert "not where it was; name a copy of it with --model" in stderr


# -- links, FIFOs, sockets -------------------------------------------------------------------------

WORK_FILES = [
    "config.yaml",
    "digests.json",
    "errors.jsonl",
    "lock",
    "runs",
]


@pytest.mark.parametrize("name", WORK_FILES)
def test_no_file_is_written_through_a_link(
    finished: Path, output: Path, tmp_path: Path, name: str
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path = output / ".gptbatch" / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(victim)
    (output / "part-000000.parquet").unlink()
    with pytest.raises(OutputConflictError, match=f"{name}: is a symbolic link"):
        run_job(job(finished, output=str(output)))
    output_status(output)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    "name",
    [
        "_manifest.json",
        ".gptbatch/digests.json",
        ".gptbatch/lock",
        ".gptbatch/config.yaml",
    ],
)
def test_a_fifo_in_place_of_a_file_is_refused(
    finished: Path, output: Path, command: Command, name: str
) -> None:
    (output / name).unlink()
    os.mkfifo(output / name)
    with pytest.raises(OutputConflictError, match="is not a regular file"):
        run_job(job(finished, output=str(output)))
    for arguments in (("status", output), ("verify", output), ("diff", output, output)):
        assert command(*arguments)[0] in (0, 66, 74)


def bound_socket(path: Path) -> None:
    """Bind a socket by a relative name, because socket names are short."""
    here = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [os.mkfifo, bound_socket, Path.mkdir, device])
def test_an_entry_that_is_not_a_file_is_not_a_part(
    finished: Path, output: Path, command: Command, make: Callable[[Path], None]
) -> None:
    path = output / "part-000001.parquet"
    path.unlink()
    make(path)
    code, stdout, _ = command("status", output)
    assert code == 0
    assert "part-000001.parquet: is not a part of gptbatch (not a regular file)" in stdout
    assert "rows     4 of 7, 3 left" in stdout
    for arguments in (("verify", output), ("diff", output, output)):
        assert command(*arguments)[0] == 74
    with pytest.raises(OutputConflictError, match="is not a part that gptbatch wrote"):
        run_job(job(finished, output=str(output)))


def test_parts_behind_links_are_read(output: Path, tmp_path: Path, command: Command) -> None:
    """A download from the hub consists of links."""
    for path in output.glob("part-*"):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    assert "7 of 7" in command("status", output)[1]
    assert RunReader(output).n_rows == 7


# -- other tables beside the parts -----------------------------------------------------------------

STRAYS = [
    "part-000000 (1).parquet",
    "part-00000.parquet",
    "part-0000000.parquet",
    "part-000000.parquet.~1~",
    "part-000000 (copy)",
    "PART-00000.PARQUET",
    "merged.parquet",
    "old/part-000000.parquet",
]
HIDDEN = [
    ".part-000000.parquet.Xa1",
    "_part-000000.parquet",
    ".stversions/part-000000.parquet",
    "_old/part-000000.parquet",
]


@pytest.mark.parametrize("name", STRAYS)
def test_a_stray_table_is_reported(
    finished: Path, output: Path, command: Command, name: str
) -> None:
    stray = output / name
    stray.parent.mkdir(exist_ok=True)
    shutil.copy(output / "part-000000.parquet", stray)
    assert len(pd.read_parquet(output)) == 7 + 3
    message = f"readers will also read {name}, which is no part of the run"
    found = output_status(output)
    assert (found.state, found.rows_missing) == ("unfinished", 0)
    assert any(problem.startswith(message) for problem in found.problems)
    for arguments, expected in (
        (("verify", output), 74),
        (("diff", output, finished / "out"), 0),
        (("diff", finished / "out", output), 0),
    ):
        code, _, stderr = command(*arguments)
        assert (code, stderr.count(message)) == (expected, 1), arguments
    for settings in ({}, {"overwrite": True}):
        with pytest.raises(OutputConflictError, match=re.escape(message)):
            run_job(job(finished, output=str(output), **settings))
    assert stray.exists()


@pytest.mark.parametrize("name", [*HIDDEN, "notes.txt", "part-000000.parquet.sha256"])
def test_files_that_readers_ignore_are_not_stray(
    finished: Path, output: Path, command: Command, name: str
) -> None:
    path = output / name
    path.parent.mkdir(exist_ok=True)
    if name in HIDDEN:
        shutil.copy(output / "part-000000.parquet", path)
        assert len(pd.read_parquet(output)) == 7
    else:
        path.write_text("text")
    assert output_status(output).state == "complete"
    assert command("verify", output)[0] == 0
    assert run_job(job(finished, output=str(output))).rows_kept == 7


@pytest.mark.parametrize("target", ["../elsewhere", "../elsewhere/deeper/.."])
def test_a_link_to_a_folder_of_tables_is_followed(
    output: Path, tmp_path: Path, target: str
) -> None:
    """Readers follow links; a link to a parent folder is followed once."""
    (tmp_path / "elsewhere/deeper").mkdir(parents=True)
    shutil.copy(output / "part-000000.parquet", tmp_path / "elsewhere")
    (output / "old").symlink_to(target)
    assert len(pd.read_parquet(output)) == 7 + 3
    (tmp_path / "elsewhere/loop").symlink_to(".")
    (tmp_path / "elsewhere/self").symlink_to("self")
    assert find_stray_tables(output) == ["old/part-000000.parquet"]


def test_another_programs_table_under_a_parts_name(output: Path, command: Command) -> None:
    pq.write_table(pa.table({"a": [1]}), output / "part-000007.parquet")
    code, _, stderr = command("verify", output)
    assert (code, "readers will also read part-000007.parquet" in stderr) == (74, True)


def test_many_stray_tables_are_counted(output: Path) -> None:
    for number in range(9):
        shutil.copy(output / "part-000000.parquet", output / f"copy {number}.parquet")
    (problem,) = output_status(output).problems
    assert problem == (
        "readers will also read copy 0.parquet, copy 1.parquet, copy 2.parquet and 6 more, "
        "which are no parts of the run; move them away"
    )


def test_a_copy_that_appears_during_the_run_keeps_it_from_being_complete(tmp_path: Path) -> None:
    OutputFolder(tmp_path).create()
    mine, plan, facts = writer(tmp_path, 2)
    claim(OutputFolder(tmp_path), files(tmp_path), "seed: 0\n", facts)
    part = add(mine, range(2))
    shutil.copy(tmp_path / part.name, tmp_path / "part-000000 (1).parquet")
    with pytest.raises(
        OutputConflictError, match=r"readers will also read part-000000 \(1\)\.parquet"
    ):
        finish(
            OutputFolder(tmp_path),
            files(tmp_path),
            plan.identity,
            FileHashes(),
            {0: part},
            row_defaults(),
        )
    assert not (tmp_path / "_SUCCESS").exists()


# -- a manifest that promises more, or is of another run -------------------------------------------


@pytest.mark.parametrize("rows", [8, 10**9, 2**63 - 1])
def test_a_manifest_with_more_rows_than_the_parts_is_not_complete(
    output: Path, command: Command, rows: int
) -> None:
    change_json(output / "_manifest.json", lambda manifest: manifest["identity"].update(rows=rows))
    for path in output.glob("part-*"):
        change_footer(path, lambda footer: footer["identity"].update(rows=rows))
    found = output_status(output)
    missing = -(-rows // 3) - 3
    assert (found.state, found.rows_total, found.n_parts_missing) == ("unfinished", rows, missing)
    assert found.parts_missing == list(range(3, 3 + min(missing, 1000)))
    code, stdout, _ = command("status", output)
    assert (code, len(stdout) < 1000) == (0, True)
    code, stdout, stderr = command("verify", output)
    assert (code, json.loads(stdout.splitlines()[-1])["complete"]) == (74, False)
    assert f"is marked complete, but holds 7 of {rows} rows" in stderr


@pytest.mark.parametrize("other", ["gptbatch-1", "gptbatch-99", "gptbatch-2-00000000"])
def test_a_manifest_of_another_format_than_its_parts(
    output: Path, command: Command, other: str
) -> None:
    change_json(output / "_manifest.json", lambda manifest: manifest.update(format=other))
    expected = f"format {other} / {FORMAT}"
    code, stdout, _ = command("status", output)
    assert (code, "holds no part of job" in stdout, expected in stdout) == (0, True, True)
    for arguments in (("verify", output), ("diff", output, output)):
        code, _, stderr = command(*arguments)
        assert (code, expected in stderr) == (78, True)


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo, bound_socket])
def test_a_work_folder_that_is_not_a_folder_is_refused(
    finished: Path, output: Path, command: Command, make: Callable[[Path], None]
) -> None:
    shutil.rmtree(output / ".gptbatch")
    make(output / ".gptbatch")
    code, stdout, _ = command("status", output)
    assert (code, ".gptbatch is not a folder" in stdout) == (0, True)
    code, _, stderr = command("verify", output)
    assert (code, ".gptbatch: is not a folder" in stderr) == (74, True)
    for settings in ({}, {"overwrite": True}, {"seed": 1}):
        with pytest.raises(
            OutputConflictError,
            match=r"\.gptbatch: is not a folder; move it away, or name another output",
        ):
            run_job(job(finished, output=str(output), **settings))


# -- damage and trouble ----------------------------------------------------------------------------

TROUBLE: list[tuple[Exception, type[Exception], str]] = [
    (OSError(errno.EIO, "Input/output error"), StorageError, "Input/output error"),
    (PermissionError(errno.EACCES, "Permission denied"), StorageError, "Permission denied"),
    (OSError(errno.EMFILE, "Too many open files"), StorageError, "Too many open files"),
    (RuntimeError("can't start new thread"), StorageError, "can't start new thread"),
    (MemoryError("malloc"), OutOfMemoryError, "out of memory"),
    (pa.ArrowMemoryError("malloc of size 64 failed"), OutOfMemoryError, "out of memory"),
]


@pytest.mark.parametrize(("error", "kind", "message"), TROUBLE, ids=lambda value: str(value)[:20])
def test_a_read_error_is_not_damage(
    finished: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    kind: type[Exception],
    message: str,
) -> None:
    """The part is whole: it is not generated again."""

    def fail(*arguments: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr("gptbatch.pipeline.output.part_file.pq.read_metadata", fail)
    with pytest.raises(kind, match=rf"part-000000\.parquet: cannot be read.*{message}"):
        inspect_part(output / "part-000000.parquet")
    with pytest.raises(kind, match=rf"part-00000.\.parquet: cannot be read.*{message}"):
        RunReader(output)


@pytest.mark.parametrize(
    "error",
    [
        pa.ArrowInvalid("bad magic"),
        OSError("Corrupt snappy data"),
        pa.ArrowNotImplementedError("codec"),
    ],
)
def test_damage_keeps_its_cause(
    output: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr("gptbatch.pipeline.output.part_file.pq.read_metadata", fail)
    found = inspect_part(output / "part-000000.parquet")
    assert (found.state, found.problem) == ("damaged", str(error))


class BrokenDisk:
    """A file whose reads fail with an error that lacks its name."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        pass

    def __enter__(self) -> BrokenDisk:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def read(self, size: int = -1) -> bytes:
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("name", ["_manifest.json", ".gptbatch/config.yaml"])
def test_a_failing_disk_is_reported_with_the_file(
    output: Path, command: Command, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from gptbatch.pipeline.storage import regular_file

    opened = regular_file.open_regular

    def open_regular(path: Path) -> Any:
        return BrokenDisk() if path == output / name else opened(path)

    monkeypatch.setattr(regular_file, "open_regular", open_regular)
    code, _, stderr = command("verify", output)
    assert (code, f"{output / name}: cannot be read (Input/output error)" in stderr) == (74, True)


def test_a_failing_hash_names_the_file(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptbatch.pipeline.storage.regular_file import file_sha256

    def fail(*arguments: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("hashlib.file_digest", fail)
    with pytest.raises(OSError, match="part-000000"):
        file_sha256(output / "part-000000.parquet")


def test_a_part_that_reads_back_differently_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: BinaryIO, name: str) -> Part:
        raise OSError("page 3: CRC differs")

    monkeypatch.setattr(part_writer, "read_part", fail)
    with pytest.raises(
        StorageError,
        match=(
            r"reads back differently from what was written \(page 3: CRC differs\); "
            r"is the disk failing\?"
        ),
    ):
        write_run(tmp_path / "out", many(2))
    assert not list((tmp_path / "out").glob("part-*"))


@pytest.mark.parametrize(
    "name", ["run:1", "nightly-2026-11-27T02:55", "a b", "100%", "s=1", "ä", "x#y?z"]
)
def test_output_folders_of_any_name_work(tmp_path: Path, name: str) -> None:
    out = write_run(tmp_path / name, many(3))
    assert (RunReader(out).n_rows, output_status(out).state) == (3, "complete")


# -- two jobs, one folder --------------------------------------------------------------------------

OTHER = {"config_hash": "e" * 64, "seed": 1}


def files(path: Path) -> FileWriter:
    return FileWriter(path / ".gptbatch")


def writer(path: Path, count: int, **identity: Any) -> tuple[PartWriter, PartPlan, dict[str, Any]]:
    digests = [identity.get("digest", "0" * 64)] * (count // 2)
    plan = PartPlan(
        identity={
            **IDENTITY,
            "rows": count,
            "part_rows": 2,
            "input_digest": input_digest(digests),
            **identity,
        },
        input_digests=digests,
    )
    facts = {"format": FORMAT, "identity": plan.identity, **FACTS}
    return (
        PartWriter(path, files(path), FileHashes(), plan=plan, facts=facts),
        plan,
        facts,
    )


def add(part_writer: PartWriter, indices: range, token: int = 5) -> Part:
    """Write the part that holds these rows."""
    rows = [parts_row(completion(f"id {index}", [token]), index) for index in indices]
    return part_writer.write(indices[0] // 2, [[Sample(row, "text")] for row in rows])


def parts_row(row: Any, index: int) -> Any:
    return dataclasses.replace(row, prompt=dataclasses.replace(row.prompt, index=index))


@pytest.fixture(params=["hard links", "no hard links"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param == "no hard links":

        def refuse(*arguments: Any) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr("gptbatch.pipeline.storage.atomic_write.os.link", refuse)
    OutputFolder(tmp_path / "out").create()
    return tmp_path / "out"


@pytest.mark.parametrize(
    "other",
    [{"config_hash": "e" * 64, "seed": 1}, {"record_logits_digest": True}, {"digest": "1" * 64}],
    ids=["another seed", "another column", "another input"],
)
def test_a_part_of_another_job_is_never_replaced(folder: Path, other: dict[str, Any]) -> None:
    first = {"record_logits_digest": False}
    mine = add(writer(folder, 4, **first)[0], range(2))
    before = (folder / mine.name).read_bytes()
    with pytest.raises(
        OutputConflictError, match=r"part-000000\.parquet: is a part of another (job|input)"
    ):
        add(writer(folder, 4, **{**first, **other})[0], range(2))
    assert (folder / mine.name).read_bytes() == before
    assert not list((folder / ".gptbatch").glob("*.tmp"))


def test_an_equal_part_of_another_run_is_kept(folder: Path) -> None:
    first = add(writer(folder, 4)[0], range(2))
    inode = (folder / first.name).stat().st_ino
    assert add(writer(folder, 4)[0], range(2)) == first
    assert (folder / first.name).stat().st_ino == inode
    with pytest.raises(OutputConflictError, match="its rows differ"):
        add(writer(folder, 4)[0], range(2), token=6)


@pytest.mark.parametrize("damage", ["truncated", "empty", "shorter", "misplaced"])
def test_a_part_of_this_job_that_is_not_whole_is_replaced(folder: Path, damage: str) -> None:
    whole = add(writer(folder, 4)[0], range(2))
    path = folder / whole.name
    if damage == "shorter":  # of a smaller limit
        path.unlink()
        plan = PartPlan(
            identity={**IDENTITY, "rows": 1, "part_rows": 2, "input_digest": "2" * 64},
            input_digests=["3" * 64],
        )
        facts = {"format": FORMAT, "identity": plan.identity, **FACTS}
        add(
            PartWriter(folder, files(folder), FileHashes(), plan=plan, facts=facts),
            range(1),
        )
    elif damage == "misplaced":
        add(writer(folder, 4)[0], range(2, 4))
        path.unlink()
        (folder / "part-000001.parquet").rename(path)
    else:
        path.write_bytes(b"" if damage == "empty" else path.read_bytes()[:1000])
    assert add(writer(folder, 4)[0], range(2)) == whole
    assert inspect_part(path).part == whole


def test_a_folder_with_a_part_of_another_job_is_never_complete(folder: Path) -> None:
    """A part of another job takes a free name during the run."""
    mine, plan, facts = writer(folder, 4)
    claim(OutputFolder(folder), files(folder), "seed: 0\n", facts)
    done = {part.number: part for part in (add(mine, range(2)), add(mine, range(2, 4)))}
    (folder / "part-000001.parquet").unlink()
    add(writer(folder, 4, **OTHER)[0], range(2, 4))
    with pytest.raises(
        OutputConflictError,
        match=r"part-000001\.parquet: is a part of another job \(seed: 1 there, 0 here\)",
    ):
        finish(
            OutputFolder(folder), files(folder), plan.identity, FileHashes(), done, row_defaults()
        )
    assert not (folder / "_SUCCESS").exists()
    assert json.loads((folder / "_manifest.json").read_text())["complete"] is False
    assert (
        "holds parts of 2 jobs: 1 of job ffffffff, 1 of job eeeeeeee "
        "(part-000001.parquet; seed 0 / 1)"
    ) in output_status(folder).problems
    with pytest.raises(OutputConflictError, match="holds parts of 2 jobs"):
        RunReader(folder)


def test_the_manifest_is_claimed_once(folder: Path) -> None:
    _, _, facts = writer(folder, 4)
    _, _, other = writer(folder, 4, **OTHER)
    output, work = OutputFolder(folder), files(folder)
    claim(output, work, "seed: 0\n", facts)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    acts: list[Callable[[], object]] = [
        lambda: claim(output, work, "seed: 1\n", other),
        lambda: claim(output, work, "seed: 1\n", other, joins=True),
        lambda: write_manifest(output, work, other, "{}"),
    ]
    for act in acts:
        with pytest.raises(
            OutputConflictError,
            match=r"another job has begun there since \(seed: 0 there, 1 here\)",
        ):
            act()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    claim(output, work, "seed: 0\n", facts)
    claim(output, work, "seed: 1\n", other, replaces=facts["identity"])


def test_parts_of_two_jobs_in_one_folder_are_refused(tmp_path: Path, command: Command) -> None:
    """Without manifests, the footers identify the jobs."""
    a, b = write_run(tmp_path / "a", many(8)), write_run(tmp_path / "b", many(6), identity=OTHER)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for path in [*sorted(a.glob("part-*"))[:2], *sorted(b.glob("part-*"))[2:]]:
        shutil.copy(path, mixed)
    code, stdout, _ = command("status", mixed)
    assert code == 0
    assert (
        "holds parts of 2 jobs: 2 of job ffffffff, 1 of job eeeeeeee "
        "(part-000002.parquet; seed 0 / 1)"
    ) in stdout
    assert "a copy without .gptbatch/config.yaml" in stdout
    assert "rows     4 of 8, 4 left" in stdout
    for arguments in (
        ("verify", mixed),
        ("diff", mixed, a),
        ("replay", mixed, "--prompt-id", "id 0"),
    ):
        code, _, stderr = command(*arguments)
        assert (code, "holds parts of 2 jobs" in stderr) == (78, True)


def test_a_part_with_more_rows_than_its_name_says_is_not_counted(tmp_path: Path) -> None:
    """The number of missing rows is never negative."""
    a = write_run(tmp_path / "a", many(2), part_rows=2)
    shutil.copy(a / "part-000000.parquet", a / "part-000001.parquet")
    found = output_status(a)
    assert (found.rows_done, found.rows_missing, found.state) == (2, 0, "unfinished")
    assert any(
        "part-000001.parquet: it holds rows 0 to 1 of its run" in problem
        for problem in found.problems
    )


# -- failed runs, empty runs, other versions -------------------------------------------------------


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"part_rows": 2}, {"max_new_tokens": 2}, {"limit": 2}]
)
def test_a_run_without_parts_leaves_the_folder_free(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    from gptbatch.pipeline.output.part_runner import PartRunner

    def fail(self: PartRunner) -> None:
        raise StorageError("no")

    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(PartRunner, "run", fail)
        with pytest.raises(StorageError):
            run_job(job(finished, output=str(output)))
    assert (output / "_manifest.json").exists()
    assert run_job(job(finished, output=str(output), **change)).rows == change.get("limit", 7)


def test_verify_of_no_rows_is_not_a_success(
    finished: Path, tmp_path: Path, output: Path, command: Command
) -> None:
    for part in output.glob("part-*"):
        part.unlink()
    code, _, stderr = command("verify", output)
    assert (code, "nothing was checked: it holds no rows yet" in stderr) == (66, True)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    run_job(job(finished, output=str(tmp_path / "empty"), input=str(empty)))
    code, stdout, _ = command("verify", tmp_path / "empty")
    assert (code, "the run is complete and has no rows" in stdout) == (0, True)
    empty.write_text(json.dumps({"prompt": "king " * 300}) + "\n")
    run_job(job(finished, output=str(tmp_path / "errors"), input=str(empty)))
    code, _, stderr = command("verify", tmp_path / "errors")
    assert (code, "nothing was checked: the row looked at is an error row" in stderr) == (
        66,
        True,
    )


def test_another_format_is_not_continued(finished: Path, output: Path) -> None:
    for path in [output / "_manifest.json"]:
        change_json(path, lambda manifest: manifest.update(format="gptbatch-1"))
    with pytest.raises(
        OutputConflictError,
        match=(
            "holds a run of format gptbatch-1, "
            rf"and this version writes {FORMAT}.*gptbatch 0\.1\.0"
        ),
    ):
        run_job(job(finished, output=str(output)))
    change_json(output / "_manifest.json", lambda manifest: manifest.update(format=FORMAT))
    change_footer(output / "part-000001.parquet", lambda footer: footer.update(format="gptbatch-1"))
    with pytest.raises(OutputConflictError, match=r"part-000001\.parquet: has format gptbatch-1"):
        run_job(job(finished, output=str(output)))


def test_error_rows_are_counted_at_the_end(
    finished: Path, tmp_path: Path, command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": "king " * (300 if i < 2 else 1)}) + "\n" for i in range(5))
    )
    arguments = [
        "generate",
        "--model",
        finished / "model",
        "--input",
        path,
        "--output",
        tmp_path / "out",
        "--max-new-tokens",
        "2",
    ]
    said = (
        "2 of 5 rows are errors: 2 too_long "
        "(context_overflow: truncate_left keeps the end of such prompts)"
    )
    for more in (["--dry-run"], []):
        caplog.clear()
        code, stdout, _ = command(*arguments, *more)
        assert (
            code,
            [said in record.message for record in caplog.records if record.levelname == "WARNING"],
        ) == (0, [True])
        summary = json.loads(stdout.splitlines()[-1])
        assert (summary["error_kinds"] == {"too_long": 2}) if more else (summary["errors"] == 2)


@pytest.mark.parametrize(
    ("prepare", "settings", "code"),
    [
        (lambda output: None, ["--seed", "1"], 78),
        (lambda output: (output / "_manifest.json").write_text("{}"), [], 78),
        (
            lambda output: (
                (output / ".gptbatch" / "lock").symlink_to("x")
                if not (output / ".gptbatch" / "lock").unlink()
                else None
            ),
            [],
            78,
        ),
        (lambda output: None, ["--seed", "1", "--overwrite"], 0),
        (lambda output: None, [], 0),
    ],
)
def test_a_dry_run_checks_the_output(
    finished: Path,
    output: Path,
    command: Command,
    prepare: Callable[[Path], object],
    settings: list[str],
    code: int,
) -> None:
    prepare(output)
    before = sorted(output.rglob("*"))
    arguments = [
        "generate",
        "--model",
        finished / "model",
        "--input",
        finished / "prompts.jsonl",
        "--output",
        output,
    ]
    found = command(*arguments, "--max-new-tokens", "4", "--part-rows", "3", "--dry-run", *settings)
    assert found[0] == code, found[2]
    assert sorted(output.rglob("*")) == before


def test_a_dry_run_reports_an_output_that_cannot_be_created(
    finished: Path, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "file").write_text("mine")
    arguments = [
        "generate",
        "--model",
        finished / "model",
        "--input",
        finished / "prompts.jsonl",
        "--dry-run",
        "--output",
    ]
    assert command(*arguments, tmp_path / "file" / "out")[0] == 73
    assert command(*arguments, tmp_path / "file")[0] == 78
    assert command(*arguments, tmp_path / "new" / "out")[0] == 0
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc, where no folder can be made")
def test_a_dry_run_tries_to_write_where_permissions_do_not_tell(
    finished: Path, command: Command
) -> None:
    """For root, os.access allows everything."""
    found = command(
        *("generate", "--model", finished / "model", "--input", finished / "prompts.jsonl"),
        *("--dry-run", "--output", "/proc/x/out"),
    )
    assert found[0] == 73
    assert "/proc/x/out: cannot be created: /proc is not a writable folder (" in found[2]


def test_a_dry_run_finds_a_folder_read_only(
    finished: Path,
    output: Path,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Parts go into the folder above `.gptbatch`. A complete output needs no write."""
    writable = tempfile.TemporaryFile

    def refuse(**options: Any) -> Any:
        if options["dir"] == output:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return writable(**options)

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    longer = tmp_path / "longer.jsonl"
    longer.write_text((finished / "prompts.jsonl").read_text() + '{"id": "new", "prompt": "A"}\n')

    def dry_run(*more: str | Path, source: Path = finished / "prompts.jsonl") -> tuple[int, bool]:
        code, _, stderr = command(
            *("generate", "--model", finished / "model", "--input", source, "--output", output),
            *("--max-new-tokens", "4", "--part-rows", "3", "--dry-run", *more),
        )
        return code, "out: cannot be written (Read-only file system)" in stderr

    assert dry_run() == (0, False)
    assert dry_run("--overwrite") == (73, True)
    assert dry_run(source=longer) == (73, True)
    (output / "part-000000.parquet").unlink()
    assert dry_run() == (73, True)
    assert dry_run("--shard", "1/2") == (0, False)
    (output / "_SUCCESS").unlink()
    assert dry_run("--shard", "1/2") == (73, True)


@pytest.mark.parametrize("inside", ["", ".gptbatch"])
def test_a_folder_that_cannot_be_written(
    inside: str, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A complete run needs no write; one that is not complete does."""
    tried: list[Path] = []

    def refuse(**options: Path) -> IO[bytes]:
        tried.append(options["dir"])
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    if not inside:
        shutil.rmtree(output / ".gptbatch")
    OutputFolder(output).check_creatable()
    assert not tried
    (output / "_SUCCESS").unlink()
    with pytest.raises(
        OutputCreationError, match=r"out: cannot be written \(Read-only file system"
    ):
        OutputFolder(output).check_creatable()
    assert tried == [output / inside]


def test_a_limit_of_one_on_an_input_that_became_shorter(
    finished: Path, output: Path, command: Command, tmp_path: Path
) -> None:
    """Without the limit, the input would still be too short."""
    (tmp_path / "short.jsonl").write_text('{"id": "r0", "prompt": "The king 0"}\n')
    run = ["generate", "--model", finished / "model", "--input", tmp_path / "short.jsonl"]
    run += ["--output", output, "--max-new-tokens", "4", "--part-rows", "3", "--dry-run"]
    code, _, stderr = command(*run, "--limit", "1")
    assert code == 78
    assert "limit takes the first row. Rows are added to an output" in stderr
    assert "leave limit out or raise it, if the input still has 7 rows; for the first row" in stderr
    code, _, stderr = command(*run)
    assert (code, "holds a run of 7 rows, but the input has 1;" in stderr) == (78, True)


def test_a_dry_run_counts_the_rows_that_a_run_keeps(
    finished: Path, output: Path, command: Command
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (output, *output.rglob("*"))}
    run = ["generate", "--model", finished / "model", "--input", finished / "prompts.jsonl"]
    run += ["--output", output, "--max-new-tokens", "4", "--part-rows", "3"]
    rows = RunReader(output).n_rows
    code, stdout, stderr = command(*run, "--dry-run")
    assert (code, json.loads(stdout)["rows_kept"]) == (0, rows)
    assert f"the output holds {rows} of the rows, which a run keeps\n" in stderr
    assert {path: path.stat().st_mtime_ns for path in (output, *output.rglob("*"))} == before
    code, stdout, _ = command(*run, "--dry-run", "--shard", "0/2")
    assert 0 < json.loads(stdout)["rows_kept"] < rows
    part = output / "part-000000.parquet"
    part.write_bytes(part.read_bytes()[:-100])
    code, stdout, _ = command(*run, "--dry-run")
    assert (code, json.loads(stdout)["rows_kept"]) == (0, rows - 3)
    assert json.loads(command(*run)[1].splitlines()[-1])["rows_kept"] == rows - 3
    code, stdout, stderr = command(*run, "--dry-run", "--overwrite")
    assert (json.loads(stdout)["rows_kept"], "which a run keeps" in stderr) == (0, False)
