"""Compare the kernels with torch: the linears of a step of gpt2, and sampling for 64 rows.

    python benchmarks/kernels.py [--threads N] [--repeats 9]

Linears are compared with oneDNN on prepacked weights, sampling from 50,257 logits with the same
formula in torch. Times are medians of alternating calls. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gptbatch.pipeline.engine.sampling import sample_tokens
from gptbatch.pipeline.kernels.build import load_kernels
from gptbatch.pipeline.params.sampling_params import SamplingParams

LINEARS = {
    "attn_qkv": (768, 2304, 12),
    "attn_out": (768, 768, 12),
    "mlp_in": (768, 3072, 12),
    "mlp_out": (3072, 768, 12),
    "lm_head": (768, 50257, 1),
}


def medians(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each call; they alternate, after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if repeat > 0:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def linears(dtype: torch.dtype, rows: int, repeats: int) -> dict[str, float]:
    """Return the GFLOP/s of all linears of a step together."""
    seconds = {"gptbatch": 0.0, "oneDNN": 0.0}
    operations = 0
    for in_features, out_features, layers in LINEARS.values():
        x = torch.randn(rows, in_features).to(dtype)
        weights = [torch.randn(out_features, in_features).to(dtype) for _ in range(layers)]
        packed = [torch.ops.gptbatch.pack_weight(weight) for weight in weights]
        reordered = [torch.ops.mkldnn._reorder_linear_weight(weight) for weight in weights]
        calls: dict[str, Callable[[], object]] = {
            "gptbatch": partial(_gptbatch_linears, x, packed, out_features),
            "oneDNN": partial(_onednn_linears, x, reordered),
        }
        for name, median in medians(calls, repeats).items():
            seconds[name] += median
        operations += 2 * rows * in_features * out_features * layers
    return {name: round(operations / s / 1e9, 1) for name, s in seconds.items()}


def _gptbatch_linears(x: Tensor, weights: list[Tensor], out_features: int) -> None:
    for weight in weights:
        torch.ops.gptbatch.linear(x, weight, out_features, None, None, "none")


def _onednn_linears(x: Tensor, weights: list[Tensor]) -> None:
    for weight in weights:
        torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def sampling(
    dtype: torch.dtype, top_k: int, top_p: float, min_p: float, repeats: int
) -> dict[str, float]:
    """Return the milliseconds that 64 rows take."""
    logits = (torch.randn(64, 50257) * 3 - 35).to(dtype)
    params = [
        SamplingParams(
            seed=row, temperature=0.8, top_k=top_k, max_new_tokens=1, min_p=min_p, top_p=top_p
        )
        for row in range(64)
    ]
    calls: dict[str, Callable[[], object]] = {
        "gptbatch": lambda: sample_tokens(logits, params, [0] * 64, [1e-3] * 64, native=True),
        "torch": lambda: sample_tokens(logits, params, [0] * 64, [1e-3] * 64),
    }
    return {name: round(s * 1e3, 2) for name, s in medians(calls, repeats).items()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load_kernels()
    report: dict[str, dict[str, float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        if dtype == torch.float32 or torch.ops.gptbatch.has_bfloat16():
            for rows in (32, 64, 128):
                report[f"linears of {rows} rows, {name}, GFLOP/s"] = linears(
                    dtype, rows, args.repeats
                )
        for top_k, top_p, min_p in (
            (40, 1.0, 0.0),
            (40, 0.9, 0.0),
            (40, 1.0, 0.05),
            (1000, 1.0, 0.0),
            (1000, 0.9, 0.0),
            (0, 1.0, 0.0),
            (0, 0.9, 0.0),
            (0, 1.0, 0.05),
        ):
            title = f"sampling, top_k {top_k}, top_p {top_p:g}, min_p {min_p:g}, {name}, ms"
            report[title] = sampling(dtype, top_k, top_p, min_p, args.repeats)
    for title, found in report.items():
        print(f"{title:<58}", *(f"{name} {value:8.2f}" for name, value in found.items()))
    print(json.dumps({"threads": args.threads, **report}))


if __name__ == "__main__":
    main()
