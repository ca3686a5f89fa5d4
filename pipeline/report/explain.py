"""The section that explains rows of a run token by token, and samples them with other settings.

It needs the weights: one prefill per row computes the logits of every step again.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptbatch.pipeline.audit.loaded_run import LoadedRun
from gptbatch.pipeline.audit.replay import each_step
from gptbatch.pipeline.audit.run_reader import RunReader
from gptbatch.pipeline.audit.trace import StepTrace, explain_step
from gptbatch.pipeline.engine.logit_adjustments import adjusted_logits
from gptbatch.pipeline.engine.noise import gumbel
from gptbatch.pipeline.engine.row_adjustments import RowAdjustments
from gptbatch.pipeline.engine.sampling_step import SampleRequest
from gptbatch.pipeline.errors import InputNotFoundError
from gptbatch.pipeline.params.sampling_params import SamplingParams, from_row
from gptbatch.pipeline.report.document import Section, render, template_text, to_json
from gptbatch.pipeline.report.step_table import LARGE_TOP_KS, MAX_LEVEL_TOKENS, step_table

MAX_ROWS = 16
# Of all rows together, and of their JSON, without and with a second run in the report.
MAX_STEPS = 256
MAX_BYTES, MAX_BYTES_BESIDE = 1_450_000, 1_050_000
MAX_PROMPT_CHARACTERS = 400
MAX_SETTING_CHARACTERS = 80
# Up to this temperature the ribbon shows which token wins.
MAX_TEMPERATURE = 3.0
# Tokens before one whose text depends on them.
_CONTEXT = 32
_SCRIPTS = ("sampling.js", "explain_settings.js", "explain_step.js", "explain.js")
_SLIDERS = ("temperature", "top_k", "top_p", "min_p")
Row = dict[str, Any]


def find_rows(run: RunReader, names: Sequence[str]) -> list[Row]:
    """Return the rows to explain, with all columns.

    Args:
        run: The run.
        names: Ids of rows, or `ID#I` for sample I of a row, from 0.

    Raises:
        InputNotFoundError: There is no such row, or it has no new tokens.
    """
    if len(set(names)) > MAX_ROWS:
        raise InputNotFoundError(
            f"--explain: {len(set(names))} rows; a report explains at most {MAX_ROWS}"
        )
    rows = [_find_row(run, name) for name in dict.fromkeys(names)]
    for row in rows:
        reason = row["error"] if row["finish_reason"] == "error" else "it has no new tokens"
        if row["finish_reason"] == "error" or not row["completion_token_ids"]:
            raise InputNotFoundError(
                f"{run.path}: row {row['prompt_id']!r} cannot be explained: {reason}"
            )
    return rows


def explain_section(
    loaded_run: LoadedRun, rows: Sequence[Row], max_bytes: int = MAX_BYTES
) -> Section:
    """Return the section that explains rows.

    Args:
        loaded_run: The run.
        rows: As `find_rows` returns them.
        max_bytes: Of its JSON. Where more would be needed, steps at the ends of rows are left out.

    Raises:
        InputNotFoundError: A row is damaged.
        ModelError: The model cannot be loaded.
    """
    prompts = [_prompt(loaded_run, row) for row in rows]
    counts = shares([len(row["completion_token_ids"]) for row in rows], MAX_STEPS)
    explained = [
        _explain_row(loaded_run, row, prompt, count)
        for row, prompt, count in zip(rows, prompts, counts, strict=True)
    ]
    explained = _fit(explained, max_bytes)
    data = {
        "rows": explained,
        "level_tokens": MAX_LEVEL_TOKENS,
        "large_top_ks": LARGE_TOP_KS,
        "highest": MAX_TEMPERATURE,
        "reasons": loaded_run.reasons_bits_may_differ(),
    }
    return Section(
        id="explorer",
        title="Explorer",
        html=render(
            "explain.html",
            is_cut=any(len(row["steps"]) < row["tokens"] for row in explained),
            max_steps=MAX_STEPS,
            max_kilobytes=max_bytes // 1000,
        ),
        data=data,
        script="\n".join(map(template_text, _SCRIPTS)),
        style=template_text("explain.css"),
    )


def shares(lengths: Sequence[int], total: int) -> list[int]:
    """Divide a total among items as evenly as their lengths allow."""
    given = [0] * len(lengths)
    left = total
    for number, index in enumerate(sorted(range(len(lengths)), key=lengths.__getitem__)):
        given[index] = min(lengths[index], left // (len(lengths) - number))
        left -= given[index]
    return given


def _find_row(run: RunReader, name: str) -> Row:
    prompt_id, mark, sample = name.rpartition("#")
    if mark and sample.isascii() and sample.isdigit() and run.find(name) is None:
        samples = _samples(run, prompt_id)
        if int(sample) in samples:
            return run.require(prompt_id, int(sample))
        if samples:
            found = "sample" if len(samples) == 1 else "samples"
            raise InputNotFoundError(
                f"{run.path}: row {prompt_id!r} has no sample {sample}; it has the {found} "
                f"{', '.join(map(str, samples))}"
            )
    return run.require(name)


def _samples(run: RunReader, prompt_id: str) -> list[int]:
    """Return the indices of the samples of a row; none without such a row."""
    return sorted(
        row["sample_index"] or 0
        for row in run.rows(["prompt_id", "sample_index"])
        if row["prompt_id"] == prompt_id
    )


def _prompt(loaded_run: LoadedRun, row: Row) -> list[int]:
    """Return the token ids of a row's prompt."""
    ((prompt_ids, problem),) = loaded_run.prompt_token_ids([row])
    vocab_size = loaded_run.gpt_config.vocab_size
    if not problem and not all(0 <= token < vocab_size for token in row["completion_token_ids"]):
        problem = f"it has tokens that the model (vocab_size {vocab_size}) does not have"
    if problem:
        raise InputNotFoundError(
            f"{loaded_run.run.path}: row {row['prompt_id']!r} cannot be explained: {problem}"
        )
    return prompt_ids


