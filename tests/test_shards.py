"""Shards: several runs of one job that write into one folder."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptbatch.jobs.cli import run_command
from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.errors import ConfigError
from gptbatch.pipeline.output.local_run import LocalRun, LocalRunFolder
from gptbatch.pipeline.output.runs import list_runs
from gptbatch.pipeline.output.shards import (
    LOOK_INTERVAL_S,
    Shard,
    ShardParts,
    find_shard,
    parse_shard,
)
from tests.launcher import Child, Launcher
from tests.processes import LIMIT_S, wait_for
from tests.test_durability import SLOW, Setting, check_parts, run_states, table

# -- which parts -----------------------------------------------------------------------------------


@given(n_parts=st.integers(0, 2000), count=st.integers(1, 300))
def test_shards_divide_the_parts(n_parts: int, count: int) -> None:
    shares = [Shard(index, count).parts(n_parts) for index in range(count)]
    assert [number for share in shares for number in share] == list(range(n_parts))
    sizes = {len(share) for share in shares}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("text", ["3", "4/4", "-1/4", "0/0", "1/2/3", "a/b", "", "auto/2"])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not INDEX/COUNT with an index from 0 to COUNT - 1"):
        parse_shard(text)


@pytest.mark.parametrize("command", ["generate", "plan"])
def test_a_wrong_shard_is_a_wrong_option(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, as for other values. A wrong variable exits with 78, as other variables do."""
    arguments = [command, "--config", "demo", "--output", str(tmp_path / "out")]
    assert run_command([*arguments, "--shard", "2/2"]) == 2
    assert (
        "--shard: must be auto, or INDEX/COUNT with an index from 0 to" in capsys.readouterr().err
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTBATCH_SHARD", "2/2")
        assert run_command(arguments) == 78
    assert "GPTBATCH_SHARD: must be auto, or INDEX/COUNT" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="four shards are 0/4"):
        JobConfig(model="m", input="i", output="o", shard="2/2")
    assert not (tmp_path / "out").exists()


AUTO = {
    "array task": (
        {
            "SLURM_ARRAY_TASK_ID": "12",
            "SLURM_ARRAY_TASK_MIN": "10",
            "SLURM_ARRAY_TASK_MAX": "13",
            "SLURM_NTASKS": "1",
            "SLURM_PROCID": "0",
        },
        Shard(2, 4),
    ),
    "array with steps of 10": (
        {
            "SLURM_ARRAY_TASK_ID": "30",
            "SLURM_ARRAY_TASK_MIN": "10",
            "SLURM_ARRAY_TASK_STEP": "10",
            "SLURM_ARRAY_TASK_MAX": "40",
        },
        Shard(2, 4),
    ),
    "array of two tasks, resubmitted": (
        {
            "SLURM_ARRAY_TASK_ID": "17",
            "SLURM_ARRAY_TASK_MIN": "3",
            "SLURM_ARRAY_TASK_MAX": "17",
        },
        Shard(14, 15),
    ),
    "processes of an array task": (
        {
            "SLURM_ARRAY_TASK_ID": "1",
            "SLURM_ARRAY_TASK_MIN": "0",
            "SLURM_ARRAY_TASK_MAX": "2",
            "SLURM_NTASKS": "8",
            "SLURM_PROCID": "5",
        },
        Shard(13, 24),
    ),
    "mpirun in a job of Slurm": (
        {
            "SLURM_NTASKS": "8",
            "SLURM_PROCID": "0",
            "OMPI_COMM_WORLD_RANK": "5",
            "OMPI_COMM_WORLD_SIZE": "8",
        },
        Shard(5, 8),
    ),
    "srun": ({"SLURM_NTASKS": "8", "SLURM_PROCID": "5"}, Shard(5, 8)),
    "Indexed Job": ({"JOB_COMPLETION_INDEX": "3", "GPTBATCH_SHARDS": "16"}, Shard(3, 16)),
    "SkyPilot": ({"SKYPILOT_JOB_RANK": "1", "SKYPILOT_NUM_JOBS": "2"}, Shard(1, 2)),
    "torchrun": ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, Shard(0, 2)),
    "Open MPI": ({"OMPI_COMM_WORLD_RANK": "7", "OMPI_COMM_WORLD_SIZE": "9"}, Shard(7, 9)),
    "MPICH": ({"PMI_RANK": "7", "PMI_SIZE": "9"}, Shard(7, 9)),
}


