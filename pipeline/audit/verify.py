"""verify: do the weights still give the recorded tokens? Each row by one prefill, nothing is generated.

Where this machine computes the same bits as the one that ran, the answer is exact: any difference is a mismatch. Elsewhere it
is judged by margin: a recorded token that is within the tolerance of winning is a near tie, which rounding explains.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from gptbatch.pipeline.audit.loaded_run import LoadedRun, row_params
from gptbatch.pipeline.config import EngineConfig

if TYPE_CHECKING:
    from gptbatch.pipeline.audit.trace import RecordedRow

ROWS_PER_BATCH = 64
# of the largest logit of a step, by dtype: what different orders of summing have been seen to make, and some
TOLERANCES = {"float32": 2.0**-13, "bfloat16": 2.0**-5, "float16": 2.0**-8}
INT8_TOLERANCE = (
    2.0**-7
)  # at least, where the cache is int8: a number near the middle of two steps may be rounded up here and down there

Outcome = Literal["equal", "near_tie", "mismatch", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the check of one row found. problem says what differs first, "" for nothing.

    step: the first step that differs. distance: how far, in logits, the recorded token was from winning there. Both None where
    no step differs.
    """

    prompt_id: str
    prompt_index: int
    outcome: Outcome
    problem: str = ""
    step: int | None = None
    recorded_token: int | None = None
    sampled_token: int | None = None
    distance: float | None = None


def evenly_spaced(count: int, n_rows: int) -> list[int]:
    """At most `count` places of 0 to n_rows - 1, the first and the last among them."""
    if count >= n_rows:
        return list(range(n_rows))
    return [round(i * (n_rows - 1) / max(1, count - 1)) for i in range(count)]


def verify_rows(loaded_run: LoadedRun, rows: Iterable[dict[str, Any]]) -> Iterator[Verdict]:
    """A verdict for each row, in order. Error rows have nothing to check and are skipped.

    Batches of rows are checked beside each other, each by a thread of its own: threads that share every product of a small
    network wait for each other more than they work.
    """
    import torch

    exact = not loaded_run.reasons_bits_may_differ()
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
                    running.append(pool.submit(_verify_batch, loaded_run, batch, exact))
                if not running:
                    return
                yield from running.popleft().result()
    finally:
        torch.set_num_threads(threads)  # what a thread sets is what later threads start with


def _verify_batch(loaded_run: LoadedRun, rows: list[dict[str, Any]], exact: bool) -> list[Verdict]:
    from gptbatch.pipeline.audit.trace import RecordedRow, explain_step, step_hidden
    from gptbatch.pipeline.engine.sampling import sample_tokens
    from gptbatch.pipeline.engine.two_pass_sampling import sample_from_hidden
    from gptbatch.pipeline.model.lm_head import MAX_HEAD_ROWS, logits_bytes

    verdicts: dict[int, Verdict] = {}
    known: list[RecordedRow] = []
    numbers: list[int] = []  # of the rows that can be checked
    for number, (row, (prompt, prompt_problem)) in enumerate(
        zip(rows, loaded_run.prompt_token_ids(rows), strict=True)
    ):
        if problem := _malformed(row, loaded_run.gpt_config.vocab_size):
            verdicts[number] = _verdict(row, "mismatch", problem)
        elif row["finish_reason"] == "error":
            verdicts[number] = _verdict(row, "skipped")
        elif prompt_problem:
            verdicts[number] = _verdict(row, "mismatch", prompt_problem)
        else:
            known.append(
                RecordedRow(prompt=prompt, new=row["completion_token_ids"], params=row_params(row))
            )
            numbers.append(number)
    # a margin above the recorded smallest one need not be known; just above, so that it shows if none comes down to it
    recorded_margins = [rows[number]["min_decision_margin"] for number in numbers]
    bounds = [
        math.inf if margin is None else math.nextafter(margin, math.inf)
        for margin in recorded_margins
    ]
    margins = [math.inf] * len(known)
    hashes = [hashlib.sha256() for _ in known]
    model = loaded_run.loaded.model
    for segments, hidden in step_hidden(model, known):
        places = [(segment.row, step) for segment in segments for step in segment.steps]
        params, steps = [known[index].params for index, _ in places], [step for _, step in places]
        most = [bounds[index] for index, _ in places]
        if loaded_run.config.record_logits_digest:
            choices = []
            for first in range(0, len(places), MAX_HEAD_ROWS):
                some = slice(first, first + MAX_HEAD_ROWS)
                logits = model.logits(hidden[some])
                for (index, _), step_logits in zip(places[some], logits.cpu(), strict=True):
                    hashes[index].update(logits_bytes(step_logits))
                choices += sample_tokens(
                    logits, params[some], steps[some], most[some], native=model.backend.native
                )
        else:
            choices = sample_from_hidden(model, hidden, params, steps, most)
        for place, ((index, step), choice) in enumerate(zip(places, choices, strict=True)):
            if choice.decision_margin is not None:
                margins[index] = min(margins[index], choice.decision_margin)
            recorded = known[index].new[step]
            if choice.token == recorded:
                continue
            (step_logits,) = model.logits(hidden[place : place + 1])
            distance = explain_step(step_logits, known[index].params, step, recorded).distance
            tolerance = _tolerance(loaded_run.config.engine) * float(step_logits.abs().max())
            near = not exact and choice.token is not None and distance <= tolerance
            earlier = verdicts.get(numbers[index])
            if earlier is None or (earlier.outcome == "near_tie" and not near):
                verdicts[numbers[index]] = replace(
                    _verdict(
                        rows[numbers[index]],
                        "near_tie" if near else "mismatch",
                        f"the weights choose {choice.token}",
                    ),
                    step=step,
                    recorded_token=recorded,
                    sampled_token=choice.token,
                    distance=distance,
                )
    for index, number in enumerate(numbers):
        if number in verdicts and verdicts[number].outcome == "mismatch":
            continue
        digest = hashes[index].hexdigest() if loaded_run.config.record_logits_digest else None
        problem = _other_problem(loaded_run, rows[number], known[index])
        if (
            not problem
            and exact
            and not (loaded_run.is_older and rows[number]["min_decision_margin"] is None)
        ):
            problem = _other_bits(rows[number], margins[index], digest)
        if problem:
            verdicts[number] = _verdict(rows[number], "mismatch", problem)
        else:
            verdicts.setdefault(number, _verdict(rows[number], "equal"))
    return [verdicts[number] for number in range(len(rows))]


