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
    report,
    time_us,
)
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


def kernel_times() -> None:
    """Microseconds of samplers, store and attend, and norm."""
    found: dict[str, Any] = {}
    for rows in ROW_COUNTS:
        note_sampling(found, rows)
    for name in ("bfloat16", "float32"):
        for rows in ROW_COUNTS:
            note_attention(found, name, rows)
            x = random(rows, C, dtype=DTYPES[name])
            w, b, y = random(C, dtype=x.dtype), random(C, dtype=x.dtype), x.clone()
            launch = partial(norm, x, w, b, y, 1e-5)
            note(found, f"norm {name} {rows} rows", [launch] * (2 * LAYERS + 1))


def note_sampling(found: dict[str, Any], rows: int) -> None:
    """Time what follows the logits, for this number of rows."""
    for settings in ({"top_k": 40}, *FILTERS, {"temperature": 1.0}):
        case = sampler_case(rows, **settings)
        (params,) = sampler_params(1, **settings)
        case |= {"full_vocab": keeps_full_vocab(params, VOCAB), "top_p": has_top_p(params)}
        launch = partial(sample, **case)
        note(found, f"sample {rows} rows, {settings}", [launch] * LAUNCHES)
    for bad_words in ((), ("ab", "bca", "z")):
        key = f"adjust {rows} rows of 128 tokens{', bad words' * bool(bad_words)}"
        note(found, key, [partial(adjust, *adjust_case(rows, 128, bad_words))] * LAUNCHES)
    case = sampler_case(rows)
    case["state"][:, LOGPROBS.value] = 6
    measured = torch.zeros(rows, WIDTH, dtype=torch.int64, device=DEVICE)
    launch = partial(measure, case["logits"], case["block_max"], case["state"], measured)
    note(found, f"measure {rows} rows, 5 most likely tokens", [launch] * LAUNCHES)


def note_attention(found: dict[str, Any], name: str, rows: int) -> None:
    """Time store and attend, beside the time of their bytes at 3 TB/s."""
    for context in (96, 160):
        for int8 in (False, True):
            cases = [Case(rows, context, DTYPES[name], int8=int8) for _ in range(4)]
            key = f"store and attend {name} {rows} rows, {context} tokens{' int8' * int8}"
            size = 1 if int8 else cases[0].qkv.element_size()
            found[f"{key}: at 3 TB/s"] = round(rows * context * 2 * C * size / 3e6, 2)
            note(found, key, [case.run for case in cases])


def note(found: dict[str, Any], key: str, launches: list[Callable[[], None]]) -> None:
    """Report microseconds per launch; one that fails spares the others."""

    def launch_all() -> None:
        for launch in launches:
            launch()

    try:
        found[key] = round(time_us(launch_all, len(launches), REPLAYS), 2)
    except Exception as error:  # noqa: BLE001 - it is reported, and the rest goes on
        found.setdefault("problems", []).append(f"{key}: {error!r}"[:300])
    report(found)