@pytest.mark.parametrize("name", AUTO)
def test_auto_finds_the_shard_of_a_scheduler(name: str) -> None:
    environment, expected = AUTO[name]
    assert find_shard("auto", environment) == expected
    assert find_shard(None, environment) == Shard(0, 1)
    assert find_shard("2/3", environment) == Shard(2, 3)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "auto finds no variables of Slurm arrays, Kubernetes, SkyPilot, torchrun"),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, "auto finds no variables"),
        ({"JOB_COMPLETION_INDEX": "3"}, "GPTBATCH_SHARDS is not; set it to the completions"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "torchrun: RANK is 'x', and a number is needed"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "torchrun: index 2 of 2 shards"),
    ],
)
def test_auto_says_what_is_missing(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_shard("auto", environment)


class Folder:
    """A folder with written parts, and the parts that other runs have in flight."""

    def __init__(self, n_parts: int) -> None:
        self.n_parts, self.looks, self.now_s = n_parts, 0, 0.0
        self.written: set[int] = set()
        self.in_flight: set[int] = set()

    def source(self, missing: list[int], seed: str = "a") -> ShardParts:
        return ShardParts(
            missing,
            self.find_free,
            self.written.__contains__,
            seed=seed,
            clock=lambda: self.now_s,
        )

    def find_free(self) -> list[int]:
        self.looks += 1
        return [
            number for number in range(self.n_parts) if number not in self.written | self.in_flight
        ]


def test_a_shard_takes_its_own_parts_and_then_free_ones_of_others() -> None:
    folder = Folder(8)
    source = folder.source([0, 1, 2])
    folder.written.add(1)
    assert [source.next(), source.next()] == [0, 2]
    folder.written |= {0, 2, 3}
    folder.in_flight |= {4}
    assert source.next() is None, "it helps when its own parts are written"
    assert source.next() == 7, "the end of the gap: its owner comes from the beginning"
    folder.written.add(6)
    assert source.next() == 5
    assert source.next() is None, "4 is in flight elsewhere"
    folder.in_flight.clear()
    assert source.next() == 4, "its run has died"
    assert source.next() is None


def test_a_helping_shard_lists_the_folder_once_in_a_while() -> None:
    folder = Folder(100)
    source = folder.source([])
    taken = [source.next() for _ in range(50)]
    assert taken == list(range(99, 49, -1))
    assert folder.looks == 1
    folder.now_s = LOOK_INTERVAL_S
    folder.written.update(range(45, 50))
    assert source.next() == 44
    assert folder.looks == 2


def test_shards_that_end_together_seldom_take_the_same_part() -> None:
    folder = Folder(1000)
    folder.written.update(range(0, 1000, 10))
    taken = [folder.source([], seed=f"run {index}").next() for index in range(20)]
    assert len(set(taken)) > 15


# above the largest number of a process on Linux
NO_PID = 2**22 + 1

# -- the folders of runs ---------------------------------------------------------------------------


def test_a_dead_run_is_taken_over_by_one_run_alone(tmp_path: Path) -> None:
    with LocalRunFolder(tmp_path) as dead:
        assert LocalRun(dead.path).is_live()
    assert not LocalRun(dead.path).is_live()
    with LocalRunFolder(tmp_path) as first, LocalRunFolder(tmp_path, "of a job") as second:
        assert first.has_company("of a job")
        assert not first.has_company("of another job")
        with first.dead_runs() as taken:
            assert [run.path for run in taken] == [dead.path]
            with second.dead_runs() as left:
                assert left == []
            assert dead.path.exists()
        assert not dead.path.exists()
        assert len(list_runs(tmp_path)) == 2


def test_files_of_others_stay_in_the_folder_of_a_dead_run(tmp_path: Path) -> None:
    with LocalRunFolder(tmp_path) as dead:
        (dead.path / "part-000000.parquet.tmp").write_bytes(b"left behind")
        (dead.path / "notes.txt").write_text("mine")
    with LocalRunFolder(tmp_path) as run:
        run.sweep()
    assert [path.name for path in dead.path.iterdir()] == ["notes.txt"]


def test_a_folder_that_never_got_its_name_is_deleted(tmp_path: Path) -> None:
    """Its run was killed before it had its lock. A young one may be that of a live shard."""
    new = tmp_path / "runs" / "0123456789ab.new"
    new.mkdir(parents=True)
    with LocalRunFolder(tmp_path) as shard:
        shard.sweep()
        assert new.exists()
    with LocalRunFolder(tmp_path, alone=True) as whole:
        whole.sweep()
        assert not new.exists()


def test_a_run_on_another_host_lives_while_it_shows_progress(tmp_path: Path) -> None:
    """Its lock may not be seen here: some file systems lock within a host only, or not at all."""
    with LocalRunFolder(tmp_path) as run:
        note = json.loads((run.path / "lock").read_text())
        progress = {"rows_total": 1, "rows_done": 0, "error_rows": 0, "state": "running"}
    other = LocalRun(run.path)
    for updated_at, host, pid, lives in (
        ("2999-01-01T00:00:00Z", "elsewhere", NO_PID, True),
        ("2020-01-01T00:00:00Z", "elsewhere", NO_PID, False),
        ("2999-01-01T00:00:00Z", note["host"], NO_PID, False),
        ("2999-01-01T00:00:00Z", note["host"], os.getpid(), True),
        ("2020-01-01T00:00:00Z", note["host"], os.getpid(), False),
    ):
        space = note["pid_space"] if host == note["host"] else "of another machine"
        changed = {**note, "host": host, "pid": pid, "pid_space": space}
        (run.path / "lock").write_text(json.dumps(changed))
        (run.path / "progress.json").write_text(json.dumps({**progress, "updated_at": updated_at}))
        assert other.is_live() == lives


# -- whole runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setting(
    launcher: Launcher, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Setting:
    rows = [{"id": f"r{i}", "prompt": f"{i} The king", "note": i} for i in range(120)]
    rows[7]["prompt"] = "king " * 200
    return Setting(launcher, checkpoint, tmp_path_factory.mktemp("shards"), rows)


def start(setting: Setting, output: Path, *shards: str, slow: bool = False) -> list[Child]:
    fault = SLOW if slow else None
    return [setting.start(output, "--shard", shard, fault=fault) for shard in shards]


def wait_all(children: list[Child]) -> list[Child]:
    for child in children:
        assert child.wait() == 0, child.stderr
    return children


def test_shards_write_one_folder_through_kills(setting: Setting, tmp_path: Path) -> None:
    """Four shards, two of them killed; then three shards, one index twice, finish the output."""
    output = tmp_path / "out"
    children = start(setting, output, "0/4", "1/4", "2/4", "3/4", slow=True)
    wait_for(lambda: len(list(output.glob("part-*"))) >= 4, "4 parts")
    for child in children[1:3]:
        child.send_signal(signal.SIGKILL)
    assert [child.wait() for child in children[1:3]] == [-signal.SIGKILL] * 2
    check_parts(output)
    for child in children[::3]:
        child.send_signal(signal.SIGTERM)
        assert child.wait() in (0, 75), child.stderr
    done = wait_all(start(setting, output, "0/3", "1/3", "2/3", "2/3"))
    assert any(child.summary["complete"] for child in done)
    # The other runs of the last call have ended after one of them had finished the output.
    assert setting.run(output)[0] == 0
    setting.check_complete(output, runs=len(list(output.glob(".gptbatch/runs/*"))))
    assert set(run_states(output)) == {"complete"}
    assert not list(output.glob(".gptbatch/runs/*/*.tmp"))
    errors = (output / ".gptbatch" / "errors.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in errors] == ["r7"]


def test_the_last_shard_finishes_and_others_skip_what_is_done(
    setting: Setting, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    (first,) = wait_all(start(setting, output, "1/2"))
    assert first.summary["complete"], "it has helped the shard that did not begin"
    assert first.summary["rows"] == 120
    before = {path: path.stat().st_mtime_ns for path in output.glob("part-*")}
    (second,) = wait_all(start(setting, output, "0/2"))
    assert (second.summary["rows"], second.summary["complete"]) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    setting.check_complete(output)


def test_a_shard_without_parts_says_so(setting: Setting, tmp_path: Path) -> None:
    """It generates the part of the other shard, which has not begun."""
    options = ("--limit", "4", "--part-rows", "10")
    code, child = setting.run(tmp_path / "out", *options, "--shard", "0/2")
    assert (code, child.summary["rows"]) == (0, 4), child.stderr
    assert (
        "shard 0/2 has no part of its own: the job has 1 part of up to 10 rows, fewer than shards; "
        "a new output with a smaller part_rows has more\n"
    ) in child.stderr
    code, child = setting.run(tmp_path / "other", *options, "--shard", "1/2")
    assert (code, "no part of its own" in child.stderr) == (0, False), child.stderr


def test_a_shard_generates_its_damaged_parts_again(setting: Setting, tmp_path: Path) -> None:
    output = tmp_path / "out"
    wait_all(start(setting, output, "0/2"))
    part = output / "part-000013.parquet"
    part.write_bytes(part.read_bytes()[:-100])
    (shard,) = wait_all(start(setting, output, "1/2"))
    assert (shard.summary["rows"], shard.summary["complete"]) == (6, True)
    setting.check_complete(output)


def test_no_shard_completes_an_output_with_damage_inside_a_part(
    setting: Setting, launcher: Launcher, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    wait_all(start(setting, output, "0/2"))
    (output / "_SUCCESS").unlink()
    part = output / "part-000003.parquet"
    content = bytearray(part.read_bytes())
    content[200] ^= 1
    part.write_bytes(content)
    code, child = launcher.run("finish", output)
    assert (code, "part-000003.parquet: is not whole" in child.stderr) == (75, True)
    (other,) = wait_all(start(setting, output, "1/2"))
    assert (other.summary["complete"], (output / "_SUCCESS").exists()) == (False, False)
    (owner,) = wait_all(start(setting, output, "0/2"))
    assert (owner.summary["rows"], owner.summary["complete"]) == (6, True)
    setting.check_complete(output)


def test_finish_completes_an_output_without_model_and_input(
    setting: Setting, launcher: Launcher, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    wait_all(start(setting, output, "0/2"))
    expected = (output / "_manifest.json").read_text()
    (output / "_SUCCESS").unlink()
    (output / ".gptbatch" / "errors.jsonl").unlink()
    (output / ".gptbatch" / "digests.json").unlink()
    part = output / "part-000003.parquet"
    content = part.read_bytes()
    part.unlink()
    code, child = launcher.run("finish", output)
    assert (code, "1 of 20 parts are missing (3); run the" in child.stderr) == (75, True)
    part.write_bytes(content)
    code, child = launcher.run("finish", output)
    assert code == 0, child.stderr
    assert child.summary == {"output": str(output), "rows": 120, "parts": 20, "errors": 1}
    assert (output / "_manifest.json").read_text() == expected
    setting.check_complete(output)
    part.write_bytes(content[:-100])
    code, child = launcher.run("finish", output)
    assert (code, "part-000003.parquet: is not whole" in child.stderr) == (75, True)


def test_shards_of_another_job_may_follow_shards_without_parts(
    setting: Setting, tmp_path: Path
) -> None:
    """A folder without parts is free, also for several shards that begin together."""
    output = tmp_path / "out"
    first = setting.start(output, "--shard", "0/2", fault=("slow step", str(2 * LIMIT_S)))
    wait_for((output / "_manifest.json").exists, "the claim")
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert not list(output.glob("part-*"))
    done = wait_all(
        [setting.start(output, "--shard", f"{index}/2", "--seed", "9") for index in (0, 1)]
    )
    assert any(child.summary["complete"] for child in done)


def test_a_grown_input_is_finished_by_its_shards(setting: Setting, tmp_path: Path) -> None:
    """The last part had few rows. The shard that does not own it says that it is not done."""
    output = tmp_path / "out"
    wait_all([setting.start(output, "--shard", f"{index}/2", "--limit", "63") for index in (0, 1)])
    limit = ("--limit", "65")
    first = setting.start(output, "--shard", "0/2", *limit)
    assert first.wait() == 0, first.stderr
    assert not first.summary["complete"]
    second = setting.start(output, "--shard", "1/2", *limit)
    assert second.wait() == 0, second.stderr
    assert second.summary["complete"]
    assert table(output).equals(setting.expected.slice(0, 65))


def test_a_run_of_the_whole_job_excludes_shards(setting: Setting, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (shard,) = start(setting, output, "0/2", slow=True)
    wait_for(lambda: list(output.glob("part-*")), "a part")
    code, whole = setting.run(output)
    assert code == 69
    assert f"another run is writing it (process {shard.pid} on host " in whole.stderr
    shard.send_signal(signal.SIGTERM)
    assert shard.wait() == 75
    whole = setting.start(output, fault=SLOW)
    wait_for(lambda: "running" in run_states(output), "the run")
    code, shard = setting.run(output, "--shard", "0/2")
    assert code == 69
    assert f"another run is writing it (process {whole.pid} on host " in shard.stderr
    whole.send_signal(signal.SIGTERM)
    assert whole.wait() in (0, 75)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "1"], "holds a run of another job (seed: 0 there, 1 here)"),
        (["--attention", "padded"], "holds a run with engine.attention ragged, not padded"),
        (["--batch-invariance", "off"], "batch_invariance was portable, is off"),
    ],
)
def test_a_shard_that_differs_is_refused(
    setting: Setting, tmp_path: Path, options: list[str], message: str
) -> None:
    output = tmp_path / "out"
    (shard,) = start(setting, output, "0/2", slow=True)
    wait_for(lambda: list(output.glob("part-*")), "a part")
    code, other = setting.run(output, "--shard", "1/2", *options)
    assert (code, message in other.stderr) == (78, True), other.stderr
    shard.send_signal(signal.SIGTERM)
    assert shard.wait() in (0, 75)


def test_a_shard_does_not_overwrite(setting: Setting, tmp_path: Path) -> None:
    code, child = setting.run(tmp_path / "out", "--shard", "0/2", "--overwrite")
    assert (code, "a shard would delete the parts of the others" in child.stderr) == (2, True)


def test_status_counts_the_runs(setting: Setting, launcher: Launcher, tmp_path: Path) -> None:
    output = tmp_path / "out"
    children = start(setting, output, "0/2", "1/2", slow=True)
    wait_for(lambda: run_states(output).count("running") == 2, "both shards")
    code, child = launcher.run("status", output)
    assert (code, f"{output}: running, 2 runs" in child.stdout) == (0, True), child.stdout
    for running in children:
        running.send_signal(signal.SIGTERM)
        assert running.wait() in (0, 75)


def test_the_limit_on_error_rows_holds_for_all_shards_together(
    setting: Setting, launcher: Launcher, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    options = ("--skip-row", "r100")  # besides r7, in another shard
    code, child = setting.run(output, *options, "--shard", "0/2", "--max-row-errors", "2")
    assert code == 0, child.stderr
    (output / "_SUCCESS").unlink()
    code, child = setting.run(output, *options, "--shard", "0/2", "--max-row-errors", "1")
    assert code == 65
    assert "2 of 120 rows are errors, more than max_row_errors (1) allows" in child.stderr
    assert not (output / "_SUCCESS").exists()
    errors = (output / ".gptbatch" / "errors.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in errors] == ["r7", "r100"]
    assert launcher.run("finish", output)[0] == 0
