"""gptbatch as an Airflow task. Copy this file into the folder of DAGs.

Airflow retries a failed task after every exit code. The task raises AirflowFailException, which
stops the retries, for the exit codes that a retry does not mend.
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
# another run holds the output; an I/O error; stopped by a signal or out of memory
RETRY_CODES = (69, 74, 75)


def generate(command: list[str] = COMMAND) -> None:
    """Run the command. If the task is killed, send SIGTERM to the command and wait for it."""
    import subprocess

    process = subprocess.Popen(command)
    try:
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait(timeout=30)
        raise
    if code in RETRY_CODES:
        raise RuntimeError(f"gptbatch exited with {code}; the next try continues the run")
    if code != 0:
        raise AirflowFailException(f"gptbatch exited with {code}; a retry does not help")


with DAG(dag_id="gptbatch", start_date=datetime(2026, 1, 1), schedule=None, catchup=False) as dag:
    PythonOperator(
        task_id="generate", python_callable=generate, retries=20, retry_delay=timedelta(minutes=1)
    )
