"""The recipes of docs/scale.md for other engines, run as scripts where the engine is installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptbatch.pipeline import EngineConfig, JobConfig, run_job
from gptbatch.pipeline.output.schema import DETERMINISTIC_COLUMNS
from tests.paths import REPOSITORY
from tests.processes import LIMIT_S, child_environment

PAGE = (REPOSITORY / "docs" / "scale.md").read_text(encoding="utf-8")
RECIPES = dict(
    re.findall(r"^<!-- needs (\w+) -->\n```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
)


def table(output: Path) -> pa.Table:
    parts = [pq.read_table(path) for path in sorted(output.glob("part-*.parquet"))]
    return pa.concat_tables(parts).select(DETERMINISTIC_COLUMNS).combine_chunks()


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name"), [("pyspark", "spark"), ("distributed", "dask")])
def test_the_recipe_gives_the_rows_of_a_local_run(module: str, name: str, tmp_path: Path) -> None:
    """Dask takes 11 s, Spark in local mode 26 s."""
    pytest.importorskip(module)
    (tmp_path / "recipe.py").write_text(RECIPES[module], encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "recipe.py"],
        cwd=tmp_path,
        env={
            **child_environment(PYSPARK_PYTHON=sys.executable, SPARK_LOCAL_IP="127.0.0.1"),
            "PYTHONPATH": ":".join(filter(None, sys.path)),
        },
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    output = tmp_path / "out" / name
    assert (output / "_SUCCESS").exists()
    config = JobConfig(
        model="bundled:demo/model",
        input="bundled:demo/prompts.jsonl",
        output=str(tmp_path / "local"),
        limit=40,
        part_rows=5,
        engine=EngineConfig(threads=1),
    )
    run_job(config)
    assert table(output).equals(table(tmp_path / "local"))


def test_each_recipe_has_a_test() -> None:
    assert RECIPES.keys() == {"pyspark", "distributed"}
