"""gptbatch as an Airflow task. Copy it into your folder of DAGs.

Airflow tries a task again whatever its exit code, so the command turns the codes that trying again cannot help into a failure
without retries. gptbatch never exits with 99, which BashOperator takes for "skipped".
"""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow import DAG
from airflow.exceptions import AirflowFailException
from airflow.providers.standard.operators.python import PythonOperator

COMMAND = [
    "gptbatch",
    "generate",
    "--config",
    "gpt2-cpu",
    "--input",
    "/data/prompts.jsonl",
    "--output",
    "/data/out",
]
TRY_AGAIN = (
    69,
    74,
    75,
)  # another run holds the output; an I/O error; stopped by a signal or out of memory


def generate(command: list[str] = COMMAND) -> None:
    """Run the command; a task that is killed hands SIGTERM on and waits for it."""
    import subprocess

    process = subprocess.Popen(command)
    try:
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait(timeout=30)
        raise
    if code in TRY_AGAIN:
        raise RuntimeError(f"gptbatch exited with {code}; the next try goes on where it was")
    if code != 0:
        raise AirflowFailException(f"gptbatch exited with {code}; trying again changes nothing")


with DAG(dag_id="gptbatch", start_date=datetime(2026, 1, 1), schedule=None, catchup=False) as dag:
    PythonOperator(
        task_id="generate", python_callable=generate, retries=20, retry_delay=timedelta(minutes=1)
    )