def _explain_row(loaded_run: LoadedRun, row: Row, prompt_ids: list[int], count: int) -> Row:
    """Return the data of a row, with its first `count` steps."""
    params = from_row(row)
    new = row["completion_token_ids"]
    tokens = prompt_ids + new
    steps = []
    for logits, request in each_step(loaded_run, prompt_ids, new[:count], params):
        at = len(prompt_ids) + request.step
        text_of = _TokenText(loaded_run, tokens[max(0, at - _CONTEXT) : at])
        steps.append(_explain_step(logits, request, tokens[at], text_of))
    prompt = row["prompt"]
    return {
        "id": row["prompt_id"],
        "sample": row["sample_index"] or 0,
        "seed": str(params.seed),
        "settings": {name: getattr(params, name) for name in _SLIDERS},
        "others": _other_settings(params),
        "adjusted": RowAdjustments.are_needed(params),
        "vocab_size": loaded_run.gpt_config.vocab_size,
        "prompt": prompt[-MAX_PROMPT_CHARACTERS:],
        "prompt_cut": max(0, len(prompt) - MAX_PROMPT_CHARACTERS),
        "tokens": len(new),
        "stop_reason": row["stop_reason"],
        "steps": steps,
    }


def _explain_step(
    logits: Tensor, request: SampleRequest, token: int, text_of: _TokenText
) -> dict[str, Any]:
    """Return the data of a step."""
    params = request.params
    trace = explain_step(logits, request, token)
    seen = own = logits.float()
    if request.adjustments is not None:
        (seen,) = adjusted_logits(own[None], [request.adjustments])
    values, own_values = seen.cpu().numpy(), own.cpu().numpy()
    if not np.isfinite(values.max()):
        raise InputNotFoundError(
            f"step {request.step} cannot be explained: with these weights and settings, no token "
            "can be sampled"
        )
    token_ids = torch.arange(len(values))
    table = step_table(
        values,
        gumbel(torch.tensor(params.seed), torch.tensor(request.step), token_ids).numpy(),
        max_temperature=max(MAX_TEMPERATURE, params.temperature),
        token=token,
        top_k=params.top_k,
    )
    tokens = []
    for token_id, place, logit in zip(
        table.token_ids.tolist(), table.places.tolist(), table.logits, strict=True
    ):
        text, raw = text_of(token_id)
        own_logit = None if request.adjustments is None else _short(own_values[token_id])
        entry = [token_id, place, _short(logit), text, raw, own_logit]
        while entry[-1] is None:
            entry.pop()
        tokens.append(entry)
    counts = None if (table.counts == 1).all() else table.counts.tolist()
    weights = [segment.weights for segment in table.segments]
    return {
        **_recorded(trace, text_of),
        "levels": _base64(table.levels.astype("<f4")),
        **({} if counts is None else {"counts": counts}),
        "segments": [
            [segment.end, segment.low, segment.high, len(segment.weights)]
            for segment in table.segments
        ],
        "weights": _base64(np.concatenate([np.empty(0), *weights]).astype("<f8")),
        "tokens": tokens,
    }


