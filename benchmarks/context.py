"""What a step of many rows costs as their context grows: seconds for the next token of 64 rows after 100 and after 1,000.

    python benchmarks/context.py [--rows 64] [--contexts 100 1000] [--dtypes float32 bfloat16] [--threads N] [--repeats 15]

The shape of gpt2 with random weights and random tokens, no prefix shared, temperature 0.8, top-k 40. A context is at most 1,023 tokens;
64 rows after 1,000 take 5 GB in float32. Medians, and what reading keys and values alone would take at the best rate of a plain
sum over a gigabyte; the last line is a JSON object.
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
from gptbatch.pipeline.config import EngineConfig
from gptbatch.pipeline.engine.engine import STEP_TOKENS
from gptbatch.pipeline.engine.two_pass_sampling import sample_from_hidden
from gptbatch.pipeline.kv_cache.interface import KVCache
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.loading import prepare_model
from gptbatch.pipeline.types import SamplingParams

CPU = torch.device("cpu")
SMALLEST_MARGIN = 0.02  # of a row so far, as after some dozens of tokens


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
    for dtype in args.dtypes:
        settings = EngineConfig(device="cpu", dtype=dtype, threads=args.threads)
        loaded = prepare_model(
            settings,
            CPU,
            lambda attention, dtype: random_model(
                shape_config("gpt2"), attention=attention, dtype=dtype, device=CPU
            ),
            batch_invariance="off",
        )
        for cache_dtype in ("auto", "int8"):
            loaded.model.cache_dtype = cache_dtype
            times = step_seconds(loaded.model, args.rows, sorted(args.contexts), args.repeats)
            for context, seconds in times.items():
                growth = round(seconds / times[min(times)], 2)
                n_bytes = (
                    loaded.model.cache_spec.capacity_for([context + 1] * args.rows)
                    * loaded.model.cache_spec.bytes_per_token
                )
                print(
                    f"{dtype:<9} cache {cache_dtype:<5} after {context:5d} tokens: {seconds * 1e3:7.1f} ms, {growth:.2f} times; "
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
    """By context: the median time of a step that gives each row its next token."""
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
        for _ in range(repeats):  # the same position again: it is written anew
            tokens = [rng.randrange(model.config.vocab_size) for _ in seq_indices]
            began = time.perf_counter()
            hidden = model.hidden(
                cache, tokens=tokens, seq_indices=seq_indices, positions=[context] * n_rows
            )
            sample_from_hidden(
                model, hidden, params, [context] * n_rows, [SMALLEST_MARGIN] * n_rows
            )
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
