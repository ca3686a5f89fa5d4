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
from click.testing import CliRunner

from gptbatch.jobs.group import cli
from gptbatch.pipeline import load_config
from gptbatch.pipeline.errors import GptbatchError, OutputBusyError, StoppedError, StorageError
from gptbatch.pipeline.output.shards import Shard, find_shard
from tests.paths import PYTHONPATH, REPOSITORY
from tests.processes import LIMIT_S, wait_for

CONFIGS = REPOSITORY / "configs"
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


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start slurm.sbatch under bash with a fake scontrol, and a fake gptbatch if there is none."""
    (tmp_path / "bin").mkdir()
    write_program(tmp_path / "bin" / "scontrol", '#!/bin/bash\necho "$@" >> requeued\n')
    write_program(tmp_path / "bin" / "gptbatch", STAND_IN)

    def start(*arguments: str, code: str = "") -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "17",
            "SLURM_CPUS_PER_TASK": "1",
        }
        command = ["bash", str(CONFIGS / "slurm.sbatch"), *arguments]
        return subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**environment, "CODE": code},
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.mark.parametrize("code", ["0", "65", "69", "75", "78"])
def test_slurm_requeues_on_75_only(
    slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path, code: str
) -> None:
    process = slurm("--config", "demo", code=code)
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == int(code)
    assert (tmp_path / "arguments").read_text() == "generate --threads 1 --config demo\n"
    assert (tmp_path / "requeued").exists() == (code == "75")


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_slurm_forwards_signals(
    slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path, name: str
) -> None:
    process = slurm()
    wait_for((tmp_path / "started").exists, "start")
    process.send_signal(signal.Signals[f"SIG{name}"])
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == 75
    assert (tmp_path / "got").read_text() == f"{name}\n"
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_slurm_forwards_a_signal_that_arrives_before_the_program(
    slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path, name: str
) -> None:
    """The fake gptbatch signals the shell, whose trap signals it before it has handlers."""
    write_program(
        tmp_path / "bin" / "gptbatch", f"#!/bin/bash\nkill -{name} $PPID\nexec sleep 900\n"
    )
    process = slurm()
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == 75
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"


def test_slurm_does_not_requeue_a_killed_program(
    slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    write_program(tmp_path / "bin" / "gptbatch", "#!/bin/bash\nkill -KILL $$\n")
    process = slurm()
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

    class Failed(Exception):  # noqa: N818
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
        "airflow.exceptions": {"AirflowFailException": Failed},
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
    return {**runpy.run_path(str(CONFIGS / "airflow_dag.py")), "tasks": tasks, "Failed": Failed}


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


def test_status_of_a_folder_that_is_no_run(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["status", str(tmp_path)], standalone_mode=False)
    assert "holds no run of gptbatch" in str(result.exception)
