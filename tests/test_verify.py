"""verify and replay: check recorded rows, and generate a row again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gptbatch.jobs.cli import run_command
from gptbatch.pipeline import JobConfig, run_job
from gptbatch.pipeline.audit.run_reader import RunReader
from gptbatch.pipeline.audit.trace import explain_step
from gptbatch.pipeline.audit.verify import evenly_spaced
from gptbatch.pipeline.config import EngineConfig
from gptbatch.pipeline.engine.sampling_step import SampleRequest
from gptbatch.pipeline.input.tokenizer import PromptTokenizer
from gptbatch.pipeline.input.tokenizer_loading import load_tokenizer
from gptbatch.pipeline.kernels.compiler import KernelError
from gptbatch.pipeline.params.sampling_params import SamplingParams
from tests.conftest import has_kernels, random_model, run_gptbatch, save_tokenizer

ROWS = 30


@pytest.fixture(scope="module", params=["ragged", "padded"])
def finished(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a run of 30 rows in parts of 8, with own parameters, an error row and full windows."""
    if request.param == "ragged" and not has_kernels():
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(checkpoint, folder / "model")
    texts = ["The king", "To be, or not", "Long live the queen", "", "is dead."]
    rows: list[dict[str, Any]] = [
        {
            "id": f"r{i}",
            "prompt": texts[i % 5] * (1 + i % 3),
            "temperature": (0, 0.8, 1.5)[i % 3],
            "top_k": (0, 7)[i % 2],
        }
        for i in range(ROWS)
    ]
    rows[4]["prompt"] = "king " * 200  # more than n_positions tokens: an error row
    rows[5] |= {"prompt": "k" * 55, "max_new_tokens": 30}  # fills the context
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_job(
        JobConfig(
            model=str(folder / "model"),
            input=str(folder / "prompts.jsonl"),
            output=str(folder / "out"),
            part_rows=8,
            max_new_tokens=20,
            record_logits_digest=True,
            engine=EngineConfig(attention=request.param),
        )
    )
    return folder


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the run that a test may damage."""
    return Path(shutil.copytree(finished / "out", tmp_path / "out"))


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    """Run `gptbatch ARGUMENTS...`; return exit code and lines of standard output or error."""

    def run(*arguments: str | Path, error: bool = False) -> tuple[int, list[str]]:
        capfd.readouterr()
        code = run_command([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, (captured.err if error else captured.out).splitlines()

    return run


Command = Callable[..., tuple[int, list[str]]]


def change(output: Path, prompt_id: str, edit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Edit one row in its part; return the row before the edit."""
    for path in sorted(output.glob("part-*.parquet")):
        table = pq.read_table(path)
        rows = table.to_pylist()
        for row in rows:
            if row["prompt_id"] == prompt_id:
                before = dict(row, completion_token_ids=list(row["completion_token_ids"]))
                edit(row)
                pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
                return before
    raise AssertionError(prompt_id)


def long_row(output: Path) -> str:
    """Return the id of a row of at least 12 tokens."""
    return next(
        str(row["prompt_id"]) for row in RunReader(output).rows() if row["completion_tokens"] >= 12
    )


# -- verify ----------------------------------------------------------------------------------------


def test_an_unchanged_run_is_verified(output: Path, command: Command) -> None:
    code, lines = command("verify", output, "--all")
    summary = json.loads(lines[-1])
    assert code == 0
    assert (summary["rows_checked"], summary["mismatches"], summary["error_rows_skipped"]) == (
        ROWS - 1,
        0,
        1,
    )
    assert summary["judged"] == "exactly"
    reasons = {row["stop_reason"] for row in RunReader(output).rows(["stop_reason"])}
    assert {"max_new_tokens", "window", None} <= reasons
    assert command("verify", output, "--all", "--rows", "5")[0] == 2
    code, lines = command("verify", output, "--rows", "5", "--threads", "1")
    assert (code, json.loads(lines[-1])["rows_checked"]) == (0, 5)


def test_a_changed_token_is_named(output: Path, command: Command) -> None:
    changed = long_row(output)

    def edit(row: dict[str, Any]) -> None:
        row["completion_token_ids"][7] = (row["completion_token_ids"][7] + 1) % 300 or 1

    before = change(output, changed, edit)
    code, lines = command("verify", output, "--all")
    assert code == 1
    assert len(lines) == 3, "one row and no other"
    assert lines[0].startswith(f"row {changed!r} (index {changed[1:]}): step 7: token")
    assert f"the weights choose {before['completion_token_ids'][7]}" in lines[0]
    first = json.loads(lines[-1])["first_mismatch"]
    assert (first["prompt_id"], first["step"]) == (changed, 7)
    assert first["distance"] > 0