def _tolerance(engine: EngineConfig) -> float:
    return max(TOLERANCES[engine.dtype], INT8_TOLERANCE if engine.cache_dtype == "int8" else 0.0)


def _malformed(row: dict[str, Any], vocab_size: int) -> str:
    tokens = row["completion_token_ids"]
    if row["finish_reason"] == "error":
        if tokens or row["completion"] is not None or row["error"] is None:
            return "it is an error row, but has tokens or a completion, or no reason"
        return ""
    if not tokens:
        return "it has no tokens"
    if len(tokens) != row["completion_tokens"]:
        return f"it has {len(tokens)} tokens, but completion_tokens is {row['completion_tokens']}"
    strange = [token for token in tokens if not 0 <= token < vocab_size]
    return (
        f"it holds token {strange[0]}, which the model (vocab_size {vocab_size}) does not have"
        if strange
        else ""
    )


def _other_problem(loaded_run: LoadedRun, row: dict[str, Any], known: RecordedRow) -> str:
    """What is wrong with a row whose tokens are right: where it ends, or its text."""
    from gptbatch.pipeline.engine.sequence import StopRule

    rule = StopRule(
        end_tokens=loaded_run.end_tokens,
        n_positions=loaded_run.gpt_config.n_positions,
        window_full=loaded_run.config.window_full,
    )
    reason = None
    for count, token in enumerate(known.new, start=1):
        reason = rule.reason(
            token,
            num_new_tokens=count,
            num_tokens=len(known.prompt) + count,
            max_new_tokens=known.params.max_new_tokens,
        )
        if (reason is not None) != (count == len(known.new)):
            return f"it should {'go on after' if reason is None else 'have ended with'} token {count - 1}"
    if reason != row["stop_reason"] or (reason == "end_of_text") != (
        row["finish_reason"] == "stop"
    ):
        return f"it ended by {reason}, not by {row['stop_reason']} ({row['finish_reason']})"
    text = loaded_run.tokenizer.completion_text(known.prompt, known.new, row["finish_reason"])
    return "" if text == row["completion"] else "its text is not that of its tokens"


def _other_bits(row: dict[str, Any], margin: float, logits_digest: str | None) -> str:
    """What is wrong with a row whose tokens are right, where the bits of its logits must be too."""
    if margin != (math.inf if row["min_decision_margin"] is None else row["min_decision_margin"]):
        return f"its min_decision_margin is not {row['min_decision_margin']}"
    return (
        ""
        if logits_digest == row["logits_digest"]
        else "the bits of its logits differ (logits_digest)"
    )


def _verdict(row: dict[str, Any], outcome: Outcome, problem: str = "") -> Verdict:
    return Verdict(
        prompt_id=row["prompt_id"],
        prompt_index=row["prompt_index"],
        outcome=outcome,
        problem=problem,
    )
