"""The tutorial's plot: what one more token costs as the context grows, for the naive loop, the cached engine and `slide`.

One row from one token on, to beyond n_positions. The naive loop computes the whole context again for every token, so that its cost
grows with the context until the window is full; the engine computes one token against the cache. With `slide` it does so too, until
the window is full and moves: then every position changes, and it pays for the whole window as the naive loop does.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from gptbatch.pipeline.bench.workloads import TEMPERATURE, TOP_K
from gptbatch.pipeline.engine import reference
from gptbatch.pipeline.engine.engine import Engine
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.types import Prompt, SamplingParams, TokenizedPrompt

BEYOND = 24  # steps beyond n_positions


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Seconds of a token against its step. linear, quadratic: coefficients of the best fits up to n_positions, highest power first."""

    name: str
    steps: list[int]
    seconds: list[float]
    linear: list[float]
    quadratic: list[float]


def measure_scaling(model: GPT, *, points: int) -> list[Curve]:
    """The three curves; the naive one at about `points` steps, since it takes so long."""
    n_positions = model.config.n_positions
    last = n_positions + BEYOND
    wanted = sorted(
        {
            *np.linspace(1, n_positions, points).round().astype(int).tolist(),
            *range(n_positions + 1, last + 1, 6),
        }
    )
    return [
        _curve("naive", wanted, [_naive_s(model, step) for step in wanted], n_positions),
        _curve("cached", *_engine_s(model, n_positions - 1, slide=False), n_positions),
        _curve("slide", *_engine_s(model, last, slide=True), n_positions),
    ]


def _naive_s(model: GPT, step: int) -> float:
    """The token after a context of `step` tokens; twice, and the faster."""
    idx = torch.arange(step)[None] % model.config.vocab_size
    times = []
    for _ in range(2):
        began = time.perf_counter()
        reference.generate_token(model, idx, temperature=TEMPERATURE, top_k=TOP_K, step=step)
        times.append(time.perf_counter() - began)
    return min(times)


def _engine_s(model: GPT, last: int, *, slide: bool) -> tuple[list[int], list[float]]:
    engine = Engine(
        model=model,
        batch_size=1,
        end_tokens=(),
        window_full="slide" if slide else "stop",
        step_tokens=model.config.n_positions,
    )
    params = SamplingParams(seed=0, temperature=TEMPERATURE, top_k=TOP_K, max_new_tokens=last)
    prompt = Prompt(index=0, prompt_id="0", text="", params=params, metadata=None)
    row = TokenizedPrompt(prompt=prompt, token_ids=[0], tokens_dropped=0, read_s=time.monotonic())
    seconds = []
    began = time.perf_counter()
    for _ in engine.generate(iter([row])):
        now = time.perf_counter()
        seconds.append(now - began)
        began = now
    return list(range(1, len(seconds) + 1)), seconds


def _curve(name: str, steps: list[int], seconds: list[float], n_positions: int) -> Curve:
    inside = [i for i, step in enumerate(steps) if step <= n_positions]
    x, y = np.array(steps)[inside], np.array(seconds)[inside]
    # medians of neighbours: a pause of the machine is no part of the curve
    if len(x) > 200:
        count = len(x) // 9 * 9
        x, y = x[:count].reshape(-1, 9)[:, 4], np.median(y[:count].reshape(-1, 9), axis=1)
    linear, quadratic = (np.polyfit(x, y, degree).tolist() for degree in (1, 2))
    return Curve(name=name, steps=steps, seconds=seconds, linear=linear, quadratic=quadratic)
