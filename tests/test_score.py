"""gptbatch score: encoding, log probabilities, the table, and --from."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

from gptbatch.jobs.cli import run_command
from gptbatch.pipeline import JobConfig, run_job
from gptbatch.pipeline.audit.loaded_run import LoadedRun, Overrides
from gptbatch.pipeline.audit.run_reader import RunReader
from gptbatch.pipeline.config import EngineConfig
from gptbatch.pipeline.engine.reference import token_logprob
from gptbatch.pipeline.errors import (
    ConfigError,
    InputRowsError,
    OutputBusyError,
    OutputConflictError,
)
from gptbatch.pipeline.input.tokenizer_loading import load_tokenizer
from gptbatch.pipeline.kv_cache.spec import BackendName
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.linear import use_threads
from gptbatch.pipeline.score import run as score_module
from gptbatch.pipeline.score import scoring
from gptbatch.pipeline.score.pairs import EncodedPair, PairEncoder, fit
from gptbatch.pipeline.score.run import score_input, score_run
from gptbatch.pipeline.score.scoring import TokenPair, score_pairs
from gptbatch.pipeline.score.table import COLUMNS, ScoreTable
from gptbatch.pipeline.system.file_lock import FileLock
from tests.conftest import has_kernels, our_model, random_model

ROWS: list[dict[str, Any]] = [
    {"id": "q1", "prompt": "The king ", "choices": ["is dead.", "and the queen", " lives"]},
    {"id": "q2", "prompt": "", "continuation": "To be, or not"},
    {"id": "q3", "prompt": "The que", "continuation": "en, and"},
    {"id": "q4", "prompt": "?" * 70, "continuation": "ing"},
    {"id": "q5", "prompt": "The king", "continuation": ""},
    {"id": "q6", "prompt": "The king", "continuation": "?" * 65},
    {"id": "q7", "prompt": "  \n", "continuation": "To be"},
]


def config(checkpoint: Path, rows: Path, output: Path, **more: Any) -> JobConfig:
    return JobConfig(model=str(checkpoint), input=str(rows), output=str(output), **more)


def read(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def float32(number: float) -> float:
    (rounded,) = struct.unpack("f", struct.pack("f", number))
    return float(rounded)


def expected_logprobs(model: GPT, context: list[int], continuation: list[int]) -> list[float]:
    """Return the log probabilities of one pair, by the oracle."""
    tokens = context + continuation[:-1]
    with torch.inference_mode():
        logits = model(torch.tensor([tokens]))[0, -len(continuation) :]
    return [float32(token_logprob(*pair)) for pair in zip(logits, continuation, strict=True)]


@pytest.fixture(params=["ragged", "padded"])
def attention(request: pytest.FixtureRequest) -> BackendName:
    if request.param == "ragged" and not has_kernels():
        pytest.skip("no C++ compiler")
    name: BackendName = request.param
    return name


# -- log probabilities -----------------------------------------------------------------------------


def random_pairs(rng: random.Random, count: int) -> list[TokenPair]:
    """Return pairs of which many share a long context; some fill it."""
    contexts = [[rng.randrange(300) for _ in range(size)] for size in (1, 5, 40, 40, 60)]
    pairs = []
    for _ in range(count):
        context = rng.choice(contexts)
        size = rng.randint(1, 65 - len(context)) if rng.random() < 0.3 else rng.randint(1, 4)
        pairs.append(TokenPair(context, [rng.randrange(300) for _ in range(size)]))
    return pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_those_of_the_oracle_in_any_batch_and_order(
    attention: BackendName, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = our_model(random_model(), attention=attention, dtype=dtype)
    rng = random.Random(5)
    pairs = random_pairs(rng, 90)
    scores = score_pairs(model, pairs)
    for pair, score in zip(pairs, scores, strict=True):
        assert score.token_logprobs == expected_logprobs(model, pair.context, pair.continuation)
        assert score.logprob == pytest.approx(sum(score.token_logprobs), rel=1e-12)
    monkeypatch.setattr(scoring, "PAIRS_PER_BATCH", 7)
    order = rng.sample(range(90), 90)
    with use_threads(2):
        again = score_pairs(model, [pairs[index] for index in order])
    assert again == [scores[index] for index in order]
    assert [score_pairs(model, [pairs[0]]), score_pairs(model, [])] == [[scores[0]], []]


def test_a_greedy_completion_is_greedy(attention: BackendName) -> None:
    model = our_model(random_model(), attention=attention)
    context = [5, 6, 7]
    tokens: list[int] = []
    for _ in range(6):
        with torch.inference_mode():
            tokens.append(int(model(torch.tensor([context + tokens]))[0, -1].argmax()))
    other = [*tokens[:-1], (tokens[-1] + 1) % 300]
    greedy, not_greedy = score_pairs(model, [TokenPair(context, t) for t in (tokens, other)])
    assert (greedy.is_greedy, not_greedy.is_greedy) == (True, False)
    assert greedy.token_logprobs[:-1] == not_greedy.token_logprobs[:-1]


def test_choices_share_the_keys_and_values_of_their_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = our_model(random_model(), attention="ragged")
    computed = []
    hidden = GPT.hidden

    def counting(self: GPT, cache: Any, *, tokens: list[int], **arguments: Any) -> torch.Tensor:
        computed.append(len(tokens))
        return hidden(self, cache, tokens=tokens, **arguments)

    monkeypatch.setattr(GPT, "hidden", counting)
    context = [token % 300 for token in range(50)]
    score_pairs(model, [TokenPair(context, [1, token]) for token in range(20)])
    # 48 tokens of the context are whole blocks: one sequence computes them
    assert sum(computed) == 48 + 20 * 3


def test_logits_that_are_not_finite_give_no_score() -> None:
    theirs = random_model()
    with torch.no_grad():
        theirs.transformer.wpe.weight[1] = torch.nan
    good, bad = score_pairs(our_model(theirs), [TokenPair([1], [2]), TokenPair([1], [2, 3])])
    assert (good.is_finite, bad.is_finite) == (True, False)


# -- encoding --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> PairEncoder:
    return PairEncoder(load_tokenizer(checkpoint), start_token=0)


def test_blanks_at_the_end_of_the_context_belong_to_the_continuation(encoder: PairEncoder) -> None:
    first, second = encoder.encode_pairs([("The king ", "is"), ("The king", " is")])
    assert first == second
    (whole,) = encoder.encode(["The king is"])
    assert first.context + first.continuation == whole.token_ids
    assert not first.boundary_merged


def test_a_token_that_spans_the_boundary_is_flagged(encoder: PairEncoder) -> None:
    pairs = [("The que", "en, and"), ("Long live the", " king"), ("The kin", "g")]
    merged, clean, gone = encoder.encode_pairs(pairs)
    assert (merged.boundary_merged, clean.boundary_merged) == (True, False)
    texts = encoder.encode(["The que", "The queen, and"])
    assert merged.context == texts[0].token_ids
    assert merged.continuation == texts[1].token_ids[len(merged.context) :] != []
    assert gone.problem == "the tokenizer merges the whole continuation into the context"


def test_an_empty_context_is_the_start_token(encoder: PairEncoder, checkpoint: Path) -> None:
    (text,) = encoder.encode(["To be"])
    empty, blanks, nothing = encoder.encode_pairs([("", "To be"), (" \n", "To be"), ("", "")])
    assert (empty.context, empty.continuation) == ([0], text.token_ids)
    assert blanks.context == [0]
    assert blanks.continuation == encoder.encode([" \nTo be"])[0].token_ids
    assert nothing.problem == "the continuation has no tokens"
    special = PairEncoder(load_tokenizer(checkpoint), start_token=0, parse_special=True)
    (begins,) = special.encode_pairs([("", "<|endoftext|>To be")])
    assert (begins.context, begins.continuation) == ([0], text.token_ids)
    without = PairEncoder(load_tokenizer(checkpoint), start_token=None)
    assert "no token to start from" in without.encode_pairs([("", "To be")])[0].problem


def test_long_pairs_lose_the_front_of_the_context() -> None:
    pair = EncodedPair(context=list(range(10)), continuation=[20, 21, 22])
    assert fit(pair, n_positions=12, vocab_size=30) == pair
    cut = fit(pair, n_positions=5, vocab_size=30)
    assert (cut.context, cut.context_dropped) == ([7, 8, 9], 7)
    # the last token is not read: context and continuation are n_positions + 1 tokens
    assert fit(pair, n_positions=3, vocab_size=30).context == [9]
    assert fit(pair, n_positions=2, vocab_size=30).problem.endswith("more than n_positions (2)")
    assert "token 22" in fit(pair, n_positions=12, vocab_size=22).problem


# -- the table -------------------------------------------------------------------------------------


@pytest.fixture
def rows_file(write_rows: Callable[..., Path]) -> Path:
    return write_rows(ROWS, "rows.jsonl")


def test_the_table_of_an_input(checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "scores.parquet"
    summary = score_input(config(checkpoint, rows_file, output))
    table = read(output)
    assert [column.name for column in COLUMNS] == list(table[0])
    assert [(row["prompt_id"], row["choice_index"]) for row in table] == [
        *[("q1", choice) for choice in range(3)],
        *[(f"q{i}", 0) for i in range(2, 8)],
    ]
    by_id = {(row["prompt_id"], row["choice_index"]): row for row in table}
    assert by_id["q3", 0]["boundary_merged"]
    assert by_id["q4", 0]["context_tokens_dropped"] > 0
    assert by_id["q5", 0]["error"] == "the continuation has no tokens"
    assert "more than n_positions (64)" in by_id["q6", 0]["error"]
    assert (by_id["q6", 0]["logprob"], by_id["q6", 0]["bytes"]) == (None, 65)
    for row in table:
        assert row["tokens"] == len(row["continuation_token_ids"]) == len(row["token_logprobs"])
        assert (row["error"] is None) == (row["logprob"] is not None) == (row["tokens"] > 0)
    assert (summary.rows, summary.scores, summary.errors) == (7, 9, 2)
    assert (summary.boundary_merged, summary.contexts_truncated) == (1, 1)
    assert summary.tokens == sum(row["tokens"] for row in table)
    assert [path.name for path in output.parent.iterdir()] == ["scores.parquet"]


def test_the_file_does_not_depend_on_threads_windows_and_batches(
    checkpoint: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (tmp_path / f"{name}.parquet" for name in "abc")
    score_input(config(checkpoint, rows_file, first))
    score_input(config(checkpoint, rows_file, second, engine=EngineConfig(threads=2)))
    assert first.read_bytes() == second.read_bytes()
    monkeypatch.setattr("gptbatch.pipeline.score.items.WINDOW_PAIRS", 2)
    score_input(config(checkpoint, rows_file, third))
    assert read(third) == read(first)


def test_rows_come_from_csv_parquet_and_nested_fields(
    checkpoint: Path, rows_file: Path, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    score_input(config(checkpoint, rows_file, tmp_path / "jsonl.parquet"))
    expected = read(tmp_path / "jsonl.parquet")
    parquet = tmp_path / "rows.parquet"
    table = pyarrow.Table.from_pylist([{"choices": None, "continuation": None, **r} for r in ROWS])
    pq.write_table(table, parquet)
    score_input(config(checkpoint, parquet, tmp_path / "parquet.parquet"))
    assert read(tmp_path / "parquet.parquet") == expected
    csv = tmp_path / "rows.csv"
    pyarrow.csv.write_csv(table.drop_columns(["choices"]).slice(1), csv)
    job = JobConfig(model=str(checkpoint), dataset=str(csv), output=str(tmp_path / "csv.parquet"))
    score_input(job)
    for row, other in zip(read(tmp_path / "csv.parquet"), expected[3:], strict=True):
        assert row | {"prompt_index": other["prompt_index"]} == other
    nested = write_rows(
        [{"id": r["id"], "q": r["prompt"], "a": {"texts": r["choices"]}} for r in ROWS[:1]]
    )
    code = run_command(
        [
            *("score", "--model", str(checkpoint), "--input", str(nested)),
            *("--prompt-field", "q", "--choices-field", "a.texts"),
            *("--output", str(tmp_path / "nested.parquet")),
        ]
    )
    assert code == 0
    assert read(tmp_path / "nested.parquet") == expected[:3]


def test_bad_rows_are_listed_before_the_model_loads(
    checkpoint: Path,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(score_module, "load_model", None)
    bad = write_rows(
        [
            {"prompt": "a", "continuation": "b"},
            {"prompt": "a"},
            {"prompt": "a", "continuation": "b", "choices": ["c"]},
            {"prompt": "a", "continuation": 3},
            {"prompt": "a", "choices": "bc"},
            {"prompt": "a", "choices": []},
            {"prompt": "a", "choices": ["b", None]},
            {"continuation": "b"},
            {"id": "0", "prompt": "a", "continuation": "b"},
            # settings of generate are not read
            {"prompt": "a", "continuation": "b", "temperature": "warm", "top_k": -1},
        ]
    )
    with pytest.raises(InputRowsError) as caught:
        score_input(config(checkpoint, bad, tmp_path / "s.parquet"))
    message = str(caught.value)
    assert message.startswith("8 of 10 rows are bad; nothing was scored\n")
    for line, reason in [
        (2, "there is neither a field 'continuation' nor 'choices'"),
        (3, "there are both 'continuation' and 'choices'"),
        (4, "continuation must be a string, not a number"),
        (5, "choices must be an array of strings, not a string"),
        (6, "choices must hold at least one string"),
        (7, "choices.1 must be a string, not null"),
        (8, "there is no field 'prompt'"),
        (9, "id '0' was already used on line 1"),
    ]:
        assert f"prompts.jsonl:{line}: {reason}" in message
    assert not (tmp_path / "s.parquet").exists()


def test_a_finished_file_is_kept_and_another_is_not_overwritten(
    checkpoint: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "scores.parquet"
    job = config(checkpoint, rows_file, output)
    summary = score_input(job)
    content = output.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(score_module, "load_model", None)
        again = score_input(job)
        assert again.up_to_date
        assert (again.rows, again.scores, again.errors, again.tokens) == (
            summary.rows,
            summary.scores,
            summary.errors,
            summary.tokens,
        )
        limited = job.model_copy(update={"limit": 2})
        with pytest.raises(OutputConflictError, match=r"of another job \(input_digest differs\)"):
            score_input(limited)
    assert output.read_bytes() == content
    assert score_input(limited.model_copy(update={"overwrite": True})).rows == 2
    output.write_text("a letter")
    with pytest.raises(OutputConflictError, match="is another file"):
        score_input(job)
    assert output.read_text() == "a letter"


def test_places_that_would_harm_are_refused(
    checkpoint: Path, rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(OutputConflictError, match="is a folder"):
        score_input(config(checkpoint, rows_file, tmp_path))
    run_folder = tmp_path / "run"
    (run_folder / ".gptbatch").mkdir(parents=True)
    with pytest.raises(OutputConflictError, match="the output of a run"):
        score_input(config(checkpoint, rows_file, run_folder / "sub" / "s.parquet"))
    with pytest.raises(
        OutputConflictError, match="run: is the output of a run; name a file outside of it"
    ):
        score_input(config(checkpoint, rows_file, run_folder))
    table = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": "a", "continuation": "b"}]), table)
    with pytest.raises(OutputConflictError, match="is a file of the input of this run"):
        score_input(config(checkpoint, table, table, overwrite=True))
    with pytest.raises(ConfigError, match="file system"):
        score_input(
            config(checkpoint, rows_file, tmp_path).model_copy(update={"output": "s3://b/k"})
        )


@pytest.mark.parametrize("name", ["s.csv", "s.jsonl", "s.CSV.gz", "s.parquet.gz", "s.xlsx"])
def test_a_name_of_another_format_is_refused(
    name: str, checkpoint: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Before, the file was Parquet under that name."""
    with pytest.raises(ConfigError, match=f"{name}: score writes Parquet, and the suffix '.*' is"):
        score_input(config(checkpoint, rows_file, tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("name", ["scores", "s.PQ", "v1.2/scores", "scores_t0.8", "gpt2-v1.5"])
def test_names_of_parquet_files(name: str, tmp_path: Path) -> None:
    assert ScoreTable(str(tmp_path / name), overwrite=False).path == tmp_path / name


def test_a_second_process_is_refused_and_a_killed_one_leaves_nothing(
    checkpoint: Path, rows_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "scores.parquet"
    work = tmp_path / ".scores.parquet.tmp"
    work.mkdir()
    (work / "scores.parquet.tmp").write_text("half a table")
    lock = FileLock(work / "lock")
    assert lock.acquire()
    with pytest.raises(OutputBusyError):
        score_input(config(checkpoint, rows_file, output))
    assert (work / "scores.parquet.tmp").exists()
    lock.release()
    score_input(config(checkpoint, rows_file, output))
    assert len(read(output)) == 9
    assert not work.exists()


def test_an_error_while_scoring_leaves_no_file(
    checkpoint: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Iterator[Any]:
        raise RuntimeError("a bug")
        yield

    monkeypatch.setattr(score_module, "score_windows", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        score_input(config(checkpoint, rows_file, tmp_path / "scores.parquet"))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


# -- recorded runs ---------------------------------------------------------------------------------


def generated(
    checkpoint: Path,
    rows: Path,
    output: Path,
    attention: BackendName | Literal["auto"],
    **more: Any,
) -> None:
    run_job(
        JobConfig(
            model=str(checkpoint),
            input=str(rows),
            output=str(output),
            max_new_tokens=20,
            engine=EngineConfig(attention=attention),
            **more,
        )
    )


def test_completions_of_a_run_are_scored_by_their_recorded_tokens(
    checkpoint: Path, tmp_path: Path, write_rows: Callable[..., Path], attention: BackendName
) -> None:
    """Windows that slide included: each score is that of the step's own logits.

    It is that of the setting logprobs, too.
    """
    rows = write_rows(
        [
            *[{"id": f"r{i}", "prompt": "The king " * (i % 3 + 1)} for i in range(8)],
            {"id": "full", "prompt": "k" * 58},
            {"id": "greedy", "prompt": "Long live", "temperature": 0},
            {"id": "two", "prompt": "Long live", "n": 2, "presence_penalty": 1.5, "stop": ["e"]},
            {"id": "long", "prompt": "?" * 80},
        ]
    )
    generated(checkpoint, rows, tmp_path / "out", attention, window_full="slide", logprobs=0)
    loaded_run = LoadedRun(RunReader(tmp_path / "out"), Overrides())
    summary = score_run(loaded_run, str(tmp_path / "s.parquet"))
    assert (summary.rows, summary.scores, summary.errors) == (12, 13, 1)
    model = loaded_run.loaded.model
    run_rows = list(RunReader(tmp_path / "out").rows())
    recorded = {(row["prompt_id"], row["sample_index"]): row for row in run_rows}
    assert len(recorded) == 13
    for row in read(tmp_path / "s.parquet"):
        completion = recorded[row["prompt_id"], row["choice_index"]]
        assert row["continuation"] == completion["completion"]
        if row["prompt_id"] == "long":
            assert row["error"].startswith("an error row of the run: the prompt has 80 tokens")
            continue
        tokens = completion["completion_token_ids"]
        assert row["continuation_token_ids"] == tokens
        ((prompt, _),) = loaded_run.prompt_token_ids([completion])
        expected = [
            expected_logprobs(model, (prompt + tokens[:step])[-64:], [token])[0]
            for step, token in enumerate(tokens)
        ]
        assert row["token_logprobs"] == expected == completion["token_logprobs"]
        assert row["logprob"] == completion["cumulative_logprob"]
        assert row["is_greedy"] == (row["prompt_id"] == "greedy")
    assert score_run(loaded_run, str(tmp_path / "s.parquet")).up_to_date


def test_the_command_scores_a_run(
    checkpoint: Path,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    generated(checkpoint, write_rows([{"prompt": "The king"}]), tmp_path / "out", "auto")
    output = str(tmp_path / "s.parquet")
    for wrong, message in [
        (["--input", "x.jsonl"], "--from and --input cannot be given together"),
        (["--dtype", "float32"], "--from and --dtype cannot be given together"),
        (["--config", "demo"], "--from and --config cannot be given together"),
    ]:
        assert (
            run_command(["score", "--from", str(tmp_path / "out"), "--output", output, *wrong]) == 2
        )
        assert message in capfd.readouterr().err
    assert run_command(["score", "--from", str(tmp_path / "out"), "--output", output]) == 0
    captured = capfd.readouterr()
    summary = json.loads(captured.out.splitlines()[-1])
    assert (summary["rows"], summary["scores"], summary["errors"]) == (1, 1, 0)
    assert run_command(["score", "--from", str(tmp_path / "none"), "--output", output]) == 66
    inside = str(tmp_path / "out" / "s.parquet")
    assert run_command(["score", "--from", str(tmp_path / "out"), "--output", inside]) == 78


def test_the_command_needs_an_input_and_takes_other_weights_only_with_a_run(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "s.parquet")
    assert run_command(["score", "--model", str(checkpoint), "--output", output]) == 2
    assert "give either input or dataset" in capfd.readouterr().err
    options = ["--model", str(checkpoint), "--input", "x", "--output", output]
    assert run_command(["score", *options, "--allow-other-weights"]) == 2
    assert run_command(["score", *options]) == 66
