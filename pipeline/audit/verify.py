"""verify: check that the weights give the recorded tokens, by one prefill per row.

Where this machine computes bit for bit what the run's machine computed, every difference is a
mismatch. Elsewhere a recorded token within a tolerance of being sampled is a near tie, which
rounding explains.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from gptbatch.pipeline.audit.loaded_run import LoadedRun
from gptbatch.pipeline.audit.step_checks import OtherToken, StepChecks, check_steps
from gptbatch.pipeline.config import EngineConfig
from gptbatch.pipeline.output.schema import LOGPROB_COLUMNS, logprob_columns
from gptbatch.pipeline.params.sampling_params import from_row
from gptbatch.pipeline.types import ENDING_STOP_REASONS

if TYPE_CHECKING:
    from gptbatch.pipeline.audit.trace import RecordedRow

ROWS_PER_BATCH = 64
# Relative to the largest logit of a step, by dtype: above all differences seen between reduction
# orders.
TOLERANCES = {"float32": 2.0**-13, "bfloat16": 2.0**-5, "float16": 2.0**-8}
# A lower bound with an int8 cache: a value near the middle of two int8 values may round to either.
INT8_TOLERANCE = 2.0**-7

Outcome = Literal["equal", "near_tie", "mismatch", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The result of checking one row.

    Attributes:
        prompt_id: Id of the row.
        prompt_index: Index of the row in the input.
        sample_index: Index of the sample.
        outcome: "equal"; "near_tie": equal within the tolerance; "mismatch"; "skipped": an error
            row.
        problem: The first difference; "" for none.
        step: The first step whose token differs; None where none does.
        recorded_token: The recorded token of that step.
        sampled_token: The token that the weights give; None for logits that are not finite.
        distance: How far, in logits, the recorded token was from being sampled at that step. None
            where no change of finite logits samples it.
    """

    prompt_id: str
    prompt_index: int
    sample_index: int
    outcome: Outcome
    problem: str = ""
    step: int | None = None
    recorded_token: int | None = None
    sampled_token: int | None = None
    distance: float | None = None


def evenly_spaced(count: int, n_rows: int) -> list[int]:
    """Return at most `count` indices from 0 to n_rows - 1, the first and the last among them."""
    if count >= n_rows:
        return list(range(n_rows))
    return [round(i * (n_rows - 1) / max(1, count - 1)) for i in range(count)]


def verify_rows(loaded_run: LoadedRun, rows: Iterable[dict[str, Any]]) -> Iterator[Verdict]:
    """Yield a verdict for each row, in order.

    On a CPU each thread checks a batch of rows by itself: threads that share every GEMM of a small
    model spend most of their time on synchronization.

    Args:
        loaded_run: The run.
        rows: Rows of the run with all columns. Error rows are skipped.
    """
    import torch

    bits_equal = not loaded_run.reasons_bits_may_differ()
    on_cpu = loaded_run.loaded.model.device.type == "cpu"
    threads = torch.get_num_threads()
    workers = threads if on_cpu else 1
    iterator = iter(rows)
    running: deque[Future[list[Verdict]]] = deque()
    try:
        with ThreadPoolExecutor(
            workers, initializer=torch.set_num_threads, initargs=(1,) if on_cpu else (threads,)
        ) as pool:
            while True:
                while len(running) < 2 * workers and (
                    batch := list(islice(iterator, ROWS_PER_BATCH))
                ):
                    running.append(pool.submit(_verify_batch, loaded_run, batch, bits_equal))
                if not running:
                    return
                yield from running.popleft().result()
    finally:
        # Threads that start later inherit the last value set.
        torch.set_num_threads(threads)


def _verify_batch(
    loaded_run: LoadedRun, rows: list[dict[str, Any]], bits_equal: bool
) -> list[Verdict]:
    """Return the verdicts of a batch: rows that cannot be prefilled first, then those that can."""
    from gptbatch.pipeline.audit.trace import RecordedRow

    verdicts: dict[int, Verdict] = {}
    recorded: dict[int, RecordedRow] = {}
    prompts = loaded_run.prompt_token_ids(rows)
    for number, (row, (prompt, prompt_problem)) in enumerate(zip(rows, prompts, strict=True)):
        if problem := _malformed(row, loaded_run.gpt_config.vocab_size):
            verdicts[number] = _verdict(row, "mismatch", problem)
        elif row["finish_reason"] == "error":
            verdicts[number] = _verdict(row, "skipped")
        elif prompt_problem:
            verdicts[number] = _verdict(row, "mismatch", prompt_problem)
        else:
            recorded[number] = RecordedRow(
                prompt=prompt, new=row["completion_token_ids"], params=from_row(row)
            )
    margins = [rows[number]["min_decision_margin"] for number in recorded]
    checks = check_steps(loaded_run, list(recorded.values()), margins)
    for (number, tokens), check in zip(recorded.items(), checks, strict=True):
        verdicts[number] = _judge(loaded_run, rows[number], tokens, check, bits_equal=bits_equal)
    return [verdicts[number] for number in range(len(rows))]