def test_a_token_that_the_settings_of_its_row_forbid_has_no_distance(
    output: Path, command: Command
) -> None:
    def forbid(row: dict[str, Any]) -> None:
        allowed = set(row["completion_token_ids"]) - {row["completion_token_ids"][7]}
        row["sampling_params"] = json.dumps({"allowed_token_ids": sorted(allowed)})

    change(output, long_row(output), forbid)
    code, lines = command("verify", output, "--all")
    assert (code, "no change of the logits would give the recorded one" in lines[0]) == (1, True)
    assert "Infinity" not in lines[-1]
    assert json.loads(lines[-1])["first_mismatch"]["distance"] is None


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda row: row.update(
                completion_token_ids=row["completion_token_ids"][:-2], completion_tokens=-2
            ),
            "but completion_tokens is -2",
        ),
        (lambda row: row.update(completion_token_ids=[], completion_tokens=0), "it has no tokens"),
        (
            lambda row: row.update(completion_token_ids=[300] * 3, completion_tokens=3),
            "token 300, which the model (vocab_size 300)",
        ),
        (lambda row: row.update(stop_reason="window"), "it ended by max_new_tokens, not by window"),
        (
            lambda row: row.update(finish_reason="stop"),
            "it ended by max_new_tokens, not by max_new_tokens (stop)",
        ),
        (lambda row: row.update(max_new_tokens=10), "it should have ended with token 9"),
        (lambda row: row.update(max_new_tokens=99), "it should go on after token 19"),
        (lambda row: row.update(completion="x"), "its text is not that of its tokens"),
        (
            lambda row: row.update(min_decision_margin=row["min_decision_margin"] * (1 + 1e-15)),
            "its min_decision_margin is not",
        ),
        (
            lambda row: row.update(min_decision_margin=row["min_decision_margin"] / 2),
            "its min_decision_margin is not",
        ),
        (lambda row: row.update(logits_digest="0" * 64), "the bits of its logits differ"),
        (lambda row: row.update(logits_digest=None), "the bits of its logits differ"),
        (lambda row: row.update(min_decision_margin=None), "its min_decision_margin is not None"),
        (lambda row: row.update(finish_reason="error"), "it is an error row, but has tokens"),
        (lambda row: row.update(prompt=row["prompt"] + " and more"), "but prompt_tokens is"),
    ],
)
def test_any_other_change_is_named(
    output: Path, command: Command, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    changed = next(
        row["prompt_id"]
        for row in RunReader(output).rows()
        if row["stop_reason"] == "max_new_tokens"
    )
    change(output, changed, edit)
    code, lines = command("verify", output, "--all")
    assert code == 1
    assert len(lines) == 3
    assert message in lines[0]
    assert changed in lines[0]


def test_a_changed_seed_is_found(output: Path, command: Command) -> None:
    change(output, long_row(output), lambda row: row.update(seed=row["seed"] ^ 1, temperature=1.5))
    assert command("verify", output, "--all")[0] == 1


@pytest.fixture
def twins(tmp_path: Path) -> Path:
    """Return a greedy run of a model whose tokens 2i and 2i + 1 have equal logits."""
    theirs = random_model()
    with torch.no_grad():
        theirs.transformer.wte.weight[1::2] = theirs.transformer.wte.weight[0::2]
    theirs.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"id": "x", "prompt": "The king"}\n')
    run_job(
        JobConfig(
            model=str(tmp_path / "model"),
            input=str(tmp_path / "prompts.jsonl"),
            output=str(tmp_path / "out"),
            temperature=0.0,
            max_new_tokens=6,
            ignore_eos=True,
        )
    )
    return tmp_path / "out"


def on_another_machine(output: Path) -> None:
    """Make it a run of another machine, which is not portable."""
    manifest = json.loads((output / "_manifest.json").read_text())
    manifest["environment"] |= {"device_class": "another CPU", "arithmetic": None}
    manifest["batch_invariance"] = "verified"
    (output / "_manifest.json").write_text(json.dumps(manifest))


