"""Measure seconds per token over the context length: naive loop, KV cache, sliding window.

One row runs from one token to beyond n_positions. The naive loop computes the whole context for
every token, so its cost grows until the window is full. The engine computes one token against the
KV cache. With `window_full: slide` it does the same until the window is full. From there every
position changes with each token, and each step prefills the whole window.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from gptbatch.pipeline.bench.workloads import TEMPERATURE, TOP_K
from gptbatch.pipeline.engine.engine import Engine, SchedulingOptions
from gptbatch.pipeline.engine.sampling import sample_tokens
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.types import Prompt, TokenizedPrompt

# Steps beyond n_positions.
STEPS_BEYOND = 24
STEP_STRIDE_BEYOND = 6
# More points than this are reduced to medians of neighbours before fitting.
MAX_POINTS_FITTED = 200
POINTS_PER_MEDIAN = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Seconds of each token.

    Attributes:
        name: naive, cached or slide.
        steps: Tokens before each measured one.
        seconds: Time of each token.
        linear: Coefficients of the best linear fit up to n_positions, highest power first.
        quadratic: The same of the best quadratic fit.
    """

    name: str
    steps: list[int]
    seconds: list[float]
    linear: list[float]
    quadratic: list[float]


def measure_scaling(model: GPT, *, points: int) -> list[Curve]:
    """Return the three curves; the slow naive one at about `points` steps."""
    n_positions = model.config.n_positions
    last = n_positions + STEPS_BEYOND
    naive_steps = sorted(
        {
            *np.linspace(1, n_positions, points).round().astype(int).tolist(),
            *range(n_positions + 1, last + 1, STEP_STRIDE_BEYOND),
        }
    )
    naive_s = [_naive_s(model, step) for step in naive_steps]
    return [
        _curve("naive", naive_steps, naive_s, n_positions),
        _curve("cached", *_engine_s(model, n_positions - 1, slide=False), n_positions),
        _curve("slide", *_engine_s(model, last, slide=True), n_positions),
    ]


@torch.inference_mode()
def _naive_s(model: GPT, step: int) -> float:
    """Return the seconds for the token after `step` tokens: the faster of two tries."""
    idx = torch.arange(step)[None] % model.config.vocab_size
    params = _params(max_new_tokens=1)
    times = []
    for _ in range(2):
        began = time.perf_counter()
        logits = model(idx[:, -model.config.n_positions :])[:, -1]
        sample_tokens(logits, [params], [step])
        times.append(time.perf_counter() - began)
    return min(times)


def _engine_s(model: GPT, last: int, *, slide: bool) -> tuple[list[int], list[float]]:
    engine = Engine(
        model=model,
        batch_size=1,
        eos_token_ids=(),
        window_full="slide" if slide else "stop",
        scheduling=SchedulingOptions(step_tokens=model.config.n_positions),
    )
    params = _params(max_new_tokens=last)
    prompt = Prompt(index=0, prompt_id="0", text="", params=params, metadata=None)
    row = TokenizedPrompt(prompt=prompt, token_ids=[0], tokens_dropped=0, read_s=time.monotonic())
    seconds = []
    began = time.perf_counter()
    for _ in engine.generate(iter([row])):
        now = time.perf_counter()
        seconds.append(now - began)
        began = now
    return list(range(1, len(seconds) + 1)), seconds


def _params(*, max_new_tokens: int) -> SamplingParams:
    return SamplingParams(
        seed=0, temperature=TEMPERATURE, top_k=TOP_K, max_new_tokens=max_new_tokens
    )


def _curve(name: str, steps: list[int], seconds: list[float], n_positions: int) -> Curve:
    inside = [i for i, step in enumerate(steps) if step <= n_positions]
    x, y = np.array(steps)[inside], np.array(seconds)[inside]
    # Medians of neighbours: pauses of the machine are no part of the curve.
    if len(x) > MAX_POINTS_FITTED:
        count = len(x) // POINTS_PER_MEDIAN * POINTS_PER_MEDIAN
        x = x[:count].reshape(-1, POINTS_PER_MEDIAN)[:, POINTS_PER_MEDIAN // 2]
        y = np.median(y[:count].reshape(-1, POINTS_PER_MEDIAN), axis=1)
    linear, quadratic = (np.polyfit(x, y, degree).tolist() for degree in (1, 2))
    return Curve(name=name, steps=steps, seconds=seconds, linear=linear, quadratic=quadratic)
