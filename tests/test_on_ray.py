"""Jobs on a Ray cluster of three nodes on this machine, with losses of workers and nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptbatch.jobs.cli import run_command
from gptbatch.pipeline import ConfigError, IncompleteError, JobConfig, StoppedError, run_job
from gptbatch.pipeline.config import EngineConfig
from gptbatch.pipeline.output.schema import DETERMINISTIC_COLUMNS
from tests.paths import PYTHONPATH
from tests.processes import LIMIT_S, child_environment, is_running, wait_for

# Otherwise Ray binds the address of a network card. It is read on import.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray = pytest.importorskip("ray")

# A head, two nodes and their workers start in ten seconds.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROWS = [{"id": f"r{i}", "prompt": f"{i} The king", "note": i} for i in range(80)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Start a head without CPUs and two nodes of two; connect this process."""
    from ray.cluster_utils import Cluster

    ray.shutdown()
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": False,
            "node_ip_address": "127.0.0.1",
            "object_store_memory": 80 * 2**20,
            "_system_config": {
                "health_check_period_ms": 500,
                # A busy machine answers late.
                "health_check_failure_threshold": 10,
                "health_check_initial_delay_ms": 0,
            },
        },
    )
    for _ in range(2):
        add_node(made)
    ray.init(
        address=made.address,
        runtime_env={"env_vars": {"PYTHONPATH": PYTHONPATH, "HF_HUB_OFFLINE": "1"}},
        log_to_driver=False,
    )
    yield made
    ray.shutdown()
    made.shutdown()


def add_node(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=2, node_ip_address="127.0.0.1", object_store_memory=80 * 2**20)


