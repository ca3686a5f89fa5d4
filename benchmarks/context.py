"""Seconds per decode step as the context grows: 64 rows after 100 and after 1,000 tokens.

    python benchmarks/context.py [--rows 64] [--contexts 100 1000] [--dtypes float32 bfloat16]
                                 [--threads N] [--repeats 15]

Uses gpt2's shape with random weights and tokens, no shared prefix, temperature 0.8 and top-k 40. A
context is at most 1,023 tokens; 64 rows after 1,000 take 5 GB in float32. Prints medians, and the
time of reading keys and values alone at the best bandwidth of a plain sum over a gigabyte. The last
line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

import torch

from gptbatch.pipeline.bench.measure import measure_reading
from gptbatch.pipeline.bench.random_model import random_model
from gptbatch.pipeline.bench.shapes import shape_config
from gptbatch.pipeline.engine.sampling_step import SampleRequest
from gptbatch.pipeline.engine.two_pass_sampling import sample_from_hidden
from gptbatch.pipeline.kv_cache.interface import KVCache, select_backend
from gptbatch.pipeline.kv_cache.quantization import CacheDtype
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.padding import STEP_TOKENS
from gptbatch.pipeline.params.sampling_params import SamplingParams

CPU = torch.device("cpu")
# Smallest decision margin of a row so far: typical after dozens of tokens.
SMALLEST_MARGIN = 0.02


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--contexts", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    rate = measure_reading(CPU) * 1e9
    print(f"memory: {rate / 1e9:.0f} GB/s")
    results = []
    cache_dtypes: tuple[CacheDtype, ...] = ("auto", "int8")
    for dtype in args.dtypes:
        for cache_dtype in cache_dtypes:
            model = random_model(
                shape_config("gpt2"),
                dtype=getattr(torch, dtype),
                device=CPU,
                backend=select_backend("auto", CPU),
                cache_dtype=cache_dtype,
            )
            times = step_seconds(model, args.rows, sorted(args.contexts), args.repeats)
            spec = model.cache_spec
            for context, seconds in times.items():
                growth = round(seconds / times[min(times)], 2)
                n_bytes = spec.capacity_for([context + 1] * args.rows) * spec.bytes_per_token
                print(
                    f"{dtype:<9} cache {cache_dtype:<5} after {context:5d} tokens: "
                    f"{seconds * 1e3:7.1f} ms, {growth:.2f} times; "
                    f"reading {n_bytes / 1e9:.1f} GB alone {n_bytes / rate * 1e3:5.1f} ms",
                    flush=True,
                )
                step = {
                    "context": context,
                    "seconds": seconds,
                    "growth": growth,
                    "bytes": n_bytes,
                    "reading_seconds": n_bytes / rate,
                }
                results.append({"dtype": dtype, "cache_dtype": cache_dtype, **step})
    print(
        json.dumps(
            {
                "rows": args.rows,
                "threads": torch.get_num_threads(),
                "read_gb_per_s": rate / 1e9,
                "steps": results,
            }
        )
    )


def step_seconds(model: GPT, n_rows: int, contexts: list[int], repeats: int) -> dict[int, float]:
    """Return, by context length, the median time of a decode step of all rows."""
    cache = model.new_cache(
        n_rows, capacity=model.cache_spec.capacity_for([max(contexts) + 1] * n_rows)
    )
    rng = random.Random(0)
    params = [
        SamplingParams(seed=row, temperature=0.8, top_k=40, max_new_tokens=1)
        for row in range(n_rows)
    ]
    seq_indices = list(range(n_rows))
    filled = 0
    times = {}
    for context in contexts:
        for seq_index in seq_indices:
            prefill(model, cache, seq_index, filled, context, rng)
        filled = context
        seconds = []
        # Every repeat writes the same position again.
        for _ in range(repeats):
            tokens = [rng.randrange(model.config.vocab_size) for _ in seq_indices]
            began = time.perf_counter()
            hidden = model.hidden(
                cache, tokens=tokens, seq_indices=seq_indices, positions=[context] * n_rows
            )
            requests = [
                SampleRequest(params=row, step=context, margin_bound=SMALLEST_MARGIN)
                for row in params
            ]
            sample_from_hidden(model, hidden, requests)
            seconds.append(time.perf_counter() - began)
        times[context] = statistics.median(seconds)
    return times


def prefill(
    model: GPT, cache: KVCache, seq_index: int, first: int, last: int, rng: random.Random
) -> None:
    for begin in range(first, last, STEP_TOKENS):
        positions = range(begin, min(last, begin + STEP_TOKENS))
        tokens = [rng.randrange(model.config.vocab_size) for _ in positions]
        model.logits(
            model.hidden(
                cache,
                tokens=tokens,
                seq_indices=[seq_index] * len(positions),
                positions=positions,
                logits_indices=[],
            )
        )


if __name__ == "__main__":
    main()
