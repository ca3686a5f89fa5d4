"""replay: one recorded row generated again, alone, and each of its steps explained.

Knows: a loaded_run run and one of its rows. Does not print.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptbatch.pipeline.audit.loaded_run import LoadedRun
from gptbatch.pipeline.errors import InputNotFoundError
from gptbatch.pipeline.types import Completion, Prompt, SamplingParams, TokenizedPrompt

if TYPE_CHECKING:
    from gptbatch.pipeline.audit.trace import StepTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A row generated again. text: of the completion, None for an error.

    first_difference: the index of the first token that is not as recorded (the length of the shorter where one goes on); None
    when all are, and the endings too.
    """

    completion: Completion
    text: str | None
    first_difference: int | None
    trace: tuple[StepTrace, ...]

    @property
    def equal(self) -> bool:
        return self.first_difference is None


def replay_row(
    loaded_run: LoadedRun, row: dict[str, Any], params: SamplingParams, *, trace: bool
) -> Replay:
    """Generate the row with these parameters. Raises InputNotFoundError for a row whose prompt never reached the network."""
    from gptbatch.pipeline.engine.engine import Engine

    ((prompt_ids, problem),) = loaded_run.prompt_token_ids([row])
    if problem:
        raise InputNotFoundError(
            f"{loaded_run.run.path}: row {row['prompt_id']!r} cannot be replayed: {problem}"
            + (f"; it is an error row ({row['error']})" if row["error"] else "")
        )
    prompt = Prompt(
        index=row["prompt_index"],
        prompt_id=row["prompt_id"],
        text=row["prompt"],
        params=params,
        metadata=row["metadata"],
    )
    source = TokenizedPrompt(
        prompt=prompt,
        token_ids=prompt_ids,
        tokens_dropped=row["prompt_tokens_dropped"],
        read_s=time.monotonic(),
    )
    engine = Engine(
        model=loaded_run.loaded.model,
        batch_size=1,
        end_tokens=loaded_run.end_tokens,
        window_full=loaded_run.config.window_full,
        record_logits=row["logits_digest"] is not None,
    )
    (completion,) = [ended for round_ in engine.generate(iter([source])) for ended in round_]
    token_ids = completion.token_ids
    text = None
    if completion.finish_reason != "error":
        text = loaded_run.tokenizer.completion_text(prompt_ids, token_ids, completion.finish_reason)
    return Replay(
        completion=completion,
        text=text,
        first_difference=_first_difference(completion, row),
        trace=_trace(loaded_run, prompt_ids, completion) if trace and token_ids else (),
    )


def _first_difference(completion: Completion, row: dict[str, Any]) -> int | None:
    ours, recorded = completion.token_ids, row["completion_token_ids"]
    if ours == recorded and completion.stop_reason == row["stop_reason"]:
        return None
    return next(
        (i for i, (a, b) in enumerate(zip(ours, recorded, strict=False)) if a != b),
        min(len(ours), len(recorded)),
    )


def _trace(
    loaded_run: LoadedRun, prompt_ids: list[int], completion: Completion
) -> tuple[StepTrace, ...]:
    from gptbatch.pipeline.audit.trace import RecordedRow, each_logits, explain_step, step_hidden

    model, params = loaded_run.loaded.model, completion.prompt.params
    known = RecordedRow(prompt=prompt_ids, new=completion.token_ids, params=params)
    return tuple(
        explain_step(row_logits, params, step, completion.token_ids[step])
        for segments, hidden in step_hidden(model, [known])
        for step, row_logits in zip(
            (step for segment in segments for step in segment.steps),
            each_logits(model, hidden),
            strict=True,
        )
    )
