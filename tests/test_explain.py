"""The explorer of the report: its data, its sampling rule in JavaScript, and the command."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptbatch.jobs.cli import run_command
from gptbatch.pipeline import JobConfig, run_job
from gptbatch.pipeline.audit.loaded_run import LoadedRun, Overrides
from gptbatch.pipeline.audit.replay import each_step
from gptbatch.pipeline.audit.run_reader import RunReader
from gptbatch.pipeline.engine.logit_adjustments import adjusted_logits
from gptbatch.pipeline.engine.noise import gumbel
from gptbatch.pipeline.engine.nucleus import mass_bits, masses
from gptbatch.pipeline.engine.sampling import sample_tokens
from gptbatch.pipeline.params.sampling_params import SamplingParams, from_row
from gptbatch.pipeline.report.explain import MAX_STEPS, explain_section, find_rows, shares
from gptbatch.pipeline.report.step_table import MAX_LEVEL_TOKENS, StepTable, step_table
from tests.paths import REPOSITORY
from tests.test_report import Elements

RULE = REPOSITORY / "pipeline/report/templates/sampling.js"
NODE = shutil.which("node")
GRID = {
    "temperature": (0.0, 0.05, 0.4, 0.7, 1.0, 1.37, 2.0),
    "top_k": (0, 1, 7, 40, 300, 1000),
    "top_p": (0.05, 0.5, 0.9, 0.99, 1.0),
    "min_p": (0.0, 0.001, 0.05, 0.3),
}
# A rule script, then JSON on standard input -> JSON on standard output.
SCRIPT = """
const input = JSON.parse(require("fs").readFileSync(0, "utf8"));
const output = (() => {{ {body} }})();
process.stdout.write(JSON.stringify(output));
"""


def node(body: str, value: Any) -> Any:
    """Run the rule in node."""
    if NODE is None:
        pytest.skip("no node")
    rule = RULE.read_text(encoding="utf-8")
    script = f"const report = {{}};{rule}" + SCRIPT.format(body=body)
    done = subprocess.run(
        [NODE, "-e", script], input=json.dumps(value), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of the demo model: plain rows, filters, adjustments, samples, an error row."""
    folder = tmp_path_factory.mktemp("explained")
    rows: list[dict[str, Any]] = [
        {"id": "plain", "prompt": "KING:\n"},
        {"id": "top_p", "prompt": "To be", "temperature": 1.4, "top_p": 0.9, "top_k": 600},
        {
            "id": "adjusted",
            "prompt": "FOOL: the the",
            "repetition_penalty": 1.3,
            "presence_penalty": 0.5,
            "bad_words": [" the"],
            "logit_bias": {"200": 2.0},
            "min_p": 0.02,
        },
        {"id": "few", "prompt": "KING", "allowed_token_ids": list(range(90, 140))},
        {"id": "hot", "prompt": "KING", "temperature": 7.5, "max_new_tokens": 8},
        {"id": "greedy", "prompt": "KING", "temperature": 0, "top_k": 5},
        {"id": "samples", "prompt": "LADY:", "n": 2, "logprobs": 0},
        {"id": "<img src=x onerror=alert(1)>", "prompt": "</script><b>\u202e"},
        {"id": "long", "prompt": "x" * 3000},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_job(
        JobConfig(
            model="bundled:demo/model",
            input=str(folder / "rows.jsonl"),
            output=str(folder / "out"),
            max_new_tokens=14,
            ignore_eos=True,
            row_settings=None,
        )
    )
    return folder / "out"


@pytest.fixture(scope="module")
def loaded(finished: Path) -> LoadedRun:
    return LoadedRun(RunReader(finished), Overrides())


def explained(loaded: LoadedRun, *names: str) -> list[dict[str, Any]]:
    """Return the data of rows."""
    section = explain_section(loaded, find_rows(loaded.run, names))
    rows: list[dict[str, Any]] = json.loads(json.dumps(section.data["rows"]))
    return rows


def seen_logits(loaded: LoadedRun, name: str) -> tuple[torch.Tensor, SamplingParams]:
    """Return the adjusted logits (steps, V) of a row."""
    row = loaded.run.require(name)
    params = from_row(row)
    prompt = loaded.prompt_token_ids([row])[0][0]
    found = [
        logits
        if request.adjustments is None
        else adjusted_logits(logits[None], [request.adjustments])[0]
        for logits, request in each_step(loaded, prompt, row["completion_token_ids"], params)
    ]
    return torch.stack(found), params


def winners(
    logits: torch.Tensor, params: SamplingParams, settings: list[dict[str, Any]]
) -> list[list[int | None]]:
    """Return what the sampler samples at each step, with each of the settings."""
    changed = [dataclasses.replace(params, **one) for one in settings]
    return [
        [
            found.token
            for found in sample_tokens(row.expand(len(changed), -1), changed, [step] * len(changed))
        ]
        for step, row in enumerate(logits)
    ]


def grid(count: int | None = None) -> list[dict[str, Any]]:
    """Return all settings of the grid, or some of them."""
    found = [dict(zip(GRID, one, strict=True)) for one in itertools.product(*GRID.values())]
    return (
        found
        if count is None
        else [found[i] for i in np.random.default_rng(0).permutation(len(found))[:count]]
    )


# -- the data --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "top_p", "adjusted", "few", "hot", "greedy"])
def test_data_is_that_of_replay(
    finished: Path, loaded: LoadedRun, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (row,) = explained(loaded, name)
    capfd.readouterr()
    assert run_command(["replay", str(finished), "--prompt-id", name, "--trace", "--json"]) == 0
    *lines, summary = map(json.loads, capfd.readouterr().out.splitlines())
    assert len(row["steps"]) == len(lines) == row["tokens"] > 3
    assert summary["equal"]
    for step, line in zip(row["steps"], lines, strict=True):
        for key in ("token", "text", "logprob", "probability", "rank", "kept"):
            assert step[key] == line[key], key
        assert (step["margin"] if np.isfinite(step["margin"]) else None) == line["margin"]
        assert [(other[0], other[1], other[-1]) for other in step["runners_up"]] == [
            (other["token"], other["text"], other["probability"]) for other in line["runners_up"]
        ]
        (noise,) = gumbel(
            torch.tensor([int(row["seed"])]),
            torch.tensor([line["step"]]),
            torch.tensor([line["token"]]),
        ).tolist()
        assert line["noise"] == noise


def test_log_probabilities_are_the_recorded_ones(loaded: LoadedRun) -> None:
    (row,) = explained(loaded, "samples#1")
    recorded = loaded.run.require("samples", 1)
    assert row["sample"] == 1
    assert row["seed"] == str(recorded["seed"])
    assert [step["logprob"] for step in row["steps"]] == recorded["token_logprobs"]


def test_tables_hold_the_logits(loaded: LoadedRun) -> None:
    for name in ("plain", "adjusted", "few"):
        (row,) = explained(loaded, name)
        for step, logits in zip(row["steps"], seen_logits(loaded, name)[0].numpy(), strict=True):
            finite = np.sort(logits[np.isfinite(logits)])[::-1]
            levels = np.frombuffer(base64.b64decode(step["levels"]), "<f4")
            counts = step.get("counts", [1] * len(levels))
            listed = np.repeat(levels, counts)
            assert np.array_equal(listed, finite[: len(listed)])
            assert len(listed) == min(len(finite), MAX_LEVEL_TOKENS)
            ends = [segment[0] for segment in step["segments"]]
            assert [len(listed), *ends][-1] == len(finite)
            assert {step["token"], int(logits.argmax())} <= {entry[0] for entry in step["tokens"]}
            for token, place, logit, *_ in step["tokens"]:
                assert np.float32(logit) == logits[token]
                assert place == (finite > logits[token]).sum()
                assert place < len(listed) or place in [len(listed), *ends]


def test_bytes_of_a_part_of_a_character(loaded: LoadedRun) -> None:
    (row,) = explained(loaded, "few")
    entries = {entry[0]: entry for step in row["steps"] for entry in step["tokens"]}
    parts = [entry for entry in entries.values() if "\ufffd" in entry[3]]
    assert parts
    for entry in parts:
        assert bytes.fromhex(entry[4]).decode(errors="replace") == entry[3]


# -- the table of a step ---------------------------------------------------------------------------


def table_of(
    logits: np.ndarray[Any, Any], **options: Any
) -> tuple[StepTable, np.ndarray[Any, Any]]:
    noise = gumbel(torch.tensor(5), torch.tensor(2), torch.arange(len(logits))).numpy()
    settings = {"max_temperature": 3.0, "token": 0, "top_k": 0, **options}
    return step_table(logits.astype(np.float32), noise, **settings), noise


@pytest.mark.parametrize("seed", range(4))
def test_every_token_that_can_win_or_come_second_is_listed(seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=400) * 3
    if seed % 2:
        logits = logits.round(0)
    logits = logits.astype(np.float32)
    table, noise = table_of(logits)
    listed = set(table.token_ids.tolist())
    order = np.argsort(-logits, kind="stable")
    for temperature in (0.01, 0.3, 0.8, 1.5, 3.0):
        scores = (logits.astype(np.float64) + temperature * noise)[order]
        for count in range(1, len(order) + 1):
            # a filter keeps ties
            if count == len(order) or logits[order[count]] < logits[order[count - 1]]:
                best = np.argsort(-scores[:count], kind="stable")[:2]
                assert set(order[best].tolist()) <= listed
    assert len(listed) < 60


@pytest.mark.parametrize("scale", [0.5, 3.0, 8.0])
def test_sums_of_segments(scale: float) -> None:
    generator = np.random.default_rng(1)
    logits = (generator.normal(size=20_000) * scale - 35).astype(np.float32)
    table, _ = table_of(logits, top_k=4321)
    ordered = np.sort(logits.astype(np.float64))[::-1]
    first = len(table.levels) + int((table.counts - 1).sum())
    assert 4321 in [segment.end for segment in table.segments]
    for segment in table.segments:
        assert (segment.low, segment.high) == (ordered[segment.end - 1], ordered[first])
        for temperature in (0.07, 0.6, 1.1, 1.9):
            total = np.exp((ordered - ordered[0]) / temperature).sum()
            exact = np.exp((ordered[first : segment.end] - ordered[0]) / temperature).sum()
            found = segment.weights @ np.exp((segment.nodes - ordered[0]) / temperature)
            assert abs(found - exact) < 1e-12 * total
        first = segment.end


def test_a_step_of_a_large_vocabulary_is_small() -> None:
    logits = np.random.default_rng(2).normal(size=50_257) * 3 - 35
    table, _ = table_of(logits)
    nodes = sum(len(segment.weights) for segment in table.segments)
    assert 4 * len(table.levels) + 8 * nodes < 4000
    assert len(table.token_ids) < 60


def test_ties_take_one_level() -> None:
    logits = torch.randn(50_257, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    table, _ = table_of(logits.numpy())
    assert len(table.levels) < 100
    assert table.counts.sum() >= MAX_LEVEL_TOKENS


# -- the rule in JavaScript ------------------------------------------------------------------------


def test_noise_in_javascript() -> None:
    cases = [(0, 0, 0), (1, 5, 7), (2**63 - 1, 1023, 50_256), (2**32, 3, 50_255), (2**31, 9, 2**17)]
    found = node(
        "return input.map(([seed, step, token]) => gumbel(keyOf(seed), step, token))",
        [(str(seed), step, token) for seed, step, token in cases],
    )
    expected = gumbel(*map(torch.tensor, zip(*cases, strict=True))).tolist()
    assert found == pytest.approx(expected, rel=1e-14)


def test_masses_in_javascript() -> None:
    x = -np.random.default_rng(0).uniform(0, 34, 2000)
    for vocab_size in (1000, 70_000):
        bits = mass_bits(vocab_size)
        found = node(
            "return input.x.map((x) => mass(x, input.bits))", {"x": x.tolist(), "bits": bits}
        )
        assert found == masses(torch.tensor(x), bits).tolist()


@pytest.mark.parametrize("name", ["plain", "top_p", "adjusted", "few", "hot"])
def test_the_winner_is_that_of_the_sampler(loaded: LoadedRun, name: str) -> None:
    (row,) = explained(loaded, name)
    settings = [*grid(60), row["settings"]]
    found = node(
        """return input.row.steps.map((_, i) => {
            const step = readStep(input.row, i);
            return input.settings.map((one) => sample(step, one).id);
        });""",
        {"row": row, "settings": settings},
    )
    logits, params = seen_logits(loaded, name)
    assert found == winners(logits, params, settings)
    assert [step[-1] for step in found] == [step["token"] for step in row["steps"]]


def test_kept_tokens_in_javascript(loaded: LoadedRun) -> None:
    (row,) = explained(loaded, "top_p")
    found = node(
        "return input.steps.map((_, i) => keptCount(readStep(input, i), input.settings))", row
    )
    kept = [step["kept"] for step in row["steps"]]
    # in a segment it is an estimate
    assert found == [
        count if count <= MAX_LEVEL_TOKENS else pytest.approx(count, rel=0.1) for count in kept
    ]
    assert max(kept) <= 600


# -- the section and the command -------------------------------------------------------------------


def test_steps_are_divided_among_rows() -> None:
    assert shares([10, 400, 300], MAX_STEPS) == [10, 123, 123]
    assert shares([1000], MAX_STEPS) == [MAX_STEPS]
    assert sum(shares([900] * 7, MAX_STEPS)) == MAX_STEPS


def test_the_command(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--explain", "plain", "--explain", "samples#1", "--explain", "plain"]
    assert run_command(["report", str(finished), *arguments]) == 0
    html = (tmp_path / "out-report.html").read_text(encoding="utf-8")
    rows = Elements(html).data("explorer")["rows"]
    assert [(row["id"], row["sample"]) for row in rows] == [("plain", 0), ("samples", 1)]
    assert len(html.encode()) < 2_000_000


def test_rows_that_are_cut_are_named(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gptbatch.pipeline.report.explain.MAX_STEPS", 12)
    arguments = ["--explain", "hot", "--explain", "samples#1"]
    assert run_command(["report", str(finished), *arguments]) == 0
    message = capfd.readouterr().err
    assert "row 'hot': the first 6 of its 8 tokens are explained" in message
    assert "row 'samples', sample 1: the first 6 of its 14 tokens are explained" in message


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--explain", "nine"], 66, "no row has the id 'nine'; the run has 10 samples of 9 rows"),
        (["--explain", "samples#2"], 66, "row 'samples' has no sample 2; it has the samples 0, 1"),
        (["--explain", "plain#1"], 66, "row 'plain' has no sample 1; it has the sample 0"),
        (["--explain", "nine#1"], 66, "no row has the id 'nine#1'"),
        (["--explain", "long"], 66, "row 'long' cannot be explained: the prompt has"),
        (["--explain", "plain", "--no-text"], 2, "--no-text leaves texts out"),
        (["--model", "gpt2"], 2, "--model has no effect without --explain"),
        (["--explain", "plain", "--model", "none"], 78, "none"),
    ],
)
def test_wrong_arguments(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(["report", str(finished), *arguments]) == code
    assert message in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
