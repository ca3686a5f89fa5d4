"""Outputs and inputs in an object store: a real S3 server over HTTP, with faults on its way."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptbatch.pipeline import JobConfig, plan_job, run_job, run_parts
from gptbatch.pipeline.errors import (
    ConfigError,
    InputNotFoundError,
    OutputBusyError,
    OutputConflictError,
    OutputCreationError,
    StorageError,
)
from gptbatch.pipeline.input.open_input import open_input
from gptbatch.pipeline.output import lock, object_run, progress_file
from gptbatch.pipeline.output.lock import open_lock
from gptbatch.pipeline.output.object_run import ObjectRunFolder, list_object_runs
from gptbatch.pipeline.output.part_file import FOOTER_KEY
from gptbatch.pipeline.output.progress_file import ProgressFile
from gptbatch.pipeline.output.schema import DETERMINISTIC_COLUMNS, content_digest
from gptbatch.pipeline.output.stray_tables import find_stray_tables
from gptbatch.pipeline.storage import object_store, object_writer
from gptbatch.pipeline.storage.object_path import ObjectPath, match_objects
from gptbatch.pipeline.storage.object_store import open_bucket
from gptbatch.pipeline.storage.object_writer import ObjectWriter, obeys_conditions
from tests.conftest import run_gptbatch
from tests.launcher import Child, Launcher
from tests.object_stores import FaultyStore, Rule, faulty_store, s3_server
from tests.processes import LIMIT_S, wait_for
from tests.test_durability import SLOW, table

PART_ROWS = 6
ROWS = [{"id": f"r{i}", "prompt": "The king is dead. " * (i % 4), "note": i} for i in range(20)]
N_PARTS = 4
_names = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def store(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    """Return a new bucket, to which this process's environment leads."""
    monkeypatch.setattr(object_writer, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(object_run, "CLOCK_TICK_S", 0.0)
    with faulty_store(f"bucket-{next(_names)}", server) as found:
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        open_bucket.cache_clear()
        yield found


class Job:
    """A job, and the table of its run into a local folder."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self.input = folder / "prompts.jsonl"
        self.input.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        self.settings: dict[str, Any] = {
            "model": str(checkpoint),
            "input": str(self.input),
            "max_new_tokens": 8,
            "part_rows": PART_ROWS,
            "engine": {"batch_size": 4, "threads": 1},
        }
        self.local = folder / "local"
        run_job(JobConfig(output=str(self.local), **self.settings))
        self.expected = table(self.local)

    def config(self, output: str, **settings: Any) -> JobConfig:
        return JobConfig(**{**self.settings, "output": output, **settings})

    def arguments(self, output: str) -> list[str]:
        return [
            "generate",
            *("--model", self.settings["model"], "--input", str(self.input), "--output", output),
            *("--max-new-tokens", "8", "--part-rows", str(PART_ROWS)),
            *("--batch-size", "4", "--threads", "1"),
        ]

    def check_complete(self, url: str) -> None:
        """Check that the output holds the parts of the local run, and no left-overs."""
        folder = ObjectPath.parse(url)
        names = sorted(str(path.relative_to(folder)) for path in folder.walk_files())
        runs = [name for name in names if name.startswith(".gptbatch/runs/")]
        assert [name for name in names if name not in runs] == [
            ".gptbatch/config.yaml",
            ".gptbatch/digests.json",
            ".gptbatch/input_index.parquet",
            "_SUCCESS",
            "_manifest.json",
            *(f"part-{number:06d}.parquet" for number in range(N_PARTS)),
        ]
        assert len({name.split("/")[2] for name in runs}) == 1
        assert not [name for name in runs if "crash_journal" in name]
        found = pa.concat_tables(
            pq.read_table(
                pa.BufferReader((folder / f"part-{number:06d}.parquet").read_bytes()),
                columns=DETERMINISTIC_COLUMNS,
            )
            for number in range(N_PARTS)
        ).combine_chunks()
        assert found.equals(self.expected)
        manifest = json.loads((folder / "_manifest.json").read_bytes())
        local = json.loads((self.local / "_manifest.json").read_bytes())
        assert manifest["complete"] is True
        assert [part["content_digest"] for part in manifest["parts"]] == [
            part["content_digest"] for part in local["parts"]
        ]


@pytest.fixture(scope="module")
def job(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(checkpoint, tmp_path_factory.mktemp("job"))


def put_text(text: str) -> Callable[[Any], None]:
    return lambda file: file.write(text.encode())


# -- one object ------------------------------------------------------------------------------------


def test_one_of_several_writers_wins(
    store: FaultyStore, server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server}")
    folder = ObjectPath.parse(f"{store.url}/race")

    def write_all(name: int) -> list[bool]:
        writer = ObjectWriter()
        return [
            writer.write(folder / f"{k}", put_text(f"{name}:{k}"), only_if_absent=True)
            for k in range(40)
        ]

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write_all, range(8)))
    for k in range(40):
        winners = [name for name in range(8) if won[name][k]]
        assert len(winners) == 1
        assert (folder / f"{k}").read_bytes() == f"{winners[0]}:{k}".encode()


FAULTS = ["lose reply", "conflict", "unavailable", "flip", "ignore condition"]


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("action", FAULTS)
def test_a_fault_does_not_keep_an_object_from_being_written(
    store: FaultyStore, action: str, times: int
) -> None:
    target = ObjectPath.parse(f"{store.url}/name")
    store.rules.append(Rule("PUT", "name", action, times=times))
    assert ObjectWriter().write(target, put_text("mine"), only_if_absent=True) is True
    assert target.read_bytes() == b"mine"
    store.rules.clear()
    assert ObjectWriter().write(target, put_text("late"), only_if_absent=True) is False
    assert target.read_bytes() == b"mine"


@pytest.mark.parametrize("action", ["lose reply", "conflict", "unavailable"])
def test_a_fault_does_not_replace_the_object_of_another_writer(
    store: FaultyStore, action: str
) -> None:
    target = ObjectPath.parse(f"{store.url}/name")
    assert ObjectWriter().write(target, put_text("theirs"), only_if_absent=True)
    store.rules.append(Rule("PUT", "name", action, times=2))
    assert ObjectWriter().write(target, put_text("mine"), only_if_absent=True) is False
    assert target.read_bytes() == b"theirs"


@pytest.mark.parametrize("action", ["lose reply", "unavailable", "flip"])
def test_a_fault_does_not_keep_an_object_from_being_replaced(
    store: FaultyStore, action: str
) -> None:
    target = ObjectPath.parse(f"{store.url}/name")
    ObjectWriter().write(target, put_text("old"))
    store.rules.append(Rule("PUT", "name", action, times=2))
    assert ObjectWriter().write(target, put_text("new"))
    assert target.read_bytes() == b"new"


def test_a_store_that_always_changes_bytes_is_reported(store: FaultyStore) -> None:
    target = ObjectPath.parse(f"{store.url}/name")
    store.rules.append(Rule("PUT", "name", "flip", times=100))
    for only_if_absent in (True, False):
        with pytest.raises(StorageError, match="reads back differently from what was sent"):
            ObjectWriter().write(target, put_text("mine"), only_if_absent=only_if_absent)


def test_a_store_that_refuses_is_reported_at_once(store: FaultyStore) -> None:
    target = ObjectPath.parse(f"{store.url}/name")
    store.rules.append(Rule("PUT", "name", "forbid", times=100))
    with pytest.raises(
        StorageError, match=r"/name: cannot be written \(403 Forbidden, AccessDenied: credentials"
    ):
        ObjectWriter().write(target, put_text("mine"), only_if_absent=True)
    assert len(store.requests) == 1


@pytest.mark.parametrize("action", [None, "ignore condition", "unknown condition"])
def test_a_store_is_asked_whether_it_obeys_conditions(
    store: FaultyStore, action: str | None
) -> None:
    if action is not None:
        store.rules.append(Rule("PUT", "probe", action, times=100))
    assert obeys_conditions(ObjectPath.parse(f"{store.url}/probe"), b"note") is (action is None)


def test_a_writer_of_a_store_without_conditions_looks_first(store: FaultyStore) -> None:
    store.rules.append(Rule("PUT", "name", "unknown condition", times=100))
    target = ObjectPath.parse(f"{store.url}/name")
    writer = ObjectWriter(obeys_conditions=False)
    store.rules.append(Rule("PUT", "name", "flip"))
    assert writer.write(target, put_text("first"), only_if_absent=True) is True
    assert writer.write(target, put_text("second"), only_if_absent=True) is False
    assert target.read_bytes() == b"first"


def test_a_dead_endpoint_is_reported(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch, job: Job
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setattr(object_store, "RETRY_TIMEOUT_S", 0)
    open_bucket.cache_clear()
    with pytest.raises(StorageError, match=f"{store.url}/out"):
        run_job(job.config(f"{store.url}/out"))


def test_reading_one_version_of_a_large_object(store: FaultyStore) -> None:
    path = ObjectPath.parse(f"{store.url}/large")
    content = bytes(range(256)) * 40_000
    path.bucket.put(path.key, content)
    with path.open() as file:
        assert file.seek(0, io.SEEK_END) == len(content)
        assert file.read() == b""
        file.seek(-5, io.SEEK_CUR)
        assert file.read(10) == content[-5:]
        file.seek(9_000_001)
        assert file.read(1000) == content[9_000_001:9_001_001]
        file.seek(0)
        assert file.read() == content
        path.bucket.put(path.key, content[::-1])
        file.seek(0)
        with pytest.raises(OSError, match="has changed meanwhile"):
            file.read()


# -- a job -----------------------------------------------------------------------------------------


def test_a_bucket_holds_what_a_folder_does(store: FaultyStore, job: Job) -> None:
    url = f"{store.url}/some/out"
    summary = run_job(job.config(url))
    assert (summary.rows, summary.complete) == (len(ROWS), True)
    job.check_complete(url)
    store.requests.clear()
    again = run_job(job.config(url))
    assert (again.rows, again.rows_kept) == (0, len(ROWS))
    assert not [entry for entry in store.requests if entry[0] in ("PUT", "DELETE")]


@pytest.mark.parametrize("action", [*FAULTS, "unknown condition"])
def test_a_job_is_complete_in_spite_of_faults(
    store: FaultyStore, job: Job, action: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"{store.url}/out"
    times = 100 if action in ("ignore condition", "unknown condition") else 2
    names = ["lock"] if times == 100 else []
    for name in (*names, "part-000000.parquet", "part-000002.parquet", "_manifest.json"):
        store.rules.append(Rule("PUT", name, action, times=times))
    run_job(job.config(url))
    store.rules.clear()
    job.check_complete(url)
    assert ("the store replaces an object" in caplog.text) is (times == 100)


KILLS = {
    "before the first object": Rule("PUT", "lock", "kill before"),
    "before the claim": Rule("PUT", "_manifest.json", "kill before"),
    "after the claim": Rule("PUT", "_manifest.json", "kill after"),
    "before a part is stored": Rule("PUT", "part-000001.parquet", "kill before"),
    "after a part is stored": Rule("PUT", "part-000001.parquet", "kill after"),
    "before a part is read back": Rule("GET", "part-000001.parquet", "kill before"),
    "after a part is read back": Rule("GET", "part-000001.parquet", "kill after"),
    "before the last manifest": Rule("PUT", "_manifest.json", "kill before", skip=1),
    "after the last manifest": Rule("PUT", "_manifest.json", "kill after", skip=1),
    "after _SUCCESS": Rule("PUT", "_SUCCESS", "kill after"),
}


@pytest.mark.parametrize("step", KILLS)
def test_a_kill_between_two_steps_loses_nothing(
    store: FaultyStore, job: Job, launcher: Launcher, step: str
) -> None:
    url = f"{store.url}/out"
    rule = KILLS[step]
    store.rules.append(Rule(rule.method, rule.name, rule.action, times=rule.times, skip=rule.skip))
    started = threading.Event()
    children: list[Child] = []

    def kill() -> None:
        assert started.wait(LIMIT_S)
        # The launcher serves one thread.
        os.kill(children[0].pid, signal.SIGKILL)

    store.kill = kill
    children.append(launcher.start(*job.arguments(url), env=store.environment))
    started.set()
    assert children[0].wait() == -signal.SIGKILL, children[0].stderr
    store.rules.clear()
    code, child = launcher.run(*job.arguments(url), env=store.environment)
    assert code == 0, child.stderr
    job.check_complete(url)


def test_shards_share_a_bucket_and_one_is_killed(
    store: FaultyStore, job: Job, launcher: Launcher
) -> None:
    url = f"{store.url}/out"
    killed = launcher.start(
        *job.arguments(url), "--shard", "0/3", env=store.environment, fault=SLOW
    )
    others = [
        launcher.start(*job.arguments(url), "--shard", f"{index}/3", env=store.environment)
        for index in (1, 2)
    ]
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert [other.wait() for other in others] == [0, 0], [other.stderr for other in others]
    code, child = launcher.run(*job.arguments(url), "--shard", "0/2", env=store.environment)
    assert code == 0, child.stderr
    done = run_gptbatch("finish", url, env=store.environment)
    assert done.code == 0, done.stderr
    job.check_complete(url)


def test_the_other_commands_read_a_bucket(store: FaultyStore, job: Job) -> None:
    url = f"{store.url}/out"
    run_job(job.config(url))

    def run(*arguments: str) -> str:
        done = run_gptbatch(*arguments, env=store.environment)
        assert done.code == 0, done.stderr
        return done.stdout

    assert "complete" in run("status", url)
    assert json.loads(run("verify", url).splitlines()[-1])["rows_checked"] == len(ROWS)
    assert json.loads(run("diff", url, str(job.local)).splitlines()[-1])["equal"] == len(ROWS)
    assert "equal to the recorded row" in run("replay", url, "--prompt-id", "r3")
    assert json.loads(run("finish", url).splitlines()[-1])["rows"] == len(ROWS)


def test_parts_are_left_out_that_are_written(store: FaultyStore, job: Job) -> None:
    config = job.config(f"{store.url}/out")
    assert run_parts(config, [1, 2]).rows == 2 * PART_ROWS
    assert run_parts(config, [0, 1, 2]).rows == PART_ROWS


def test_a_run_reads_each_kept_part_once_and_its_own_not_again(
    store: FaultyStore, job: Job
) -> None:
    url = f"{store.url}/out"
    run_parts(job.config(url), [0, 1])
    store.requests.clear()
    assert run_job(job.config(url)).rows_kept == 2 * PART_ROWS
    reads = [key.rpartition("/")[2] for method, key, _ in store.requests if method == "GET"]
    counts = [reads.count(f"part-{number:06d}.parquet") for number in range(N_PARTS)]
    # Of the kept ones `finish` reads the footers, too, and the facts of the first part.
    assert counts == [3, 2, 1, 1]


def test_the_demo_has_the_same_digests_in_a_bucket(store: FaultyStore, tmp_path: Path) -> None:
    arguments = ("--config", "demo", "--limit", "40", "--part-rows", "20", "--threads", "1")
    outputs = (f"{store.url}/demo", str(tmp_path / "demo"))
    for output in outputs:
        done = run_gptbatch("generate", *arguments, "--output", output, env=store.environment)
        assert done.code == 0, done.stderr
    there = json.loads(ObjectPath.parse(f"{outputs[0]}/_manifest.json").read_bytes())
    here = json.loads((tmp_path / "demo" / "_manifest.json").read_bytes())
    digests = [[part["content_digest"] for part in manifest["parts"]] for manifest in (there, here)]
    assert digests[0] == digests[1]
    assert there["identity"] == here["identity"]


def test_a_damaged_part_is_generated_again(store: FaultyStore, job: Job) -> None:
    url = f"{store.url}/out"
    run_job(job.config(url))
    part = ObjectPath.parse(f"{url}/part-000002.parquet")
    content = bytearray(part.read_bytes())
    content[100] ^= 1  # in the data, before the footer
    part.bucket.put(part.key, bytes(content))
    assert run_job(job.config(url)).rows == PART_ROWS
    job.check_complete(url)


def test_more_rows_are_added(store: FaultyStore, job: Job) -> None:
    url = f"{store.url}/out"
    run_job(job.config(url, limit=10))
    assert run_job(job.config(url)).rows_kept == PART_ROWS
    job.check_complete(url)


def test_another_job_is_refused_and_overwrite_replaces_it(store: FaultyStore, job: Job) -> None:
    url = f"{store.url}/out"
    run_job(job.config(url, seed=7))
    with pytest.raises(OutputConflictError, match=r"another job \(seed: 7 there, 0 here\)"):
        run_job(job.config(url))
    run_job(job.config(url, overwrite=True))
    job.check_complete(url)


def test_other_objects_are_refused(store: FaultyStore, job: Job) -> None:
    url = f"{store.url}/out"
    path = ObjectPath.parse(f"{url}/notes.txt")
    path.bucket.put(path.key, b"mine")
    with pytest.raises(OutputConflictError, match="holds something that gptbatch did not write"):
        run_job(job.config(url))
    assert path.read_bytes() == b"mine"


def test_stray_tables_are_refused(store: FaultyStore, job: Job) -> None:
    url = f"{store.url}/out"
    run_job(job.config(url, limit=10))
    path = ObjectPath.parse(f"{url}/copies/part-000000 (1).parquet")
    path.bucket.put(path.key, b"PAR1")
    with pytest.raises(OutputConflictError, match=r"copies/part-000000 \(1\)\.parquet"):
        run_job(job.config(url))


def test_rows_that_differ_in_one_environment_are_reported(store: FaultyStore, job: Job) -> None:
    """Two machines of one environment write a part: their bits must be equal."""
    url = f"{store.url}/out"
    run_job(job.config(url))
    folder, part = ObjectPath.parse(url), ObjectPath.parse(f"{url}/part-000001.parquet")
    table = pq.read_table(pa.BufferReader(part.read_bytes()))

    index = table.schema.get_field_index("completion")
    other = table.set_column(index, table.schema.field(index), pa.array(["x"] * len(table)))
    footer = json.loads(table.schema.metadata[FOOTER_KEY])
    footer["content_digest"] = content_digest(other)
    file = io.BytesIO()
    pq.write_table(other.replace_schema_metadata({FOOTER_KEY: json.dumps(footer)}), file)
    for name in ("_SUCCESS", ".gptbatch/digests.json", part.name):
        (folder / name).unlink()

    def inject(*_: object) -> None:
        part.bucket.put(part.key, file.getvalue())

    original = ObjectWriter.write

    def write(self: ObjectWriter, target: ObjectPath, *arguments: Any, **settings: Any) -> bool:
        if target == part:
            inject()
        return original(self, target, *arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectWriter, "write", write)
        with pytest.raises(OutputConflictError, match="one of the two machines computes wrongly"):
            run_job(job.config(url))


# -- other runs ------------------------------------------------------------------------------------


def pretend(run: ObjectRunFolder, **note: Any) -> None:
    """Let a run look like one of another host."""
    path = run.path / "lock"
    content = {**json.loads(path.read_bytes()), "host": "another", **note}
    path.bucket.put(path.key, json.dumps(content).encode())


def test_a_run_that_shows_progress_is_not_joined(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "POLL_S", 0.01)
    work = ObjectPath.parse(f"{store.url}/out/.gptbatch")
    with ObjectRunFolder(work, shared=False) as other:
        pretend(other)
        progress = other.path / "progress.json"
        counts = itertools.count()

        def list_runs(work: ObjectPath) -> Any:
            progress.bucket.put(progress.key, str(next(counts)).encode())
            return list_object_runs(work)

        monkeypatch.setattr(lock, "list_object_runs", list_runs)
        with (
            pytest.raises(OutputBusyError, match=r"another run is writing it .* on host another"),
            open_lock(work),
        ):
            pass


def test_a_run_that_was_killed_elsewhere_is_waited_for(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "POLL_S", 0.01)
    monkeypatch.setattr(lock, "MAX_SILENCE_BEFORE_START_S", 1.5)
    work = ObjectPath.parse(f"{store.url}/out/.gptbatch")
    with ObjectRunFolder(work, shared=False) as other:
        pretend(other)
        with open_lock(work):
            assert list_object_runs(work)[0].silence_s() >= 1.5


def test_shards_do_not_wait_for_shards(store: FaultyStore) -> None:
    work = ObjectPath.parse(f"{store.url}/out/.gptbatch")
    with ObjectRunFolder(work, "of a job") as other:
        pretend(other)
        (found,) = list_object_runs(work)
        assert found.is_live()
        assert found.config_hash() == "of a job"
        with open_lock(work, shared=True), ObjectRunFolder(work) as run:
            assert run.has_company("of a job")
            assert not run.has_company("of another job")
            run.sweep()
            assert len(list_object_runs(work)) == 2
    # Both have ended.
    assert not any(found.is_live() for found in list_object_runs(work))
    with ObjectRunFolder(work) as run:
        run.sweep()
        assert [found.path for found in list_object_runs(work)] == [run.path]


def test_a_process_that_is_gone_is_not_waited_for(store: FaultyStore) -> None:
    work = ObjectPath.parse(f"{store.url}/out/.gptbatch")
    with ObjectRunFolder(work, shared=False) as run:
        pretend(run, pid=2**22 + 1)
        assert not list_object_runs(work)[0].is_live()
        # in another container of the same machine, whose processes are not seen
        pretend(run, pid=2**22 + 1, pid_space="another")
        assert list_object_runs(work)[0].is_live()


def test_of_runs_that_begin_at_once_the_oldest_goes_on(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = ObjectPath.parse(f"{store.url}/out/.gptbatch")
    monkeypatch.setattr(object_run, "CLOCK_TICK_S", 1.1)
    began: list[ObjectRunFolder] = []

    def begin(_: int) -> str:
        try:
            began.append(ObjectRunFolder(work, shared=False).__enter__())
        except OutputBusyError as error:
            return str(error)
        return ""

    # All have looked before one has begun.
    for _ in range(4):
        open_lock(work).__enter__()
    with ThreadPoolExecutor(4) as pool:
        refused = [problem for problem in pool.map(begin, range(4)) if problem]
    assert len(refused) == 3
    assert "another run is writing it" in refused[0]
    live = [run.path for run in list_object_runs(work) if run.is_live()]
    assert live == [run.path for run in began]


def test_a_part_written_between_two_looks_is_no_stray_table(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ObjectPath.parse(f"{store.url}/out")
    folder.bucket.put(f"{folder.key}/part-000000.parquet", b"PAR1")
    original = ObjectPath.walk_files

    def walk_files(self: ObjectPath) -> Iterator[ObjectPath]:
        folder.bucket.put(f"{folder.key}/part-000001.parquet", b"PAR1")
        return original(self)

    monkeypatch.setattr(ObjectPath, "walk_files", walk_files)
    assert find_stray_tables(folder) == []


def test_the_clock_of_the_store_decides(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = ObjectPath.parse(f"{store.url}/out/.gptbatch")
    now = time.time
    with ObjectRunFolder(work) as other:
        pretend(other)
        monkeypatch.setattr(time, "time", lambda: now() + 5000)
        with ObjectRunFolder(work) as run:
            assert [found.is_live() for found in run.others()] == [True]


def test_a_run_shows_that_it_is_alive_while_it_loads(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_file, "OBJECT_WRITE_INTERVAL_S", 0.02)
    with ObjectRunFolder(ObjectPath.parse(f"{store.url}/out/.gptbatch")) as run:
        progress = ProgressFile(run.path, run.writer, rows_total=1, rows_kept=0, error_rows_kept=0)
        with progress.recording_state():
            wait_for(lambda: len(store.requests) > 8, "several writes")
            progress.begin(1, 0)
            count = len(store.requests)
            wait_for(lambda: len(store.requests) > count + 2, "writes while it runs")
            states = [json.loads((run.path / "progress.json").read_bytes())["state"]]
        states.append(json.loads((run.path / "progress.json").read_bytes())["state"])
        count = len(store.requests)
        time.sleep(0.1)
        assert len(store.requests) == count
    assert states == ["running", "complete"]


def test_records_are_written_now_and_then_and_at_the_end(
    store: FaultyStore, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_run, "RECORD_INTERVAL_S", 0.0)
    run_job(job.config(f"{store.url}/out"))
    (run,) = list_object_runs(ObjectPath.parse(f"{store.url}/out/.gptbatch"))
    lines = (run.path / "records.jsonl").read_bytes().splitlines()
    assert {json.loads(line)["name"] for line in lines} == {
        f"part-{number:06d}.parquet" for number in range(N_PARTS)
    }


# -- inputs ----------------------------------------------------------------------------------------


def upload(store: FaultyStore, folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            target = ObjectPath.parse(f"{store.url}/in/{path.relative_to(folder)}")
            target.bucket.put(target.key, path.read_bytes())


@pytest.fixture
def inputs(store: FaultyStore, tmp_path: Path) -> Path:
    """Write the rows in files of several kinds, here and in the bucket."""
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    lines = [json.dumps(row) + "\n" for row in ROWS]
    (folder / "a.jsonl").write_text("".join(lines[:7]))
    (folder / "b" / "c.jsonl.gz").write_bytes(gzip.compress("".join(lines[7:12]).encode()))
    pq.write_table(pa.Table.from_pylist(ROWS[12:]), folder / "d.parquet", row_group_size=3)
    (folder / ".hidden.jsonl").write_text("{")
    (folder / "readme.txt").write_text("notes")
    upload(store, folder)
    return folder


@pytest.mark.parametrize(
    "names",
    [["in"], ["in/**/*.jsonl*", "in/*.parquet"], ["in/a.jsonl", "in/b/c.jsonl.gz", "in/d.parquet"]],
)
def test_inputs_are_read_from_a_bucket(
    store: FaultyStore, inputs: Path, names: list[str], job: Job
) -> None:
    local = open_input(job.config("out", input=[str(inputs.parent / name) for name in names]))
    there = open_input(job.config("out", input=[f"{store.url}/{name}" for name in names]))
    found, expected = there.check(part_rows=PART_ROWS), local.check(part_rows=PART_ROWS)
    assert (found.rows, found.digest) == (expected.rows, expected.digest) == (20, found.digest)
    assert found.places == expected.places
    for number in range(N_PARTS):
        assert list(there.prompts(found, [number])) == list(local.prompts(found, [number]))


def test_an_unchanged_input_in_a_bucket_is_not_read_again(
    store: FaultyStore, inputs: Path, job: Job
) -> None:
    config = job.config(f"{store.url}/out", input=f"{store.url}/in")
    run_job(config)
    store.requests.clear()
    run_job(config)
    assert not [key for method, key, _ in store.requests if method == "GET" and "a.jsonl" in key]
    changed = ObjectPath.parse(f"{store.url}/in/a.jsonl")
    changed.bucket.put(changed.key, changed.read_bytes().replace(b"king", b"lord"))
    with pytest.raises(OutputConflictError, match="another input"):
        run_job(config)


def test_a_plan_in_a_bucket_is_divided_among_shards(
    store: FaultyStore, inputs: Path, job: Job
) -> None:
    url = f"{store.url}/out"
    config = job.config(url, input=f"{store.url}/in")
    plans = [plan_job(config.model_copy(update={"shard": f"{index}/3"})) for index in range(3)]
    assert [plan.complete for plan in plans] == [False, False, True]
    assert run_job(config).rows == len(ROWS)
    manifest = json.loads(ObjectPath.parse(f"{url}/_manifest.json").read_bytes())
    assert manifest["identity"]["input_digest"] == plans[-1].input_digest
    work = {path.name for path in ObjectPath.parse(f"{url}/.gptbatch").iterdir()}
    assert not [name for name in work if "-of-" in name]


def test_patterns_match_as_those_of_files_do(
    store: FaultyStore, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import glob

    for pattern in ("*", "**", "**/*", "*/*.gz", "[ad].*", "b/?.jsonl.gz", "x*", "**/*.jsonl"):
        expected = sorted(
            str(Path(name).relative_to(inputs))
            for name in glob.glob(f"{inputs}/{pattern}", recursive=True)
            if Path(name).is_file()
        )
        found = match_objects(ObjectPath.parse(f"{store.url}/in/{pattern}"))
        folder = ObjectPath.parse(f"{store.url}/in")
        assert [str(path.relative_to(folder)) for path in found] == expected, pattern


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("in/missing.jsonl", "no such file"),
        ("in/*.csv", "no file matches this pattern"),
        ("in/b", "given twice"),
    ],
)
def test_inputs_that_are_missing_are_named(
    store: FaultyStore, inputs: Path, name: str, message: str, job: Job
) -> None:
    names = [f"{store.url}/{name}"] * (2 if message == "given twice" else 1)
    with pytest.raises(InputNotFoundError, match=message):
        open_input(job.config("out", input=names))


# -- wrong settings --------------------------------------------------------------------------------


def test_a_missing_bucket_is_named(store: FaultyStore, job: Job) -> None:
    with pytest.raises((OutputCreationError, StorageError), match="there is no bucket"):
        run_job(job.config("s3://no-such-bucket-anywhere/out"))
    done = run_gptbatch("status", "s3://no-such-bucket-anywhere/out", env=store.environment)
    assert done.code == 74
    assert "there is no bucket s3://no-such-bucket-anywhere" in done.stderr


def test_an_output_inside_its_input_is_refused(store: FaultyStore, inputs: Path, job: Job) -> None:
    with pytest.raises(OutputConflictError, match="lies inside the folder of its own input"):
        run_job(job.config(f"{store.url}/in/out", input=f"{store.url}/in"))


def test_the_missing_package_is_named(
    store: FaultyStore, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=r"pip install 'gptbatch\[cloud\]'"):
        run_job(job.config(f"{store.url}/out"))


def test_a_profile_of_aws_is_read(
    store: FaultyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiles = tmp_path / "credentials"
    profiles.write_text("[mine]\naws_access_key_id = key\naws_secret_access_key = secret\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profiles))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "mine")
    open_bucket.cache_clear()
    target = ObjectPath.parse(f"{store.url}/name")
    target.bucket.put(target.key, b"mine")
    assert target.read_bytes() == b"mine"
    monkeypatch.setenv("AWS_PROFILE", "other")
    open_bucket.cache_clear()
    with pytest.raises(ConfigError, match=r"AWS_PROFILE: .*other"):
        ObjectPath.parse(f"{store.url}/name")


def test_credentials_are_in_no_object(store: FaultyStore, job: Job) -> None:
    url = f"{store.url}/out"
    run_job(job.config(url))
    for path in ObjectPath.parse(url).walk_files():
        assert b"secret" not in path.read_bytes()


def test_a_copy_of_a_bucket_is_a_folder(store: FaultyStore, job: Job, tmp_path: Path) -> None:
    """What `aws s3 sync` brings home is an output like any other."""
    url = f"{store.url}/out"
    run_job(job.config(url))
    folder = ObjectPath.parse(url)
    for path in folder.walk_files():
        target = tmp_path / "copy" / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    shutil.rmtree(tmp_path / "copy" / ".gptbatch" / "runs")
    assert run_job(job.config(str(tmp_path / "copy"))).rows_kept == len(ROWS)
