"""Durability: the command in child processes, with kills, signals and failing disks."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptbatch.pipeline.output.crash_journal import read_crash_journal
from gptbatch.pipeline.output.part_file import inspect_part
from gptbatch.pipeline.output.schema import DETERMINISTIC_COLUMNS
from gptbatch.pipeline.storage.atomic_write import TEMPORARY_NAME
from tests.faults import STEPS
from tests.launcher import Child, Launcher
from tests.processes import LIMIT_S, child_environment, wait_for

WriteRows = Callable[..., Path]
ROWS: list[dict[str, Any]] = [
    {"id": f"r{i}", "prompt": "The king is dead. " * (i % 4), "note": i} for i in range(40)
]
ROWS[7]["prompt"] = "king " * 200  # more than n_positions tokens: an error row


class Setting:
    """A job, and the table of its undisturbed run."""

    def __init__(
        self, launcher: Launcher, checkpoint: Path, folder: Path, rows: list[dict[str, Any]]
    ) -> None:
        self.launcher, self.folder = launcher, folder
        self.input = folder / "prompts.jsonl"
        self.write(rows)
        self.arguments = [
            "generate",
            "--model",
            str(checkpoint),
            "--input",
            str(self.input),
            "--max-new-tokens",
            "12",
            "--part-rows",
            "6",
        ]
        self.arguments += ["--batch-size", "4", "--threads", "1"]
        code, child = self.run(folder / "undisturbed")
        assert code == 0, child.stderr
        self.expected = table(folder / "undisturbed")

    def write(self, rows: list[dict[str, Any]]) -> None:
        self.input.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def start(self, output: Path, *more: str, **settings: Any) -> Child:
        """Start the command; `more` are options, which replace those of the same name."""
        given = {argument.partition("=")[0] for argument in more}
        pairs = zip(self.arguments[1::2], self.arguments[2::2], strict=True)
        kept = [
            argument for name, value in pairs if name not in given for argument in (name, value)
        ]
        return self.launcher.start("generate", *kept, "--output", output, *more, **settings)

    def run(self, output: Path, *more: str, **settings: Any) -> tuple[int, Child]:
        child = self.start(output, *more, **settings)
        return child.wait(), child

    def check_complete(self, output: Path, *, runs: int = 1) -> None:
        """Check that the folder holds the files of an undisturbed run, and no others."""
        found = table(output)
        ids = found["prompt_id"].to_pylist()
        assert len(set(ids)) == len(ids)
        assert found.equals(self.expected)
        assert (output / "_SUCCESS").exists()
        assert json.loads((output / "_manifest.json").read_text())["complete"] is True
        assert sorted(path.name for path in output.iterdir() if path.name[0] not in "_.") == [
            f"part-{k:06d}.parquet" for k in range(-(-len(ids) // 6))
        ]
        assert not [path for path in output.rglob("*") if TEMPORARY_NAME.fullmatch(path.name)]
        assert not list(output.glob(".gptbatch/runs/*/crash_journal.json"))
        assert len(list(output.glob(".gptbatch/runs/*"))) == runs


def table(output: Path) -> pa.Table:
    """Return the deterministic columns of all parts."""
    parts = [
        pq.read_table(path, columns=DETERMINISTIC_COLUMNS)
        for path in sorted(output.glob("part-*.parquet"))
    ]
    return pa.concat_tables(parts).combine_chunks()


def run_states(output: Path) -> list[str]:
    """Return the state in the progress file of each run."""
    states = []
    for path in sorted(output.glob(".gptbatch/runs/*/progress.json")):
        # The folder of a dead run may be deleted now.
        with suppress(FileNotFoundError):
            states.append(json.loads(path.read_text())["state"])
    return states


def check_parts(output: Path) -> None:
    """Check that every visible part is whole."""
    for path in output.glob("part-*.parquet"):
        assert inspect_part(path).state == "sound"


@pytest.fixture(scope="module")
def setting(
    launcher: Launcher, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Setting:
    return Setting(launcher, checkpoint, tmp_path_factory.mktemp("setting"), ROWS)


SLOW = ("slow step", "0.01")  # for a run that is to be caught half-way, on machines of any speed


LONG_ROWS = [{"id": f"r{i}", "prompt": f"{i} The king", "note": "x" * 200} for i in range(300)]


@pytest.fixture(scope="module")
def long(launcher: Launcher, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Return a job that is long enough to be disturbed, with an input larger than all buffers."""
    rows = LONG_ROWS
    return Setting(launcher, checkpoint, tmp_path_factory.mktemp("long"), rows)