def test_a_tie_is_a_mismatch_in_the_same_environment_and_a_near_tie_in_another(
    twins: Path, command: Command
) -> None:
    """The last token is replaced by one with an equal logit and a larger id."""
    model = PromptTokenizer(load_tokenizer(twins.parent / "model"), start_token=0)

    def to_twin(row: dict[str, Any]) -> None:
        assert row["completion_token_ids"][-1] % 2 == 0
        row["completion_token_ids"][-1] += 1
        row["completion"] = model.decode(row["completion_token_ids"])

    change(twins, "x", to_twin)
    code, lines = command("verify", twins, "--all")
    assert (code, json.loads(lines[-1])["first_mismatch"]) == (
        1,
        {"prompt_id": "x", "sample_index": 0, "step": 5, "distance": 0.0},
    )
    on_another_machine(twins)
    code, lines = command("verify", twins, "--all")
    assert (code, json.loads(lines[-1])["near_ties"]) == (0, 1)
    change(twins, "x", lambda row: row.update(completion="forged"))
    code, lines = command("verify", twins, "--all")
    assert code == 1, "a near tie hides nothing else"
    assert "its text is not that of its tokens" in lines[0]


def test_rows_with_a_sliding_window_are_verified(
    finished: Path, tmp_path: Path, command: Command
) -> None:
    config = RunReader(finished / "out").config | {
        "output": str(tmp_path / "slid"),
        "window_full": "slide",
        "limit": 6,
        "ignore_eos": True,
    }
    run_job(JobConfig.model_validate(config))
    rows = {row["prompt_id"]: row for row in RunReader(tmp_path / "slid").rows()}
    assert rows["r5"]["prompt_tokens"] + rows["r5"]["completion_tokens"] > 66
    code, lines = command("verify", tmp_path / "slid", "--all")
    assert (code, json.loads(lines[-1])["rows_checked"]) == (0, 5)
    change(tmp_path / "slid", "r5", lambda row: row["completion_token_ids"].__setitem__(25, 7))
    code, lines = command("verify", tmp_path / "slid", "--all")
    assert (code, json.loads(lines[-1])["first_mismatch"]["step"]) == (1, 25)


def test_other_weights_are_refused_unless_allowed(
    finished: Path, output: Path, tmp_path: Path, command: Command
) -> None:
    copy = Path(shutil.copytree(finished / "model", tmp_path / "copy"))
    (finished / "model").rename(finished / "moved")
    try:
        code, lines = command("verify", output, error=True)
        assert code == 78
        assert "name a copy of it with --model" in lines[-1]
        assert command("verify", output, "--model", copy)[0] == 0
    finally:
        (finished / "moved").rename(finished / "model")
    random_model(seed=9).save_pretrained(tmp_path / "other")
    save_tokenizer(tmp_path / "other")
    code, lines = command("verify", output, "--model", tmp_path / "other", error=True)
    assert code == 78
    assert "--allow-other-weights" in lines[-1]
    code, lines = command("verify", output, "--model", tmp_path / "other", "--allow-other-weights")
    summary = json.loads(lines[-1])
    assert code == 1
    assert summary["mismatches"] > 20
    assert summary["judged"] == "by tolerance"
    assert "the weights differ" in summary["because"]


def test_in_another_environment_rows_are_judged_by_tolerance(
    output: Path, command: Command
) -> None:
    """In another environment a token beyond the tolerance is a mismatch, too."""
    is_portable = RunReader(output).facts["batch_invariance"] == "portable"
    on_another_machine(output)
    code, lines = command("verify", output, "--all")
    summary = json.loads(lines[-1])
    assert (code, summary["judged"], summary["because"]) == (
        0,
        "by tolerance",
        ["device_class differs", *["arithmetic differs"] * is_portable],
    )
    change(output, long_row(output), lambda row: row["completion_token_ids"].__setitem__(3, 299))
    code, lines = command("verify", output, "--all")
    assert (code, json.loads(lines[-1])["mismatches"]) == (1, 1)


