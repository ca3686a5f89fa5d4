"""replay: generate one recorded row again, alone, and explain each of its steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptbatch.pipeline.audit.loaded_run import LoadedRun
from gptbatch.pipeline.errors import InputNotFoundError
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.types import Completion, Prompt, TokenizedPrompt

if TYPE_CHECKING:
    from torch import Tensor

    from gptbatch.pipeline.audit.trace import StepTrace
    from gptbatch.pipeline.engine.sampling_step import SampleRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A row generated again.

    Attributes:
        completion: The result.
        text: The text of the completion; None for an error.
        first_difference: Index of the first token that differs from the recorded one; the length of
            the shorter completion where the other one continues. None when all tokens and the stop
            reason are equal.
        trace: Each step explained; empty where no trace was requested.
    """

    completion: Completion
    text: str | None
    first_difference: int | None
    trace: tuple[StepTrace, ...]

    @property
    def equal(self) -> bool:
        """Whether all tokens and the stop reason are equal to the recorded ones."""
        return self.first_difference is None


def replay_row(
    loaded_run: LoadedRun, row: dict[str, Any], params: SamplingParams, *, trace: bool
) -> Replay:
    """Generate a row again.

    Args:
        loaded_run: The run.
        row: A row of it, with all columns.
        params: The parameters to generate it with.
        trace: Explain each step.

    Raises:
        InputNotFoundError: The row has no prompt that the model can take, as an error row.
    """
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
        sample_index=row["sample_index"] or 0,
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
        eos_token_ids=loaded_run.eos_token_ids,
        window_full=loaded_run.config.window_full,
        record_logits=row["logits_digest"] is not None,
        token_bytes=loaded_run.token_bytes,
    )
    (completion,) = [done for step in engine.generate(iter([source])) for done in step]
    token_ids = completion.token_ids
    text = None
    if completion.finish_reason != "error":
        text = loaded_run.tokenizer.completion_text(
            prompt_ids, token_ids, completion.stop_reason, completion.text_bytes
        )
    return Replay(
        completion=completion,
        text=text,
        first_difference=_first_difference(completion, row),
        trace=_trace(loaded_run, prompt_ids, completion) if trace and token_ids else (),
    )


def _first_difference(completion: Completion, row: dict[str, Any]) -> int | None:
    token_ids, recorded = completion.token_ids, row["completion_token_ids"]
    if token_ids == recorded and completion.stop_reason == row["stop_reason"]:
        return None
    return next(
        (i for i, (a, b) in enumerate(zip(token_ids, recorded, strict=False)) if a != b),
        min(len(token_ids), len(recorded)),
    )


def each_step(
    loaded_run: LoadedRun, prompt_ids: list[int], new: list[int], params: SamplingParams
) -> Iterator[tuple[Tensor, SampleRequest]]:
    """Yield the logits (V,) of each step of a row, as the model gives them, with its request.

    Args:
        loaded_run: The run.
        prompt_ids: The prompt, which the model can take.
        new: The new tokens, at least one. Their steps are computed by one prefill.
        params: The settings that adjust the logits.
    """
    from gptbatch.pipeline.audit.trace import RecordedRow, each_logits, step_hidden
    from gptbatch.pipeline.engine.row_adjustments import next_adjustments
    from gptbatch.pipeline.engine.sampling_step import SampleRequest

    model = loaded_run.loaded.model
    adjustments = loaded_run.row_adjustments(params, prompt_ids)
    for segments, hidden in step_hidden(
        model, [RecordedRow(prompt=prompt_ids, new=new, params=params)]
    ):
        steps = (step for segment in segments for step in segment.steps)
        for step, logits in zip(steps, each_logits(model, hidden), strict=True):
            yield (
                logits,
                SampleRequest(params=params, step=step, adjustments=next_adjustments(adjustments)),
            )
            if adjustments is not None:
                adjustments.add(new[step])


def _trace(
    loaded_run: LoadedRun, prompt_ids: list[int], completion: Completion
) -> tuple[StepTrace, ...]:
    from gptbatch.pipeline.audit.trace import explain_step

    new = completion.token_ids
    return tuple(
        explain_step(logits, request, new[request.step])
        for logits, request in each_step(loaded_run, prompt_ids, new, completion.prompt.params)
    )