def wait_for_parts(output: Path, count: int) -> None:
    wait_for(lambda: len(list(output.glob("part-*.parquet"))) >= count, f"{count} parts")


# -- faults at each step of a commit ---------------------------------------------------------------

# per step: the first error in make test, the second one takes the same path
CAN_FAIL = {
    "write": ("ENOSPC", "EIO"),
    "close": ("EIO", "ENOSPC"),
    "fsync": ("EIO", "ENOSPC"),
    "replace": ("ENOSPC", "EIO"),
    "folder": ("EIO",),
    "manifest": ("ENOSPC", "EIO"),
    "success": ("EIO", "ENOSPC"),
}


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        pytest.param(step, kind, marks=pytest.mark.slow if kind in CAN_FAIL[step][1:] else ())
        for step in STEPS
        for kind in ("kill", *CAN_FAIL[step])
    ],
)
def test_a_fault_at_any_step_of_a_commit_loses_nothing(
    setting: Setting, tmp_path: Path, step: str, kind: str
) -> None:
    output = tmp_path / "out"
    code, child = setting.run(output, fault=(step, kind))
    assert code == (-signal.SIGKILL if kind == "kill" else 74), child.stderr
    if kind != "kill":
        assert f"cannot be written ({os.strerror({'ENOSPC': 28, 'EIO': 5}[kind])})" in child.stderr
        assert "Traceback" not in child.stderr
        assert not [path for path in output.rglob("*") if TEMPORARY_NAME.fullmatch(path.name)]
    check_parts(output)
    assert (output / "part-000000.parquet").exists()
    assert (output / "part-000001.parquet").exists() == (
        step in ("manifest", "success", "folder") or (step, kind) == ("replace", "kill")
    )
    assert (output / "_SUCCESS").exists() == ((step, kind) == ("success", "kill"))
    before = {path: path.stat().st_mtime_ns for path in output.glob("part-*.parquet")}
    code, child = setting.run(output)
    assert code == 0, child.stderr
    setting.check_complete(output)
    assert child.summary["rows"] + child.summary["rows_kept"] == 40
    assert {path: path.stat().st_mtime_ns for path in before} == before, (
        "what was written is not written again"
    )


# -- kills -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments_lose_nothing(
    setting: Setting, tmp_path: Path, rounds: int
) -> None:
    """Kill, continue and kill a run again, up to five times; `make soak` runs 500 rounds."""
    from tests.soak import soak

    assert soak(setting, tmp_path, rounds=rounds, seed=1) > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_stops_a_run_that_can_be_continued(
    long: Setting, tmp_path: Path, number: int
) -> None:
    output = tmp_path / "out"
    child = long.start(output, fault=SLOW)
    wait_for_parts(output, 3)
    child.send_signal(number)
    assert child.wait() == 75
    name = signal.Signals(number).name
    assert f"stopped by {name}; " in child.stderr
    assert "run the same command again to go on" in child.stderr
    assert "Traceback" not in child.stderr
    assert not (output / "_SUCCESS").exists()
    check_parts(output)
    assert run_states(output) == ["stopped"]
    shown = long.launcher.run("status", output)[1].stdout
    assert f"{output}: unfinished\n" in shown
    assert "next     the run was stopped; run the same command again\n" in shown
    assert not list(output.glob(".gptbatch/runs/*/crash_journal.json")), "a stop is not a crash"
    done = sum(pq.read_metadata(path).num_rows for path in output.glob("part-*.parquet"))
    assert 18 <= done < 300
    code, child = long.run(output)
    assert code == 0, child.stderr
    assert (child.summary["rows_kept"], child.summary["rows"]) == (done, 300 - done)
    long.check_complete(output)


def wait_for_temporary_part(output: Path) -> None:
    """Wait until the thread is writing a part."""
    wait_for(lambda: list(output.glob(".gptbatch/runs/*/part-*.tmp")), "a part that is written")