@pytest.fixture(scope="module")
def work(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an input and the output of an undisturbed local run."""
    folder = tmp_path_factory.mktemp("ray")
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "prompts.jsonl").write_text(text)
    run_job(job(checkpoint, folder, folder / "local"))
    return folder


def job(checkpoint: Path, work: Path, output: Path, **more: Any) -> JobConfig:
    return JobConfig(
        model=str(checkpoint),
        input=str(work / "prompts.jsonl"),
        output=str(output),
        part_rows=2,
        max_new_tokens=4,
        engine=EngineConfig(batch_size=4, threads=1, device="cpu"),
        **more,
    )


def table(output: Path) -> pa.Table:
    parts = [pq.read_table(path) for path in sorted(output.glob("part-*.parquet"))]
    return pa.concat_tables(parts).select(DETERMINISTIC_COLUMNS).combine_chunks()


def check(work: Path, output: Path) -> None:
    assert table(output).equals(table(work / "local"))
    assert (output / "_SUCCESS").exists()


def run(config: JobConfig, *, workers: int = 3, stop: Any = None) -> Any:
    from gptbatch.pipeline.cluster.on_ray import RaySettings, run_on_ray

    return run_on_ray(config, RaySettings(workers=workers), stop=stop)


def wait_for_parts(output: Path, count: int) -> None:
    wait_for(lambda: len(list(output.glob("part-*"))) >= count, f"{count} parts")


def in_background(act: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def worker_pids(output: Path, *, but: int = os.getpid()) -> list[int]:
    """Return the processes whose runs are live, by their locks, but for the driver."""
    pids = []
    for path in output.glob(".gptbatch/runs/*/lock"):
        if text := path.read_text():
            pids.append(json.loads(text)["pid"])
    return [pid for pid in pids if pid != but]


def test_a_job_on_a_cluster_has_the_rows_of_a_local_run(
    cluster: Any, checkpoint: Path, work: Path
) -> None:
    output = work / "plain"
    done = run(job(checkpoint, work, output))
    assert (done.rows, done.parts, done.parts_kept, done.workers_lost) == (80, 40, 0, 0)
    check(work, output)
    again = run(job(checkpoint, work, output))
    assert (again.parts, again.parts_kept) == (0, 40)


def test_the_command_runs_the_demo_on_a_cluster(
    cluster: Any, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the real model, and compared with a local run."""
    command = ["generate", "--config", "demo", "--limit", "40", "--part-rows", "5"]
    assert run_command([*command, "--output", str(work / "demo-local")]) == 0
    on_ray = ["--on", "ray", "--workers", "2", "--output", str(work / "demo")]
    assert run_command([*command, *on_ray]) == 0
    summary = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (summary["rows"], summary["parts"]) == (40, 8)
    assert table(work / "demo").equals(table(work / "demo-local"))
    assert run_command([*command, "--on", "ray", "--output", str(work / "no workers")]) == 2
    assert "--on ray needs --workers" in capfd.readouterr().err


def test_a_killed_worker_is_replaced(cluster: Any, checkpoint: Path, work: Path) -> None:
    output = work / "killed"

    def kill() -> None:
        wait_for_parts(output, 1)
        os.kill(worker_pids(output)[0], signal.SIGKILL)

    killer = in_background(kill)
    done = run(job(checkpoint, work, output, max_row_errors="5"))
    killer.join()
    assert done.workers_lost >= 1
    assert done.rows == 80
    check(work, output)


def test_a_lost_node_is_replaced_by_others(cluster: Any, checkpoint: Path, work: Path) -> None:
    output = work / "node"
    node = add_node(cluster)

    def remove() -> None:
        wait_for_parts(output, 3)
        cluster.remove_node(node, allow_graceful=False)

    killer = in_background(remove)
    done = run(job(checkpoint, work, output), workers=6)
    killer.join()
    assert done.rows == 80
    check(work, output)


class StopAtParts:
    """Asks for a stop when so many parts are written."""

    def __init__(self, output: Path, count: int) -> None:
        self.output, self.count = output, count

    def deferred(self) -> AbstractContextManager[None]:
        return nullcontext()

    def requested(self) -> str | None:
        written = len(list(self.output.glob("part-*")))
        return "a test" if written >= self.count else None


def test_a_stopped_driver_goes_on_with_the_same_command(
    cluster: Any, checkpoint: Path, work: Path
) -> None:
    output = work / "stopped"
    with pytest.raises(StoppedError, match="run the same command again to go on"):
        run(job(checkpoint, work, output), stop=StopAtParts(output, 0))
    assert not (output / "_SUCCESS").exists()
    done = run(job(checkpoint, work, output))
    assert done.rows == 80
    check(work, output)


def test_a_killed_driver_goes_on_with_the_same_command(cluster: Any, work: Path) -> None:
    """Ray ends the workers of a driver that is gone. Nothing of them is left at the end."""
    output = work / "killed driver"
    options = ["--config", "demo", "--limit", "40", "--part-rows", "2"]
    on_ray = ["--on", "ray", "--ray-address", cluster.address, "--workers", "2"]
    command = [sys.executable, "-m", "gptbatch", "generate", *options, *on_ray]
    command += ["--batch-size", "4", "--output", str(output)]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            env=child_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    with start() as driver:
        wait_for_parts(output, 2)
        workers = worker_pids(output, but=driver.pid)
        driver.kill()
    written = len(list(output.glob("part-*")))
    assert written < 20
    assert not (output / "_SUCCESS").exists()
    runs = set((output / ".gptbatch" / "runs").iterdir())

    with start() as driver:
        stdout, stderr = driver.communicate(timeout=LIMIT_S)
    assert driver.returncode == 0, stderr
    summary = json.loads(stdout)
    # A worker may have written a part before Ray has ended it.
    assert summary["rows"] == 40
    assert summary["parts"] + summary["parts_kept"] == 20
    assert summary["parts_kept"] >= written
    assert workers
    assert not any(is_running(pid) for pid in workers)
    (left,) = (output / ".gptbatch" / "runs").iterdir()
    assert left not in runs
    assert [path.name for path in left.iterdir()] == ["lock"]
    assert run_command(["generate", *options, "--output", str(work / "undisturbed")]) == 0
    assert table(output).equals(table(work / "undisturbed"))


def test_a_part_that_crashes_workers_is_set_aside_and_named(
    cluster: Any, checkpoint: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptbatch.pipeline.cluster import on_ray

    output = work / "poison"
    monkeypatch.setattr(on_ray, "WorkerActor", poisoned("r31"))
    with pytest.raises(IncompleteError, match=r"parts .*15.* were in flight at several crashes"):
        run(job(checkpoint, work, output))
    assert not (output / "part-000015.parquet").exists()
    # Parts that were in flight beside it three times are left out, too.
    assert len(list(output.glob("part-*"))) >= 15
    run_job(job(checkpoint, work, output))
    check(work, output)


def poisoned(prompt_id: str) -> type:
    """Return an actor class whose process is killed by the row of an id."""
    from gptbatch.pipeline.cluster.ray_actors import WorkerActor

    class PoisonedActor(WorkerActor):
        def run(self) -> None:
            from tests.faults import poison

            poison(prompt_id)
            super().run()

    return PoisonedActor


def test_workers_that_no_node_can_take_are_named(
    cluster: Any,
    checkpoint: Path,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from gptbatch.pipeline.cluster import on_ray

    class StopWhenWarned(StopAtParts):
        def requested(self) -> str | None:
            return "a test" if "pending" in caplog.text else None

    monkeypatch.setattr(on_ray, "MAX_PENDING_S", 1.0)
    settings = on_ray.RaySettings(workers=2, gpus=1)
    config = job(checkpoint, work, work / "pending")
    with pytest.raises(StoppedError):
        on_ray.run_on_ray(config, settings, stop=StopWhenWarned(work, 0))
    assert "2 of 2 workers are pending: each requests 1 CPUs and 1 GPUs" in caplog.text
    assert "2 CPUs and 0 GPUs" in caplog.text


def test_an_error_of_a_worker_ends_the_job(cluster: Any, checkpoint: Path, work: Path) -> None:
    output = work / "mixed"
    config = job(checkpoint, work, output)
    run_job(config.model_copy(update={"shard": "0/2"}))
    for path in list(output.glob("part-*"))[:20]:
        path.unlink()
    (output / "_SUCCESS").unlink()
    with pytest.raises(ConfigError, match="holds rows of another environment"):
        run(config.model_copy(update={"batch_invariance": "off"}))


@pytest.mark.parametrize("setting", [{"shard": "0/2"}, {"overwrite": True}])
def test_settings_that_no_cluster_takes(
    checkpoint: Path, work: Path, setting: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="cannot be combined with a cluster"):
        run(job(checkpoint, work, work / "none", **setting))