def _judge(
    loaded_run: LoadedRun,
    row: dict[str, Any],
    tokens: RecordedRow,
    check: StepChecks,
    *,
    bits_equal: bool,
) -> Verdict:
    """Return the verdict of a row whose steps were sampled again."""
    relative = _tolerance(loaded_run.config.engine, tokens.params.repetition_penalty)
    near_tie: OtherToken | None = None
    for other in check.other_tokens:
        is_near = other.sampled is not None and other.distance <= relative * other.max_logit
        if bits_equal or not is_near:
            return _token_verdict(row, "mismatch", other)
        near_tie = near_tie or other
    problem = _finish_problem(loaded_run, row, tokens)
    if not problem and bits_equal:
        has_digest = loaded_run.config.record_logits_digest
        digest = check.logits_hash.hexdigest() if has_digest else None
        # Margins of older versions are not read.
        recorded = row["min_decision_margin"]
        has_margin = not (loaded_run.is_older and recorded is None)
        problem = _bits_problem(row, check.min_decision_margin if has_margin else None, digest)
        if not problem and tokens.params.logprobs is not None:
            recorded_logprobs = {name: row[name] for name in LOGPROB_COLUMNS}
            if recorded_logprobs != logprob_columns(check.logprobs):
                problem = "its log probabilities are not those of its logits"
    if problem:
        return _verdict(row, "mismatch", problem)
    if near_tie is not None:
        return _token_verdict(row, "near_tie", near_tie)
    return _verdict(row, "equal")


def _tolerance(engine: EngineConfig, repetition_penalty: float) -> float:
    """Return the tolerance of a row; a repetition penalty stretches differences of logits."""
    tolerance = max(
        TOLERANCES[engine.dtype], INT8_TOLERANCE if engine.cache_dtype == "int8" else 0.0
    )
    return tolerance * max(repetition_penalty, 1 / repetition_penalty)


def _malformed(row: dict[str, Any], vocab_size: int) -> str:
    """Return why the columns of a row contradict each other; "" when they do not."""
    tokens = row["completion_token_ids"]
    if row["finish_reason"] == "error":
        if tokens or row["completion"] is not None or row["error"] is None:
            return "it is an error row, but has tokens or a completion, or no reason"
        return ""
    if not tokens:
        return "it has no tokens"
    if len(tokens) != row["completion_tokens"]:
        return f"it has {len(tokens)} tokens, but completion_tokens is {row['completion_tokens']}"
    unknown = [token for token in tokens if not 0 <= token < vocab_size]
    return (
        f"it holds token {unknown[0]}, which the model (vocab_size {vocab_size}) does not have"
        if unknown
        else ""
    )


def _finish_problem(loaded_run: LoadedRun, row: dict[str, Any], tokens: RecordedRow) -> str:
    """Return what is wrong with the end or text of a row with the right tokens, or ""."""
    from gptbatch.pipeline.engine.stopping import StopCheck

    check = StopCheck(
        rule=loaded_run.stop_rule, params=tokens.params, n_prompt_tokens=len(tokens.prompt)
    )
    reason = None
    for count, token in enumerate(tokens.new, start=1):
        reason = check.add(token)
        if (reason is not None) != (count == len(tokens.new)):
            return (
                f"it should {'go on after' if reason is None else 'have ended with'} token "
                f"{count - 1}"
            )
    if reason != row["stop_reason"] or (reason in ENDING_STOP_REASONS) != (
        row["finish_reason"] == "stop"
    ):
        return f"it ended by {reason}, not by {row['stop_reason']} ({row['finish_reason']})"
    if check.stop_string != row["stop_string"]:
        return f"it ended by the stop string {check.stop_string!r}, not {row['stop_string']!r:.100}"
    text = loaded_run.tokenizer.completion_text(tokens.prompt, tokens.new, reason, check.text_bytes)
    return "" if text == row["completion"] else "its text is not that of its tokens"


def _bits_problem(row: dict[str, Any], margin: float | None, logits_digest: str | None) -> str:
    """Return which record of the logits differs, in a row with the right tokens; "" for none."""
    recorded = row["min_decision_margin"]
    if margin is not None and margin != (math.inf if recorded is None else recorded):
        return f"its min_decision_margin is not {recorded}"
    if logits_digest != row["logits_digest"]:
        return "the bits of its logits differ (logits_digest)"
    return ""


def _verdict(row: dict[str, Any], outcome: Outcome, problem: str = "") -> Verdict:
    return Verdict(
        prompt_id=row["prompt_id"],
        prompt_index=row["prompt_index"],
        sample_index=row["sample_index"] or 0,
        outcome=outcome,
        problem=problem,
    )


def _token_verdict(row: dict[str, Any], outcome: Outcome, other: OtherToken) -> Verdict:
    return Verdict(
        prompt_id=row["prompt_id"],
        prompt_index=row["prompt_index"],
        sample_index=row["sample_index"] or 0,
        outcome=outcome,
        problem=f"the weights choose {other.sampled}",
        step=other.step,
        recorded_token=other.recorded,
        sampled_token=other.sampled,
        distance=other.distance if math.isfinite(other.distance) else None,
    )
