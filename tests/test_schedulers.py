"""The templates for schedulers, run with stand-ins for the schedulers."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from gptbatch.jobs.group import cli
from gptbatch.pipeline import load_config
from gptbatch.pipeline.errors import GptbatchError, OutputBusyError, StoppedError, StorageError
from gptbatch.pipeline.output.shards import Shard, find_shard
from tests.paths import PYTHONPATH, REPOSITORY
from tests.processes import LIMIT_S, wait_for

CONFIGS = REPOSITORY / "configs"
SBATCH = ["slurm.sbatch", "slurm-ray.sbatch"]
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> requeued; fi
"""
STAND_IN = """#!/bin/bash
# ends with the code in $CODE; a signal ends it with 75
echo "$@" > arguments
trap 'echo USR1 > got; exit 75' USR1
trap 'echo TERM > got; exit 75' TERM
touch started
[ -n "$CODE" ] && exit "$CODE"
for _ in $(seq 20000); do sleep 0.05; done
exit 70
"""


# A job step with two processes, as if each were on a node of its own.
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
SLURM_PROCID=0 "$@" &
head=$!
SLURM_PROCID=1 "$@" &
trap 'kill "$head" "$!"' TERM
wait
wait
"""


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start a script under bash with fakes of the commands of Slurm and Ray, and of gptbatch."""
    (tmp_path / "bin").mkdir()
    write_program(tmp_path / "bin" / "scontrol", SCONTROL)
    write_program(tmp_path / "bin" / "srun", '#!/bin/bash\necho "$@" > step\nexec sleep 900\n')
    write_program(tmp_path / "bin" / "ray", "#!/bin/bash\n")
    write_program(tmp_path / "bin" / "gptbatch", STAND_IN)

    def start(
        *arguments: str, script: str = "slurm.sbatch", code: str = "", **variables: str
    ) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "17",
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NNODES": "2",
            "CODE": code,
            **variables,
        }
        # tests/test_on_ray.py sets it; `ray start` refuses it.
        environment.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", None)
        return subprocess.Popen(
            ["bash", str(CONFIGS / script), *arguments],
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.mark.parametrize("code", ["0", "65", "69", "75", "78"])
@pytest.mark.parametrize("script", SBATCH)
def test_slurm_requeues_on_75_only(
    slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path, script: str, code: str
) -> None:
    process = slurm("--config", "demo", script=script, code=code)
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == int(code)
    on_ray = "--on ray --ray-address 127.0.0.1:20017 --workers 2 --worker-cpus 1"
    own = on_ray if "ray" in script else "--threads 1"
    assert (tmp_path / "arguments").read_text() == f"generate {own} --config demo\n"
    check_command(["gptbatch", *(tmp_path / "arguments").read_text().split()])
    assert (tmp_path / "requeued").exists() == (code == "75")


@pytest.mark.parametrize(("restarts", "is_requeued"), [("0", True), ("19", True), ("20", False)])
@pytest.mark.parametrize("script", SBATCH)
def test_slurm_requeues_20_times_without_a_signal(
    slurm: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
    script: str,
    restarts: str,
    is_requeued: bool,
) -> None:
    """A row without enough memory, or a part that crashes workers, ends each run with 75."""
    process = slurm(script=script, code="75", SLURM_RESTART_COUNT=restarts)
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == 75
    assert (tmp_path / "requeued").exists() == is_requeued


def test_ray_in_slurm_goes_on_when_its_step_has_failed(
    slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Then gptbatch finds no cluster, and says so."""
    write_program(tmp_path / "bin" / "srun", "#!/bin/bash\nexit 1\n")
    write_program(tmp_path / "bin" / "ray", "#!/bin/bash\nexit 1\n")
    process = slurm(script="slurm-ray.sbatch", code="78")
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == 78


@pytest.mark.parametrize("name", ["USR1", "TERM"])
@pytest.mark.parametrize("script", SBATCH)
def test_slurm_forwards_signals(
    slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path, script: str, name: str
) -> None:
    process = slurm(script=script)
    wait_for((tmp_path / "started").exists, "start")
    process.send_signal(signal.Signals[f"SIG{name}"])
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == 75
    assert (tmp_path / "got").read_text() == f"{name}\n"
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"


@pytest.mark.parametrize("name", ["USR1", "TERM"])
@pytest.mark.parametrize("script", SBATCH)
def test_slurm_forwards_a_signal_that_arrives_before_the_program(
    slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path, script: str, name: str
) -> None:
    """The fake gptbatch signals the shell, whose trap signals it before it has handlers."""
    write_program(
        tmp_path / "bin" / "gptbatch", f"#!/bin/bash\nkill -{name} $PPID\nexec sleep 900\n"
    )
    process = slurm(script=script)
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == 75
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"


@pytest.mark.parametrize("script", SBATCH)
def test_slurm_does_not_requeue_a_killed_program(
    slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path, script: str
) -> None:
    write_program(tmp_path / "bin" / "gptbatch", "#!/bin/bash\nkill -KILL $$\n")
    process = slurm(script=script)
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == 137
    assert not (tmp_path / "requeued").exists()


@pytest.mark.slow
def test_slurm_with_the_real_program(
    slurm: Callable[..., subprocess.Popen[str]],
    checkpoint: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """The first run has slow steps, so that the signal arrives before its end."""
    path = write_rows([{"prompt": f"{i} The king"} for i in range(200)])
    program = tmp_path / "bin" / "gptbatch"
    start = f"#!/bin/bash\nPYTHONPATH={PYTHONPATH} exec {sys.executable}"
    slow = (
        "from tests.faults import install; install('slow step', '0.05'); "
        "from gptbatch.jobs.cli import main; main()"
    )
    write_program(program, f'{start} -c "{slow}" "$@"\n')
    arguments = [
        "--model",
        str(checkpoint),
        "--input",
        str(path),
        "--output",
        "out",
        "--max-new-tokens",
        "12",
        "--batch-size",
        "4",
        "--part-rows",
        "5",
    ]
    process = slurm(*arguments)
    wait_for((tmp_path / "out" / "part-000001.parquet").exists, "a part")
    process.send_signal(signal.SIGUSR1)
    _, stderr = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 75, stderr
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    write_program(program, f'{start} -m gptbatch "$@"\n')
    process = slurm(*arguments)
    _, stderr = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, stderr
    assert json.loads((tmp_path / "out" / "_manifest.json").read_text())["rows"] == 200


@pytest.mark.slow
def test_ray_in_slurm_with_the_real_programs(
    slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Two nodes of Ray on this machine, a signal, and the job that Slurm would start again."""
    pytest.importorskip("ray")
    bin_folder = tmp_path / "bin"
    (bin_folder / "ray").unlink()
    (bin_folder / "ray").symlink_to(Path(sys.executable).with_name("ray"))
    write_program(bin_folder / "srun", SRUN)
    program = f'#!/bin/bash\nPYTHONPATH={PYTHONPATH} exec {sys.executable} -m gptbatch "$@"\n'
    write_program(bin_folder / "gptbatch", program)
    options = ["--config", "demo", "--limit", "80", "--part-rows", "5", "--output", "out"]
    variables = {"SLURM_JOB_ID": str(os.getpid()), "PYTHONPATH": PYTHONPATH}

    def run(batch_size: int, stop_at: str | None = None) -> int:
        size = ["--batch-size", str(batch_size)]
        process = slurm(*options, *size, script="slurm-ray.sbatch", **variables)
        if stop_at is not None:
            wait_for((tmp_path / "out" / stop_at).exists, "a part")
            process.send_signal(signal.SIGUSR1)
        process.communicate(timeout=LIMIT_S)
        return process.returncode

    assert run(1, stop_at="part-000001.parquet") == 75
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert run(64) == 0
    assert json.loads((tmp_path / "out" / "_manifest.json").read_text())["rows"] == 80


@pytest.mark.parametrize("kind", ["job", "indexed-job"])
def test_the_kubernetes_job_handles_every_exit_code(kind: str) -> None:
    job = yaml.safe_load((CONFIGS / f"kubernetes-{kind}.yml").read_text())
    fail = "FailIndex" if kind == "indexed-job" else "FailJob"
    assert (job["kind"], job["spec"]["template"]["spec"]["restartPolicy"]) == ("Job", "Never")
    assert job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= 10
    rules = {
        rule["action"]: rule["onExitCodes"]["values"]
        for rule in job["spec"]["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert rules["Count"] == [OutputBusyError.exit_code, StoppedError.exit_code]
    every = {error.exit_code for error in all_errors(GptbatchError)} | {2}
    assert set(rules[fail]) == every - set(rules["Count"]) - {StorageError.exit_code}
    (container,) = job["spec"]["template"]["spec"]["containers"]
    check_command([*container["command"], *container["args"]])


def test_the_pods_of_the_indexed_job_find_their_shard() -> None:
    job = yaml.safe_load((CONFIGS / "kubernetes-indexed-job.yml").read_text())["spec"]
    (container,) = job["template"]["spec"]["containers"]
    environment = {item["name"]: item["value"] for item in container["env"]}
    environment["JOB_COMPLETION_INDEX"] = "15"
    options = {"model": "gpt2", "input": "rows.jsonl", "output": "out", "shard": "auto"}
    config = load_config(None, environment=environment, options=options)
    assert find_shard(config.shard, environment) == Shard(15, job["completions"])


def test_the_rayjob_is_a_valid_command_on_enough_cpus() -> None:
    job = yaml.safe_load((CONFIGS / "rayjob.yml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster, command = job["spec"]["rayClusterSpec"], job["spec"]["entrypoint"].split()
    check_command(command)
    # No service of the job may set variables that gptbatch reads as settings.
    assert all(pod["spec"]["enableServiceLinks"] is False for pod in pods_of(job))
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    (group,) = cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    cpus = int(container["resources"]["limits"]["cpu"])
    assert group["replicas"] == int(command[command.index("--workers") + 1])
    assert cpus == int(command[command.index("--worker-cpus") + 1])
    pins = (REPOSITORY / "constraints.txt").read_text().splitlines()
    assert f"ray=={cluster['rayVersion']}" in pins


def test_the_jobs_of_skypilot_find_their_shard() -> None:
    task = yaml.safe_load((CONFIGS / "skypilot.yml").read_text())
    assert task["resources"]["job_recovery"]["max_restarts_on_errors"] > 0
    lines = task["run"].replace("\\\n", " ")
    check_command(lines.removeprefix("exec ").split())
    environment = {"SKYPILOT_JOB_RANK": "15", "SKYPILOT_NUM_JOBS": "16"}
    assert find_shard("auto", environment) == Shard(15, 16)


def pods_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the pod templates of a Job or RayJob."""
    spec = manifest["spec"]
    if manifest["kind"] == "Job":
        return [spec["template"]]
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"] for group in groups]


@pytest.mark.parametrize("name", ["kubernetes-job", "kubernetes-indexed-job", "rayjob"])
def test_kubernetes_knows_each_field(name: str) -> None:
    """The models take fields of the right type, and leave out those that they do not have."""
    batch = pytest.importorskip("lightkube.models.batch_v1")
    core = pytest.importorskip("lightkube.models.core_v1")
    manifest = yaml.safe_load((CONFIGS / f"{name}.yml").read_text())
    for pod in pods_of(manifest):
        assert core.PodTemplateSpec.from_dict(pod).to_dict() == pod
    if manifest["kind"] == "Job":
        assert batch.Job.from_dict(manifest).to_dict() == manifest


def all_errors(base: type[GptbatchError]) -> set[type[GptbatchError]]:
    return {base}.union(*(all_errors(error) for error in base.__subclasses__()))


def check_command(words: list[str]) -> None:
    """Parse the command line with click."""
    assert words[0] == "gptbatch"
    command = cli.get_command(click.Context(cli), words[1])
    assert command is not None
    command.make_context("gptbatch", words[2:])


def test_the_crontab_line_is_a_valid_command() -> None:
    lines = [
        line
        for line in (CONFIGS / "crontab").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    (line,) = [line for line in lines if not line.startswith("PATH=")]
    *times, command = line.split(maxsplit=5)
    assert len(times) == 5
    assert all(field == "*" or field.isdigit() for field in times)
    check_command(command.split("&& ")[1].split(" >>")[0].split())
    assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0


@pytest.fixture
def airflow(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Import the DAG file with fakes for the names of Airflow."""

    class FailedError(Exception):
        pass

    class Dag:
        def __init__(self, **settings: Any) -> None:
            pass

        def __enter__(self) -> Dag:
            return self

        def __exit__(self, *exception: object) -> None:
            pass

    tasks: list[dict[str, Any]] = []
    names: dict[str, dict[str, Any]] = {
        "airflow": {"DAG": Dag},
        "airflow.exceptions": {"AirflowFailException": FailedError},
        "airflow.providers": {},
        "airflow.providers.standard": {},
        "airflow.providers.standard.operators": {},
        "airflow.providers.standard.operators.python": {
            "PythonOperator": lambda **settings: tasks.append(settings)
        },
    }
    for name, content in names.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return {
        **runpy.run_path(str(CONFIGS / "airflow_dag.py")),
        "tasks": tasks,
        "Failed": FailedError,
    }


def test_the_airflow_task_retries_only_codes_that_a_retry_mends(airflow: dict[str, Any]) -> None:
    (task,) = airflow["tasks"]
    assert task["retries"] > 0
    generate = task["python_callable"]
    generate(["true"])
    for code in (69, 74, 75):
        with pytest.raises(
            RuntimeError, match=f"exited with {code}; the next try continues the run"
        ):
            generate(["sh", "-c", f"exit {code}"])
    for code in (2, 65, 78):
        with pytest.raises(airflow["Failed"], match=f"exited with {code}; a retry does not help"):
            generate(["sh", "-c", f"exit {code}"])
    check_command(airflow["COMMAND"])