def test_a_stop_waits_for_the_part_that_is_being_written(setting: Setting, tmp_path: Path) -> None:
    """The engine has finished more rows meanwhile. Their parts are written, too, if complete."""
    output = tmp_path / "out"
    child = setting.start(output, fault=("slow part", "0.5"))
    wait_for_temporary_part(output)
    child.send_signal(signal.SIGTERM)
    assert child.wait() == 75, child.stderr
    parts = sorted(path.name for path in output.glob("part-*.parquet"))
    assert f"stopped by SIGTERM; {len(parts)} part" in child.stderr
    assert parts[0] == "part-000000.parquet"
    check_parts(output)
    assert not [path for path in output.rglob("*") if TEMPORARY_NAME.fullmatch(path.name)]
    assert not list(output.glob(".gptbatch/runs/*/crash_journal.json")), "a stop is not a crash"
    code, child = setting.run(output)
    assert (code, child.summary["rows_kept"]) == (0, sum_of_rows(output, parts)), child.stderr
    setting.check_complete(output)


def test_a_kill_while_a_part_is_being_written_costs_that_part(
    setting: Setting, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    child = setting.start(output, fault=("slow part", str(2 * LIMIT_S)))
    wait_for_temporary_part(output)
    # Rows of the parts behind it are done, or run: the engine goes on while the thread writes.
    wait_for(lambda: 2 in parts_in_flight(output), "the third part")
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not list(output.glob("part-*.parquet"))
    assert 0 in parts_in_flight(output)
    code, child = setting.run(output)
    assert (code, child.summary["rows"]) == (0, 40), child.stderr
    setting.check_complete(output)


def parts_in_flight(output: Path) -> list[int]:
    (folder,) = (output / ".gptbatch" / "runs").iterdir()
    return read_crash_journal(folder).parts_in_flight


def sum_of_rows(output: Path, names: list[str]) -> int:
    return sum(pq.read_metadata(output / name).num_rows for name in names)


def test_a_signal_while_loading_ends_at_once(long: Setting, tmp_path: Path) -> None:
    output = tmp_path / "out"
    child = long.start(output, fault=("slow load", str(2 * LIMIT_S)))
    wait_for(lambda: run_states(output), "the lock")
    child.send_signal(signal.SIGTERM)
    assert child.wait() == 75
    assert "Traceback" not in child.stderr
    assert not list(output.glob("part-*"))


def test_a_second_signal_ends_at_once(long: Setting, tmp_path: Path) -> None:
    """The step is longer than the test, so that only the second signal can end the process.

    The system may deliver two pending signals in either order.
    """
    output = tmp_path / "out"
    child = long.start(output, fault=("slow step", str(2 * LIMIT_S)))
    wait_for(lambda: run_states(output) == ["running"], "rows")
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGINT)
    assert child.wait() in (128 + signal.SIGINT, 128 + signal.SIGTERM)


def test_a_step_longer_than_the_time_limit_is_interrupted(long: Setting, tmp_path: Path) -> None:
    """One signal ends the process, although the step does not return."""
    output = tmp_path / "out"
    child = long.start(output, fault=("slow step", str(2 * LIMIT_S)), patience_s=0.1)
    wait_for(lambda: run_states(output) == ["running"], "rows")
    child.send_signal(signal.SIGTERM)
    assert child.wait() == 75
    assert "gptbatch: stopped; run the same command again\n" in child.stderr


# -- two runs, changed inputs, full disks ----------------------------------------------------------


