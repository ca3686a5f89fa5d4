"""gptbatch.generate and LLM: the rows of a job, in memory, with a model that is loaded once."""

from __future__ import annotations

import gc
import json
import random
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import gptbatch
from gptbatch import llm
from gptbatch.jobs import progress
from gptbatch.pipeline import ConfigError, InputRowsError, JobConfig, run_job
from gptbatch.pipeline.config.call import CALL_SETTINGS, LOADING_SETTINGS
from gptbatch.pipeline.output.in_memory import FACTS_KEY
from gptbatch.pipeline.output.schema import SCHEMA, content_digest
from gptbatch.pipeline.params.settings import SAMPLING_SETTINGS
from tests.processes import child_environment
from tests.test_row_settings import random_settings


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    yield
    gptbatch.unload()


def mixed_rows(count: int) -> list[Any]:
    """Return texts, and rows with settings of every kind, samples, metadata and errors."""
    rng = random.Random(3)
    rows: list[Any] = []
    for index in range(count):
        if index % 5 == 0:
            rows.append(f"To be {index}, or not")
            continue
        settings = {
            name: dict(value) if name == "logit_bias" else value
            for name, value in random_settings(rng).items()
        }
        row = {"id": f"r{index}", "prompt": "The king" * rng.randint(0, 3), "topic": index}
        row |= {"n": 2} if index % 11 == 0 else {}
        row |= {"seed": index} if index % 3 == 0 else {}
        rows.append(row | settings)
    rows[7] = {"prompt": "king " * 100}
    rows[8] = {"prompt": 5, "topic": 1}
    return rows


def test_rows_are_those_of_a_job(checkpoint: Path, tmp_path: Path) -> None:
    """200 rows of mixed settings, with error rows: every deterministic column, logits included."""
    rows = mixed_rows(200)
    lines = [{"prompt": row} if isinstance(row, str) else row for row in rows]
    # as a table, whose error rows are numbered as those in memory are
    (tmp_path / "rows.json").write_text(json.dumps(lines))
    settings: dict[str, Any] = {"max_new_tokens": 9, "temperature": 0.8, "seed": 5}
    settings |= {"record_logits_digest": True, "logprobs": 2}
    run_job(
        JobConfig(
            model=str(checkpoint),
            dataset=str(tmp_path / "rows.json"),
            output=str(tmp_path / "out"),
            part_rows=64,
            on_bad_row="record",
            **settings,
        )
    )
    parts = [pq.read_table(path) for path in sorted((tmp_path / "out").glob("part-*.parquet"))]
    job = pa.concat_tables(parts)
    table = gptbatch.generate(rows, model=str(checkpoint), batch_size=7, **settings)
    assert table.schema.equals(SCHEMA)
    assert table["logits_digest"].equals(job["logits_digest"])
    assert table["completion_token_ids"].equals(job["completion_token_ids"])
    assert content_digest(table) == content_digest(job)
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert {"bad_row", "too_long"} <= manifest["error_kinds"].keys()
    facts = json.loads(table.schema.metadata[FACTS_KEY])
    for name in ("config_hash", "model_digest", "environment"):
        assert facts[name] == manifest[name]
    assert not {"host", "model_path", "input"} & facts.keys()


def test_the_second_call_loads_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    found: list[Any] = []
    for calls, name in ((loaded, "load_model"), (found, "find_checkpoint")):
        original = getattr(llm, name)

        def counted(*args: Any, calls: Any = calls, original: Any = original, **kwargs: Any) -> Any:
            calls.append(args)
            return original(*args, **kwargs)

        monkeypatch.setattr(llm, name, counted)
    first = gptbatch.generate("king", model=str(checkpoint), max_new_tokens=3)
    again = gptbatch.generate("king", model=f"{checkpoint}/", max_new_tokens=3, threads=None)
    gptbatch.generate(["queen"], model=str(checkpoint), temperature=0.5, n=2)
    assert content_digest(first) == content_digest(again)
    assert (len(loaded), len(found)) == (1, 1)
    gptbatch.generate("king", model=str(checkpoint), max_new_tokens=3, attention="padded")
    assert len(loaded) == 2


def test_a_call_with_changed_files_loads_them(checkpoint: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    gptbatch.generate("king", model=str(model), max_new_tokens=1)
    kept = llm._kept
    (model / "generation_config.json").write_text('{"eos_token_id": 7}')
    gptbatch.generate("king", model=str(model), max_new_tokens=1)
    assert llm._kept is not kept
    shutil.rmtree(model)
    with pytest.raises(ConfigError, match="no such folder"):
        gptbatch.generate("king", model=str(model))


def test_unload_and_another_model_free_the_weights(checkpoint: Path) -> None:
    def weights() -> weakref.ref[Any]:
        assert llm._kept is not None
        assert llm._kept._loaded is not None
        return weakref.ref(llm._kept._loaded.model)

    gptbatch.generate("king", model=str(checkpoint), max_new_tokens=1)
    first = weights()
    gptbatch.generate("king", model=str(checkpoint), max_new_tokens=1, dtype="bfloat16")
    second = weights()
    gptbatch.unload()
    gc.collect()
    assert (first(), second()) == (None, None)


def test_an_object_keeps_its_model_and_leaves_threads_alone(checkpoint: Path) -> None:
    model = gptbatch.LLM(str(checkpoint), threads=2)
    assert repr(model) == f"LLM(model={str(checkpoint)!r}, threads=2)"
    table = model.generate(["king"] * 3, max_new_tokens=2)
    loaded = model._loaded
    model.generate("queen", max_new_tokens=2)
    assert model._loaded is loaded
    assert table.num_rows == 3
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 5}, "generate: there is no key 'max_tokens'; use max_new_tokens"),
        ({"temperature": -1}, "generate: temperature: input should be greater .* not -1"),
        ({"threads": 0}, "generate: threads: input should be greater"),
        ({"dtyp": "float32"}, "did you mean dtype"),
        ({"greedy": True}, "use temperature=0"),
        ({"part_rows": 5}, "generate: part_rows is a setting of jobs"),
        ({"engine": {}}, "give its settings by their own names: device, dtype"),
        ({"stop_token_ids": [4000]}, "stop_token_ids holds token 4000"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens"),
    ],
)
def test_a_wrong_setting_is_named_before_the_model_loads(
    checkpoint: Path, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "load_model", None)
    with pytest.raises(ConfigError, match=message):
        gptbatch.generate(["king"], model=str(checkpoint), **settings)


