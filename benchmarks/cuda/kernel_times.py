"""Section `kernel-times`: microseconds of the kernels of a step but the linears."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.cuda.cases import FILTERS, Case, adjust_case, sampler_case, sampler_params
from benchmarks.cuda.common import (
    DEVICE,
    DTYPES,
    IS_FAKE,
    LAYERS,
    ROW_COUNTS,
    VOCAB,
    C,
    random,
    time_us,
)
from benchmarks.cuda.parts import Found, run_cases
from gptbatch.pipeline.engine.device_sampling import has_top_p, keeps_full_vocab
from gptbatch.pipeline.kernels.cuda.adjust import adjust
from gptbatch.pipeline.kernels.cuda.logprobs import WIDTH, measure
from gptbatch.pipeline.kernels.cuda.norm import norm
from gptbatch.pipeline.kernels.cuda.sample import sample
from gptbatch.pipeline.kernels.cuda.state import LOGPROBS

# Launches per graph, so that the launch of the graph hardly counts.
LAUNCHES = 2 if IS_FAKE else 8
# Few, because `adjust` appends a token per launch.
REPLAYS = 5
# The most seconds of a case.
LIMIT = 15

# Makes the arguments of a kernel and returns its launches.
Maker = Callable[[], list[Callable[[], None]]]


def kernel_times(first: int = 0) -> None:
    """Microseconds of samplers, store and attend, and norm."""
    cases: dict[str, Callable[[Found], None]] = {}
    for rows in ROW_COUNTS:
        for settings in ({"top_k": 40}, *FILTERS, {"temperature": 1.0}):
            key = f"sample {rows} rows, {settings}"
            cases[key] = partial(note, key, partial(sample_launches, rows, settings))
        for bad_words in ((), ("ab", "bca", "z")):
            key = f"adjust {rows} rows of 128 tokens{', bad words' * bool(bad_words)}"
            cases[key] = partial(note, key, partial(adjust_launches, rows, bad_words))
        key = f"measure {rows} rows, 5 most likely tokens"
        cases[key] = partial(note, key, partial(measure_launches, rows))
    for name in ("bfloat16", "float32"):
        for rows in ROW_COUNTS:
            for context in (96, 160):
                for int8 in (False, True):
                    key = f"store and attend {name} {rows} rows, {context} tokens{' int8' * int8}"
                    cases[key] = partial(note_attention, key, name, rows, context, int8)
            key = f"norm {name} {rows} rows"
            cases[key] = partial(note, key, partial(norm_launches, name, rows))
    run_cases(cases, first, LIMIT)


def note(key: str, make: Maker, found: Found) -> None:
    """Note microseconds per launch."""
    launches = make()

    def launch_all() -> None:
        for launch in launches:
            launch()

    found[key] = round(time_us(launch_all, len(launches), REPLAYS), 2)


def sample_launches(rows: int, settings: dict[str, Any]) -> list[Callable[[], None]]:
    """Return launches of `sample`."""
    case = sampler_case(rows, **settings)
    (params,) = sampler_params(1, **settings)
    case |= {"full_vocab": keeps_full_vocab(params, VOCAB), "top_p": has_top_p(params)}
    return [partial(sample, **case)] * LAUNCHES


def adjust_launches(rows: int, bad_words: tuple[str, ...]) -> list[Callable[[], None]]:
    """Return launches of `adjust`."""
    return [partial(adjust, *adjust_case(rows, 128, bad_words))] * LAUNCHES


def measure_launches(rows: int) -> list[Callable[[], None]]:
    """Return launches of `measure`."""
    case = sampler_case(rows)
    case["state"][:, LOGPROBS.value] = 6
    measured = torch.zeros(rows, WIDTH, dtype=torch.int64, device=DEVICE)
    launch = partial(measure, case["logits"], case["block_max"], case["state"], measured)
    return [launch] * LAUNCHES


def note_attention(key: str, name: str, rows: int, context: int, int8: bool, found: Found) -> None:
    """Note store and attend over several caches, beside the time of their bytes at 3 TB/s."""
    cases = [Case(rows, context, DTYPES[name], int8=int8) for _ in range(4)]
    size = 1 if int8 else cases[0].qkv.element_size()
    found[f"{key}: at 3 TB/s"] = round(rows * context * 2 * C * size / 3e6, 2)
    note(key, lambda: [case.run for case in cases], found)


def norm_launches(name: str, rows: int) -> list[Callable[[], None]]:
    """Return the launches of `norm` of a step."""
    x = random(rows, C, dtype=DTYPES[name])
    w, b, y = random(C, dtype=x.dtype), random(C, dtype=x.dtype), x.clone()
    return [partial(norm, x, w, b, y, 1e-5)] * (2 * LAYERS + 1)
