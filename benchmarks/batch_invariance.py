"""What exactness costs: new tokens a second with `batch_invariance: exact`, with `off`, and on the padded backend, in turn.

    python benchmarks/exactness.py [--dtype float32] [--repeats 3] [--rows 64] [--prompt-tokens 32] [--new-tokens 128] [--threads N]

The shape of gpt2 with random weights, temperature 0.8, top-k 40, end-of-text ignored, on CPU. The start-up check is timed by
itself. The last line is a JSON object; quote medians and ratios.
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
from gptbatch.pipeline.kv_cache.interface import Backend, select_backend
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.self_test import select_batch_invariant_kernels


def main() -> None:
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

    def network(attention: Backend) -> GPT:
        return random_model(
            config,
            attention=attention,
            dtype=getattr(torch, args.dtype),
            device=torch.device("cpu"),
        )

    fastest = select_backend("auto", torch.device("cpu"))
    models = {"exact": network(fastest), "off": network(fastest), "padded": network("padded")}
    check_s, exact = {}, {}
    for name in ("exact", "padded"):
        began = time.perf_counter()
        report = select_batch_invariant_kernels(models[name])
        check_s[name] = round(time.perf_counter() - began, 2)
        exact[name] = report.passed
        assert report.passed or name == "padded", report.failures

    def tokens_per_s(model: GPT, repeat: int) -> float:
        engine = Engine(model=model, batch_size=args.rows, end_tokens=())
        began = time.perf_counter()
        for _ in engine.generate(work.prompts(repeat, vocab_size=config.vocab_size)):
            pass
        return engine.stats.new_tokens / (time.perf_counter() - began)

    speeds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(-1, args.repeats):
        names = (
            list(models) if repeat % 2 else list(reversed(models))
        )  # who comes first, and after whom, must not matter
        for name in names:
            speed = tokens_per_s(models[name], repeat)
            print(
                f"repeat {repeat}: {name:<7} {speed:7.0f} new tokens/s"
                + (" (not counted)" if repeat < 0 else ""),
                flush=True,
            )
            if repeat >= 0:
                speeds[name].append(speed)

    def ratio(a: str, b: str) -> float:
        return round(statistics.median(x / y for x, y in zip(speeds[a], speeds[b], strict=True)), 3)

    summary = {
        "dtype": args.dtype,
        "threads": args.threads,
        "work": f"{args.rows} x ({args.prompt_tokens} + {args.new_tokens})",
        "attention": fastest,
        "linears": models["exact"].linear_kind,
        "tokens_per_s": {
            name: round(statistics.median(values), 1) for name, values in speeds.items()
        },
        "exact_over_off": ratio("exact", "off"),
        "padded_over_exact": ratio("padded", "exact"),
        "check_s": check_s,
        "passed": exact,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