def _recorded(trace: StepTrace, text_of: _TokenText) -> dict[str, Any]:
    """Return what `replay --trace --json` prints of a step."""
    text, raw = text_of(trace.candidate.token)
    return {
        "token": trace.candidate.token,
        "text": text,
        **({} if raw is None else {"bytes": raw}),
        "logprob": trace.logprob,
        "probability": trace.candidate.probability,
        "rank": trace.rank,
        "kept": trace.kept,
        # None, as infinity becomes: no other token can be sampled
        "margin": trace.decision_margin,
        "runners_up": [
            [other.token, *text_of(other.token), other.probability] for other in trace.runners_up
        ],
    }


class _TokenText:
    """The texts of tokens at one place.

    Args:
        loaded_run: The run.
        before: The tokens before the place.
    """

    def __init__(self, loaded_run: LoadedRun, before: list[int]) -> None:
        self._tokenizer, self._before = loaded_run.tokenizer, before
        self._bytes = loaded_run.token_bytes

    def __call__(self, token: int) -> tuple[str, str | None]:
        """Return the text of a token, and its bytes in hexadecimal if they are no whole text."""
        text = self._tokenizer.added_text(self._before, [token])
        raw = self._bytes[token] if token < len(self._bytes) else b""
        if "\ufffd" in text and "\ufffd".encode() not in raw and raw:
            return text, raw.hex(" ")
        return text, None


def _other_settings(params: SamplingParams) -> dict[str, str]:
    """Return the settings of a row, besides those with sliders, that differ from their defaults."""
    texts = {
        name: str(list(value) if isinstance(value, tuple) else value)
        for name, value in params.others().items()
        if name not in _SLIDERS
    }
    return {
        name: text if len(text) <= MAX_SETTING_CHARACTERS else f"{text[:MAX_SETTING_CHARACTERS]}..."
        for name, text in texts.items()
    }


def _fit(rows: list[Row], max_bytes: int) -> list[Row]:
    """Leave out steps at the ends of the longest rows until all fit."""
    sizes = [[len(to_json(step).encode()) for step in row["steps"]] for row in rows]
    while sum(map(sum, sizes)) > max_bytes:
        longest = max(range(len(rows)), key=lambda index: len(sizes[index]))
        sizes[longest].pop()
    return [
        {**row, "steps": list(islice(row["steps"], len(kept)))}
        for row, kept in zip(rows, sizes, strict=True)
    ]


def _short(value: np.float32) -> float | None:
    """Return a number with few digits that rounds to this float32; None for -inf."""
    return float(str(value)) if np.isfinite(value) else None


def _base64(values: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(values.tobytes()).decode()
