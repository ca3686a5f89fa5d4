"""The cost of batch invariance: new tokens per second with `require`, with `off`, and padded.

    python benchmarks/batch_invariance.py [--dtype float32] [--repeats 3] [--rows 64]
                                          [--prompt-tokens 32] [--new-tokens 128] [--threads N]

Uses gpt2's shape with random weights, temperature 0.8 and top-k 40 on a CPU; end-of-text is
ignored. The three run in turn. The self-test is timed by itself. The last line is a JSON object;
quote medians and ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from gptbatch.pipeline.bench.random_model import random_model
from gptbatch.pipeline.bench.shapes import shape_config
from gptbatch.pipeline.bench.workloads import uniform_workload
from gptbatch.pipeline.engine.engine import Engine
from gptbatch.pipeline.kv_cache.interface import select_backend
from gptbatch.pipeline.kv_cache.spec import PADDED, Backend
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.self_test import select_batch_invariant_kernels

CPU = torch.device("cpu")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = shape_config("gpt2")
    work = uniform_workload(
        args.rows, args.prompt_tokens, args.new_tokens, vocab_size=config.vocab_size
    )

    def model(backend: Backend) -> GPT:
        return random_model(config, dtype=getattr(torch, args.dtype), device=CPU, backend=backend)

    fastest = select_backend("auto", CPU)
    models = {"require": model(fastest), "off": model(fastest), "padded": model(PADDED)}
    self_test_s, passed = {}, {}
    for name in ("require", "padded"):
        began = time.perf_counter()
        report = select_batch_invariant_kernels(models[name])
        self_test_s[name] = round(time.perf_counter() - began, 2)
        passed[name] = report.passed
        assert report.passed or name == "padded", report.failures

    def tokens_per_s(model: GPT, repeat: int) -> float:
        engine = Engine(model=model, batch_size=args.rows, eos_token_ids=())
        began = time.perf_counter()
        for _ in engine.generate(work.prompts(repeat, vocab_size=config.vocab_size)):
            pass
        return engine.stats.new_tokens / (time.perf_counter() - began)

    rates: dict[str, list[float]] = {name: [] for name in models}
    # Repeat -1 is a warm-up. The order alternates, so that no model always runs first.
    for repeat in range(-1, args.repeats):
        for name in list(models) if repeat % 2 else list(reversed(models)):
            rate = tokens_per_s(models[name], repeat)
            note = " (warm-up)" if repeat < 0 else ""
            print(f"repeat {repeat}: {name:<7} {rate:7.0f} new tokens/s{note}", flush=True)
            if repeat >= 0:
                rates[name].append(rate)

    def ratio(a: str, b: str) -> float:
        return round(statistics.median(x / y for x, y in zip(rates[a], rates[b], strict=True)), 3)

    medians = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    summary = {
        "dtype": args.dtype,
        "threads": args.threads,
        "work": f"{args.rows} x ({args.prompt_tokens} + {args.new_tokens})",
        "attention": fastest.name,
        "linears": models["require"].linear_kind,
        "tokens_per_s": medians,
        "require_over_off": ratio("require", "off"),
        "padded_over_require": ratio("padded", "require"),
        "self_test_s": self_test_s,
        "passed": passed,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