def test_a_second_run_of_a_locked_output_is_refused(long: Setting, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = long.start(output, fault=SLOW)
    wait_for_parts(output, 2)
    code, second = long.run(output)
    assert first.is_running()
    assert code == 69
    assert (
        f"another run is writing it (process {first.pid} on host {os.uname().nodename}, since "
        in second.stderr
    )
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 75, first.stderr
    assert long.run(output)[0] == 0
    long.check_complete(output)


def test_the_lock_of_a_killed_process_is_free(long: Setting, tmp_path: Path) -> None:
    output = tmp_path / "out"
    child = long.start(output, fault=SLOW)
    wait_for_parts(output, 2)
    (folder,) = (output / ".gptbatch" / "runs").iterdir()
    (folder / "part-000001.parquet.tmp").write_bytes(b"left behind")
    (output / ".gptbatch" / "notes.tmp").write_bytes(b"not ours")
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert json.loads((folder / "lock").read_text())["pid"] == child.pid
    code, child = long.run(output)
    assert code == 0, child.stderr
    (output / ".gptbatch" / "notes.tmp").unlink()
    long.check_complete(output)


def test_a_run_without_working_locks_warns_and_completes(long: Setting, tmp_path: Path) -> None:
    """Two runs write one folder: both warn, keep temporary files, and write the right table."""
    output = tmp_path / "out"
    children = [long.start(output, fault=("no locks", "ENOLCK")) for _ in range(2)]
    for child in children:
        code = child.wait()
        assert code == 0, child.stderr
        assert "cannot be locked" in child.stderr
    long.check_complete(output, runs=2)


@pytest.mark.parametrize("setting_of_the_other", ["--seed=1", "--temperature=0.5", "--part-rows=7"])
def test_two_jobs_without_working_locks_do_not_mix(
    setting: Setting, tmp_path: Path, setting_of_the_other: str
) -> None:
    """At most one job succeeds, and the table is its own; the other job reports the conflict."""
    output = tmp_path / "out"
    children = [
        setting.start(output, *more, fault=("no locks", "ENOLCK"))
        for more in ((), (setting_of_the_other,))
    ]
    codes = sorted(child.wait() for child in children)
    assert codes in ([0, 69], [0, 78], [78, 78]), [child.stderr for child in children]
    config_hashes = {
        json.loads(pq.read_schema(path).metadata[b"gptbatch"])["identity"]["config_hash"]
        for path in output.glob("part-*")
    }
    assert (len(config_hashes) == 1) or codes == [78, 78]
    assert (output / "_SUCCESS").exists() == (0 in codes)


def test_an_input_that_changes_during_a_run_is_refused(long: Setting, tmp_path: Path) -> None:
    output = tmp_path / "out"
    child = long.start(output, fault=("slow step", "0.001"))
    wait_for_parts(output, 2)
    try:
        # 256 rows are read ahead
        long.write([*LONG_ROWS[:290], {"id": "other", "prompt": "another"}, *LONG_ROWS[291:]])
        check_changed_input(long, output, child)
    finally:
        long.write(LONG_ROWS)
    code, child = long.run(output)
    assert code == 0, child.stderr
    long.check_complete(output)


def check_changed_input(long: Setting, output: Path, child: Child) -> None:
    """Check that neither this run nor the next one takes the changed input."""
    assert child.wait() == 65
    assert (
        f"{long.input}: differs from what was checked, in rows 288 to 293; "
        "the input has changed since it was checked"
    ) in child.stderr
    check_parts(output)
    assert not (output / "_SUCCESS").exists()
    before = {path: path.read_bytes() for path in output.glob("part-*.parquet")}
    code, child = long.run(output)
    assert code == 78
    assert "holds a run of another input (its " in child.stderr
    assert {path: path.read_bytes() for path in output.glob("part-*.parquet")} == before


def test_a_file_size_limit_is_reported(long: Setting, tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk.

    A part of many rows does not fit, the small files do.
    """
    output = tmp_path / "out"
    code, child = long.run(output, "--part-rows", "200", file_size_limit=25_000)
    assert code == 74
    assert "part-000000.parquet: cannot be written (File too large)" in child.stderr
    assert not list(output.glob("part-*"))
    assert not [path for path in output.rglob("*") if TEMPORARY_NAME.fullmatch(path.name)]
    code, child = long.run(output, "--part-rows", "200")
    assert code == 0, child.stderr
    assert table(output).equals(long.expected)


# -- resuming --------------------------------------------------------------------------------------


def test_a_run_is_continued_with_another_batch_size_and_threads(
    setting: Setting, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    child = setting.start(output, fault=("replace", "kill"))
    assert child.wait() == -signal.SIGKILL
    code, child = setting.run(output, "--batch-size", "17", "--threads", "2")
    assert code == 0, child.stderr
    setting.check_complete(output)


def test_part_rows_follow_the_output(setting: Setting, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert setting.start(output, fault=("replace", "kill")).wait() == -signal.SIGKILL
    code, child = setting.run(output, "--part-rows", "7")
    assert (code, "holds a run of another job (part_rows: 6 there, 7 here)" in child.stderr) == (
        78,
        True,
    )
    without = [argument for argument in setting.arguments if argument not in ("--part-rows", "6")]
    code, child = setting.launcher.run(*without, "--output", output)
    assert code == 0, child.stderr
    setting.check_complete(output)


def test_a_lost_manifest_is_rebuilt(setting: Setting, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert setting.start(output, fault=("manifest", "kill")).wait() == -signal.SIGKILL
    expected = json.loads((output / "_manifest.json").read_text())
    manifest = output / "_manifest.json"
    errors = output / ".gptbatch" / "errors.jsonl"
    for damage in ("missing", "cut off"):
        errors.unlink()
        if damage == "missing":
            manifest.unlink()
        else:
            manifest.write_bytes(manifest.read_bytes()[:100])
        (output / "_SUCCESS").unlink(missing_ok=True)
        code, child = setting.run(output)
        assert (code, child.summary["rows_kept"]) == (0, 40), child.stderr
        setting.check_complete(output)
        assert json.loads((output / "_manifest.json").read_text()) == expected
        assert [json.loads(line)["id"] for line in errors.read_text().splitlines()] == ["r7"]
        assert run_states(output) == ["complete"]


def test_a_larger_limit_continues_the_run(setting: Setting, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert setting.run(output, "--limit", "20")[0] == 0
    kept = {path: path.stat().st_mtime_ns for path in sorted(output.glob("part-*"))[:3]}
    code, child = setting.run(output, "--limit", "15")
    assert code == 78
    assert (
        "out: holds a run of 20 rows, and limit takes the first 15 rows. Rows are added to an "
        "output, and never removed. For the whole run, leave limit out or raise it, if the input "
        "still has 20 rows; for the first 15 rows alone, name another output, or use --overwrite\n"
    ) in child.stderr
    code, child = setting.run(output, "--limit", "29")
    assert (code, child.summary["rows_kept"], child.summary["rows"]) == (0, 18, 11), child.stderr
    code, child = setting.run(output)
    assert (code, child.summary["rows_kept"], child.summary["rows"]) == (0, 24, 16), child.stderr
    setting.check_complete(output)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_an_input_that_has_become_shorter_is_refused(setting: Setting, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert setting.run(output)[0] == 0
    try:
        setting.write(ROWS[:-1])
        code, child = setting.run(output)
    finally:
        setting.write(ROWS)
    assert (code, "holds a run of 40 rows, but the input has 39" in child.stderr) == (78, True)
    assert setting.run(output)[0] == 0


def test_another_environment_is_refused(setting: Setting, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert (
        setting.start(output, "--attention", "padded", fault=("manifest", "kill")).wait()
        == -signal.SIGKILL
    )
    (output / "part-000003.parquet").unlink()
    code, child = setting.run(output, "--batch-invariance", "off")
    assert code == 78
    assert "holds rows of another environment (self_test_digest was " in child.stderr
    assert "batch_invariance was verified, is off" in child.stderr
    code, child = setting.run(output, "--attention", "ragged")
    assert (code, "holds a run with engine.attention padded, not ragged" in child.stderr) == (
        78,
        True,
    )
    code, child = setting.run(output)
    assert code == 0, child.stderr
    assert (
        json.loads((output / "_manifest.json").read_text())["environment"]["attention"] == "padded"
    ), "auto takes what the output names"
    code, child = setting.run(
        tmp_path / "mixed", "--attention", "padded", fault=("manifest", "kill")
    )
    (tmp_path / "mixed" / "part-000003.parquet").unlink()
    code, child = setting.run(
        tmp_path / "mixed", "--batch-invariance", "off", "--allow-other-environment"
    )
    assert code == 0, child.stderr
    code, child = setting.launcher.run("verify", tmp_path / "mixed")
    assert "its parts were computed in several environments" in child.stdout


def test_overwrite_killed_after_deleting_can_be_repeated(setting: Setting, tmp_path: Path) -> None:
    """The manifest claims the folder at every moment, whatever other files it holds."""
    output = tmp_path / "out"
    assert setting.run(output, "--seed", "5")[0] == 0
    (output / "notes.txt").write_text("mine")
    assert setting.start(output, "--overwrite", fault=("cleared", "kill")).wait() == -signal.SIGKILL
    assert not list(output.glob("part-*"))
    assert not (output / "_SUCCESS").exists()
    code, child = setting.run(output, "--overwrite")
    assert code == 0, child.stderr
    (output / "notes.txt").unlink()
    setting.check_complete(output)


def test_overwrite_continues_its_own_unfinished_run(setting: Setting, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert setting.run(output, "--seed", "5")[0] == 0
    assert setting.start(output, "--overwrite", fault=("replace", "kill")).wait() == -signal.SIGKILL
    code, child = setting.run(output, "--overwrite")
    assert (code, child.summary["rows_kept"]) == (0, 12), child.stderr
    setting.check_complete(output)
    code, child = setting.run(output, "--overwrite")
    assert (code, child.summary["rows_kept"], child.summary["rows"]) == (0, 0, 40), child.stderr
    setting.check_complete(output)


def test_a_complete_output_imports_nothing_heavy(setting: Setting, tmp_path: Path) -> None:
    """A complete output is recognised without importing torch, transformers and datasets."""
    import subprocess
    import sys

    output = tmp_path / "out"
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.csv").write_text("prompt\nThe king\nThe queen\n")
    os.utime(data / "train.csv", (1.5e9, 1.5e9))
    time.sleep(0.1)
    arguments = [
        *setting.arguments[:3],
        "--dataset",
        str(data),
        "--output",
        str(output),
        "--max-new-tokens",
        "2",
    ]
    code, child = setting.launcher.run(*arguments, env={"HF_HOME": str(tmp_path / "hf")})
    assert code == 0, child.stderr
    time.sleep(0.1)
    assert (
        setting.launcher.run(*arguments, env={"HF_HOME": str(tmp_path / "hf")})[0] == 0
    )  # looks at what was written a moment ago
    program = (
        "import sys; from gptbatch.jobs.cli import run_command; code = run_command(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules); "
        "assert not heavy, heavy; "
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows_kept"] == 2
    (data / "train.csv").write_text("prompt\nThe king\nThe Queen\n")
    code, child = setting.launcher.run(*arguments, env={"HF_HOME": str(tmp_path / "hf")})
    assert (code, "another input" in child.stderr) == (78, True)


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["ragged", "padded"])
def test_out_of_memory_halves_the_batch(setting: Setting, tmp_path: Path, attention: str) -> None:
    """The batch is halved until it fits, and the rows are equal."""
    output = tmp_path / "out"
    code, child = setting.run(
        output, "--attention", attention, "--batch-size", "16", fault=("memory", "3")
    )
    assert code == 0, child.stderr
    assert "out of memory: going on with at most 8 rows at a time" in child.stderr
    assert "out of memory: going on with at most 2 rows at a time" in child.stderr
    assert child.summary["batch_size_halvings"] == 3
    assert (
        table(output)
        .column("completion_token_ids")
        .equals(setting.expected.column("completion_token_ids"))
    )


def test_a_row_too_large_for_memory_is_named(setting: Setting, tmp_path: Path) -> None:
    output = tmp_path / "out"
    code, child = setting.run(output, fault=("memory", "always"))
    assert code == 75
    assert "out of memory, even with row 'r" in child.stderr
    assert "--skip-row" in child.stderr
    assert "Traceback" not in child.stderr
    code, child = setting.run(output)
    assert code == 0
    setting.check_complete(output)


def test_after_two_crashes_parts_run_one_row_at_a_time(setting: Setting, tmp_path: Path) -> None:
    """A row that crashes the process, as with too little memory, is named and can be skipped."""
    output = tmp_path / "out"
    poison = ("poison", "r20")
    for _ in range(2):
        code, child = setting.run(output, fault=poison)
        assert code == -signal.SIGKILL
        assert "one row at a time" not in child.stderr
    code, child = setting.run(output, fault=poison)
    assert code == -signal.SIGKILL
    assert "two runs crashed while parts " in child.stderr
    code, child = setting.run(output, fault=poison)
    assert code == -signal.SIGKILL
    assert "the last one while row 'r20' ran alone; --skip-row leaves it out" in child.stderr
    code, child = setting.run(output, "--skip-row", "r20", fault=poison)
    assert (code, child.summary["errors"]) == (0, 1), child.stderr
    found, expected = table(output).to_pylist(), setting.expected.to_pylist()
    assert found[20]["error"] == "skipped by skip_row"
    assert found[:20] + found[21:] == expected[:20] + expected[21:]


def test_skip_row_with_an_unknown_id_is_refused(setting: Setting, tmp_path: Path) -> None:
    code, child = setting.run(tmp_path / "out", "--skip-row", "r20", "--skip-row", "nobody")
    assert (code, "no row has the id 'nobody' that skip_row names" in child.stderr) == (78, True)


def test_a_small_memory_budget_is_kept(setting: Setting, tmp_path: Path) -> None:
    """Room for one context of 64 positions: 2 layers x 2 x 4 heads x 32 numbers x 4 bytes each."""
    for attention in ("ragged", "padded"):
        output = tmp_path / attention
        code, child = setting.run(
            output, "--attention", attention, "--memory-gib", str(64 * 2048 / 2**30)
        )
        assert code == 0, child.stderr
        assert (
            table(output)
            .column("completion_token_ids")
            .equals(setting.expected.column("completion_token_ids"))
        )
        batch = pa.concat_tables(pq.read_table(path) for path in sorted(output.glob("part-*")))[
            "mean_batch_size"
        ].to_pylist()
        assert max(size for size in batch if size is not None) < (
            4 if attention == "ragged" else 1.001
        )