def test_a_run_with_an_int8_cache_is_verified(
    checkpoint: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit in the same environment; by tolerance with another attention backend."""
    if not has_kernels():
        pytest.skip("no C++ compiler")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": "To be, or not to be"[: 3 + i]}) + "\n" for i in range(16))
    )
    config = JobConfig(
        model=str(checkpoint),
        input=str(prompts),
        output=str(tmp_path / "out"),
        max_new_tokens=30,
        engine=EngineConfig(attention="ragged", cache_dtype="int8"),
    )
    run_job(config)
    code, lines = command("verify", tmp_path / "out", "--all")
    assert (code, json.loads(lines[-1])["judged"], json.loads(lines[-1])["rows_checked"]) == (
        0,
        "exactly",
        16,
    )
    run_job(
        config.model_copy(
            update={"output": str(tmp_path / "full"), "engine": EngineConfig(attention="ragged")}
        )
    )
    assert (
        'setting cache_dtype differs: "int8" / "auto"'
        in command("diff", tmp_path / "out", tmp_path / "full")[1]
    )

    def no_kernels() -> None:
        raise KernelError("none here")

    monkeypatch.setattr("gptbatch.pipeline.kv_cache.interface.load_kernels", no_kernels)
    code, lines = command("verify", tmp_path / "out", "--all")
    summary = json.loads(lines[-1])
    assert (code, summary["judged"], summary["mismatches"]) == (0, "by tolerance", 0)
    assert "attention differs" in summary["because"]


def test_a_run_without_self_test_is_judged_by_tolerance(
    finished: Path, tmp_path: Path, command: Command
) -> None:
    config = RunReader(finished / "out").config | {
        "output": str(tmp_path / "off"),
        "batch_invariance": "off",
    }
    run_job(JobConfig.model_validate(config))
    code, lines = command("verify", tmp_path / "off", "--all")
    assert (code, json.loads(lines[-1])["because"]) == (
        0,
        ["the run skipped the self-test (batch_invariance: off)"],
    )
    assert command("diff", finished / "out", tmp_path / "off")[0] == 0


def test_folders_without_a_run_are_refused(tmp_path: Path, command: Command) -> None:
    for name in ("verify", "replay"):
        extra = ["--prompt-id", "x"] if name == "replay" else []
        assert command(name, tmp_path / "nowhere", *extra)[0] == 66
        assert command(name, tmp_path, *extra)[0] == 66


def test_checked_rows_are_evenly_spaced() -> None:
    assert evenly_spaced(5, 3) == [0, 1, 2]
    assert evenly_spaced(3, 101) == [0, 50, 100]
    assert evenly_spaced(1, 10) == [0]
    assert evenly_spaced(4, 0) == []


# -- replay ----------------------------------------------------------------------------------------


def test_a_row_is_replayed_without_the_input(
    finished: Path, output: Path, command: Command
) -> None:
    (finished / "prompts.jsonl").rename(finished / "gone")
    try:
        row = RunReader(output).find("r7")
        assert row is not None
        code, lines = command("replay", output, "--prompt-id", "r7", "--trace", "--json")
        *steps, summary = map(json.loads, lines)
        assert code == 0
        assert summary["equal"]
        assert summary["completion"] == row["completion"]
        assert (
            summary["completion_token_ids"]
            == row["completion_token_ids"]
            == [step["token"] for step in steps]
        )
        assert (
            summary["min_decision_margin"]
            == row["min_decision_margin"]
            == min(step["margin"] for step in steps)
        )
        assert all(step["kept"] == (7 if row["top_k"] else 300) for step in steps)
        assert all(step["rank"] <= step["kept"] and 0 < step["probability"] <= 1 for step in steps)
        assert all(len(step["runners_up"]) == 3 for step in steps)
        code, lines = command("replay", output, "--prompt-id", "r7", "--trace")
        assert lines[0].split() == [
            "step",
            "token",
            "text",
            "probability",
            "rank",
            "kept",
            "margin",
            "runners-up",
        ]
        assert lines[-1].startswith("equal to the recorded row")
    finally:
        (finished / "gone").rename(finished / "prompts.jsonl")


def test_a_row_is_replayed_with_other_parameters(output: Path, command: Command) -> None:
    row = RunReader(output).find("r7")
    assert row is not None
    code, lines = command(
        "replay", output, "--prompt-id", "r7", "--temperature", str(row["temperature"]), "--json"
    )
    assert json.loads(lines[-1])["equal"], "the same parameters give the same row"
    code, lines = command(
        "replay",
        output,
        "--prompt-id",
        "r7",
        "--temperature",
        "0",
        "--max-new-tokens",
        "4",
        "--json",
    )
    summary = json.loads(lines[-1])
    assert code == 0
    assert summary["changed"] == {"temperature": 0.0, "max_new_tokens": 4}
    assert len(summary["completion_token_ids"]) <= 4
    assert not summary["equal"]
    code, lines = command("replay", output, "--prompt-id", "r7", "--seed", "5")
    assert "differs from the recorded row from token" in lines[-1]
    assert "with seed 5" in lines[-1]


def test_a_replay_whose_settings_forbid_every_token_says_so(output: Path, command: Command) -> None:
    settings = ("--allowed-token-ids", "5", "--stop-token-ids", "5", "--min-new-tokens", "3")
    code, lines = command("replay", output, "--prompt-id", "r7", *settings, "--json")
    summary = json.loads(lines[-1])
    reason = "the settings of the row forbid every token as new token 0"
    assert (code, summary["completion"], summary["error"]) == (0, None, reason)
    code, lines = command("replay", output, "--prompt-id", "r7", *settings)
    assert (code, lines[0].endswith(f"[{reason}]")) == (0, True)


def test_error_rows_and_unknown_ids_cannot_be_replayed(output: Path, command: Command) -> None:
    code, lines = command("replay", output, "--prompt-id", "nobody", error=True)
    assert code == 66
    assert "no row has the id 'nobody'; the run has 30 rows" in lines[-1]
    code, lines = command("replay", output, "--prompt-id", "r4", error=True)
    assert code == 66
    assert "row 'r4' cannot be replayed: its prompt is" in lines[-1]
    assert "it is an error row" in lines[-1]


def test_a_replay_shows_a_changed_row(output: Path, command: Command) -> None:
    changed = long_row(output)
    change(output, changed, lambda row: row["completion_token_ids"].__setitem__(2, 7))
    code, lines = command("replay", output, "--prompt-id", changed, "--json")
    summary = json.loads(lines[-1])
    assert (code, summary["equal"], summary["first_difference"]) == (0, False, 2)


def test_explain_step() -> None:
    """Greedy: the largest logit wins, and the distance of another token is its gap."""
    params = SamplingParams(seed=0, temperature=0.0, top_k=2, max_new_tokens=1)
    logits = torch.tensor([1.0, 3.0, 2.0, 0.5])
    won = explain_step(logits, SampleRequest(params=params, step=0), 1)
    assert (won.rank, won.kept, won.distance, won.decision_margin, won.candidate.probability) == (
        1,
        2,
        0.0,
        1.0,
        1.0,
    )
    assert [candidate.token for candidate in won.runners_up] == [2]
    lost = explain_step(logits, SampleRequest(params=params, step=0), 0)
    assert (lost.rank, lost.distance, lost.candidate.probability) == (3, 2.0, 0.0)


# -- the real command ------------------------------------------------------------------------------


def test_margin_and_logits_digest_are_recorded(finished: Path) -> None:
    """Both are recorded in every row with a step, and are batch-invariant."""
    rows = list(RunReader(finished / "out").rows())
    assert [row["prompt_id"] for row in rows if row["min_decision_margin"] is None] == ["r4"]
    assert [row["prompt_id"] for row in rows if row["logits_digest"] is None] == ["r4"]
    assert len({row["logits_digest"] for row in rows}) > 20


def test_verify_replay_and_diff_as_commands(tmp_path: Path) -> None:
    """The commands work from another folder, with other batches and threads."""
    settings = ["generate", "--config", "demo", "--limit", "40", "--max-new-tokens", "16"]
    first = run_gptbatch(
        *settings,
        "--output",
        "a",
        "--batch-size",
        "3",
        "--part-rows",
        "7",
        "--threads",
        "2",
        cwd=tmp_path,
    )
    second = run_gptbatch(
        *settings, "--output", "b", "--batch-size", "64", "--threads", "1", cwd=tmp_path
    )
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    assert first.summary["batch_invariance"] == second.summary["batch_invariance"] != "unverified"
    assert pq.read_table(tmp_path / "b")["logits_digest"].null_count == 40
    compared = run_gptbatch("diff", tmp_path / "a", tmp_path / "b")
    assert compared.code == 0, compared.stdout
    assert compared.summary["equal"] == 40
    verified = run_gptbatch("verify", tmp_path / "a", "--all")
    assert verified.code == 0, verified.stdout + verified.stderr
    assert verified.summary["rows_checked"] == 40
    replayed = run_gptbatch(
        "replay", tmp_path / "a", "--prompt-id", "demo-005", "--json", env={"PYTHONUTF8": "1"}
    )
    assert replayed.summary["equal"], replayed.stdout
