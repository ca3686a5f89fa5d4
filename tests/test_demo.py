"""The bundled demo: its model card, its completions, and train-demo."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from gptbatch.jobs.train_demo import train_demo
from gptbatch.pipeline import JobConfig, load_config, run_job
from gptbatch.pipeline.system.bundled import locate
from tests.conftest import SENTENCES, run_gptbatch


def test_the_model_card_states_the_size_of_the_demo() -> None:
    folder = locate("bundled:demo/model")
    assert (folder / "model.safetensors").stat().st_size <= 10_000_000
    config = json.loads((folder / "config.json").read_text())
    assert config["n_positions"] >= 256
    assert config["vocab_size"] <= 2048
    card = (folder / "README.md").read_text()
    assert "nats per character" in card
    assert "gptbatch train-demo" in card


def test_the_prompts_have_every_kind() -> None:
    rows = [
        json.loads(line) for line in locate("bundled:demo/prompts.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 200
    lengths = sorted(len(row["prompt"]) for row in rows)
    assert lengths[0] == 0
    assert lengths[-1] > 200
    assert len({row["prompt"] for row in rows}) >= 190


@pytest.mark.slow
def test_completions_read_as_lines_of_a_play(tmp_path: Path) -> None:
    """Most completions name a speaker: a line of capitals that ends in a colon."""
    config = load_config("demo", environment={}, options={"output": str(tmp_path / "out")})
    summary = run_job(config)
    assert (summary.rows, summary.errors) == (200, 0)
    table = pq.read_table(tmp_path / "out" / "part-000000.parquet").to_pylist()
    speaking = [
        row
        for row in table
        if any(line.endswith(":") and line[:1].isupper() for line in row["completion"].splitlines())
    ]
    assert len(speaking) > 120
    twins = [row["completion"] for row in table if row["seed"] == 7]
    assert len(twins) == 2
    assert twins[0] == twins[1]
    assert {row["finish_reason"] for row in table} == {"stop", "length"}


@pytest.mark.slow
def test_check_model_on_the_demo() -> None:
    ran = run_gptbatch("check-model", "bundled:demo/model")
    assert ran.code == 0, ran.stderr
    assert ran.summary["agree"] is True


def test_invalid_training_texts(tmp_path: Path) -> None:
    for content, options, code, message in (
        (b"short", [], 65, "too short"),
        (b"\xff" * 1000, [], 65, "not UTF-8 at byte 1"),
        (
            b"text " * 1000,
            ["--n-embd", "16", "--n-head", "3"],
            2,
            "--n-embd 16 is not a multiple of --n-head 3",
        ),
    ):
        (tmp_path / "text.txt").write_bytes(content)
        ran = run_gptbatch("train-demo", tmp_path / "text.txt", tmp_path / "model", *options)
        assert ran.code == code
        assert message in ran.stderr
        assert "Traceback" not in ran.stderr


@pytest.mark.filterwarnings("ignore")
def test_a_demo_model_can_be_trained_and_used(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"KING:\n{sentence}" for sentence in SENTENCES * 60))
    small = [
        "--steps",
        "60",
        "--batch-size",
        "4",
        "--n-positions",
        "32",
        "--n-layer",
        "1",
        "--n-head",
        "2",
        "--n-embd",
        "32",
    ]
    result = CliRunner().invoke(
        train_demo, [str(text), str(tmp_path / "model"), *small, "--vocab-size", "300"]
    )
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    assert 0 < summary["validation_nats_per_character"] < 1.8, "after one step it is 2.25"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "KING:"}\n')
    run = run_job(
        JobConfig(
            model=str(tmp_path / "model"),
            input=str(prompts),
            output=str(tmp_path / "out"),
            max_new_tokens=8,
        )
    )
    assert run.ok == 1