def test_settings_of_the_model_and_of_a_call_are_told_apart(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="LLM: temperature: belongs to a call"):
        gptbatch.LLM(str(checkpoint), temperature=0.5)
    with pytest.raises(ConfigError, match="generate: dtype: belongs to the model"):
        gptbatch.LLM(str(checkpoint)).generate("king", dtype="bfloat16")
    assert set(SAMPLING_SETTINGS) <= set(CALL_SETTINGS)
    assert not set(LOADING_SETTINGS) & set(CALL_SETTINGS)


def test_bad_rows_become_error_rows_or_raise(checkpoint: Path) -> None:
    rows = [5, {"prompt": "king", "seed": "x"}, {"text": "king"}, {"id": "1", "prompt": "a"}, "b"]
    table = gptbatch.generate([*rows, "ok"], model=str(checkpoint), max_new_tokens=1, n=2)
    errors = table["error"].to_pylist()
    assert [error is None for error in errors] == [False] * 6 + [True] * 6
    assert "must be a text or a dictionary of fields, not a number" in errors[0]
    with pytest.raises(InputRowsError, match=r"prompts\[1\]: seed must be a whole number"):
        gptbatch.generate(rows, model=str(checkpoint), on_bad_row="fail")
    for wrong in (5, b"king", None):
        with pytest.raises(ConfigError, match="prompts must be a text"):
            gptbatch.generate(wrong, model=str(checkpoint))  # type: ignore[arg-type]


def test_prompts_come_from_lists_tables_and_generators(checkpoint: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "king", "seed": 3, "topic": "a"},
        {"prompt": "queen", "seed": 4},
    ]
    model = gptbatch.LLM(str(checkpoint))
    expected = content_digest(model.generate(rows, max_new_tokens=4))
    frame = pd.DataFrame(rows).astype({"topic": "string"})
    arrays = [{**row, "seed": np.int64(row["seed"])} for row in rows]
    with_nulls = [rows[0], {**rows[1], "topic": None}]
    nulls = content_digest(model.generate(with_nulls, max_new_tokens=4))
    assert content_digest(model.generate(iter(arrays), max_new_tokens=4)) == expected
    for table in (frame, pl.DataFrame(with_nulls), pa.Table.from_pylist(with_nulls)):
        assert content_digest(model.generate(table, max_new_tokens=4)) == nulls
    texts = model.generate(frame["prompt"], max_new_tokens=4)["prompt"].to_pylist()
    assert texts == model.generate(pl.Series(["king", "queen"]))["prompt"].to_pylist()
    array = pa.chunked_array([["king"], ["queen"]])
    for prompts in (array, array.chunk(0)):
        table = model.generate(prompts, max_new_tokens=1)
        assert table["prompt"].to_pylist() == prompts.to_pylist()
    assert model.generate([]).num_rows == 0
    with pytest.raises(ConfigError, match="a set has none"):
        model.generate({"king", "queen"})


def test_an_object_works_from_another_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    model = gptbatch.LLM(checkpoint.name)
    monkeypatch.chdir(tmp_path)
    assert model.generate("king", max_new_tokens=1)["error"].to_pylist() == [None]


def test_templates_messages_and_biases(checkpoint: Path) -> None:
    model = gptbatch.LLM(str(checkpoint))
    rows = [{"who": "king", "logit_bias": {5: 100}, "temperature": 0}, "king"]
    table = model.generate(rows, prompt_template="The {who}", max_new_tokens=2)
    assert table["prompt"].to_pylist() == ["The king", ""]
    assert table["completion_token_ids"].to_pylist() == [[5, 5], []]
    assert "a prompt is a dictionary of fields" in table["error"][1].as_py()
    chat = [{"role": "user", "content": "king"}]
    for prompts in ([chat], [{"turns": chat}]):
        table = model.generate(prompts, messages_field="turns", max_new_tokens=2)
        assert table["error"].to_pylist() == [None]


def test_progress(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gptbatch.LLM(str(checkpoint))
    model.generate("king", max_new_tokens=1)
    assert capsys.readouterr().err == ""
    model.generate(["king"] * 3, max_new_tokens=1, progress=True)
    assert "3/3" in capsys.readouterr().err
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert progress.progress_for_python(None) is not None
    assert progress.progress_for_python(False) is None
    with pytest.raises(ConfigError, match="methods begin, update and end, not 1"):
        model.generate("king", progress=1)  # type: ignore[arg-type]


def test_an_import_is_light() -> None:
    program = (
        "import sys, gptbatch; assert 'generate' in dir(gptbatch); "
        "print([n for n in ('torch', 'pydantic', 'pyarrow', 'click') if n in sys.modules]); "
        "import gptbatch.llm; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n[]\n"
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        gptbatch.generat  # noqa: B018
