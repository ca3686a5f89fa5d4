"""Ablation: new tokens per second with each optimization turned off in turn, against all on.

    python -m benchmarks.ablation [--shape gpt2] [--workloads uniform ragged shared_prefix]
                                  [--dtypes float32 bfloat16] [--rows 32] [--max-new-tokens 64]
                                  [--repeats 2] [--threads N] [--json ablation.json]
                                  [--chart ablation.png]

Uses random weights on a CPU with the C++ kernels. Each variant is a process of its own, and a new
one in each repeat: where its memory lies alone can change its speed by several percent. In a
repeat, each variant runs directly after what it is compared with, or before it, so that both meet
the machine in the same state. Each run has a new cache, whose memory it has before it begins: to
get it takes up to half a second on a virtual machine, in one run of two. "nothing" changes nothing:
it shows how far the others can be trusted.

Prints a markdown table of speed-ups: the median over the repeats of (rate with it on) / (rate with
it off). The column "same tokens" tells whether both give the same tokens. "n/a" stands where the
optimization is never used: the two-pass head needs float32 and bfloat16 instructions, and the fused
blocks need linears in the model's own dtype. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablation.measure import CPU, Work, measure
from benchmarks.ablation.variants import ONE_BY_ONE, VARIANTS
from gptbatch.pipeline.bench.chart import (
    check_matplotlib,
    describe_measurement,
    draw_ablation,
)
from gptbatch.pipeline.bench.machine import describe_machine
from gptbatch.pipeline.bench.shapes import SHAPES, shape_config
from gptbatch.pipeline.bench.workloads import WORKLOADS
from gptbatch.pipeline.kv_cache.interface import select_backend
from gptbatch.pipeline.model.config import parse_config

# For trying the benchmark out.
TINY = {"vocab_size": 2048, "n_positions": 512, "n_layer": 2, "n_head": 4, "n_embd": 64}


def main() -> None:
    """Measure all variants and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=[*SHAPES, "tiny"], default="gpt2")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="Write the results to this file, too.")
    parser.add_argument("--chart", type=Path, help="Write a PNG of the results.")
    args = parser.parse_args()
    if args.chart:
        check_matplotlib()
    # Builds the kernels before the workers start.
    select_backend("ragged", CPU)
    names = list(dict.fromkeys(["all on", "nothing", ONE_BY_ONE, *args.variants]))
    tiny = parse_config({"model_type": "gpt2", **TINY}, "tiny")
    results: list[dict[str, Any]] = []
    for dtype in args.dtypes:
        work = Work(
            config=tiny if args.shape == "tiny" else shape_config(args.shape),
            dtype=dtype,
            rows=args.rows,
            max_new_tokens=args.max_new_tokens,
            threads=args.threads,
        )
        results += measure(names, work, args.workloads, args.repeats)
    print(table(results, names))
    torch.set_num_threads(args.threads)
    machine = describe_machine(CPU) | {"shape": args.shape}
    report = json.dumps({"machine": machine, "repeats": args.repeats, "results": results})
    if args.json:
        args.json.write_text(report + "\n", encoding="utf-8")
    print(report)
    if args.chart:
        rows = f"{args.rows} rows"
        draw_ablation(results, args.chart, measured=describe_measurement(machine, args.shape, rows))


def table(results: list[dict[str, Any]], names: list[str]) -> str:
    """Return a markdown table: a row per variant, a column per dtype and workload."""
    columns = list(dict.fromkeys((result["dtype"], result["workload"]) for result in results))
    by_key = {(r["dtype"], r["workload"], r["variant"]): r for r in results}
    header = [f"{dtype}, {workload}" for dtype, workload in columns]
    lines = [
        f"| optimization | {' | '.join(header)} | same tokens |",
        f"|---|{'---:|' * len(columns)}---|",
    ]
    rates = [statistics.median(by_key[*column, "all on"]["tokens_per_s"]) for column in columns]
    cells = " | ".join(f"{rate:.0f} tokens/s" for rate in rates)
    lines.append(f"| all on | {cells} | |")
    for name in names:
        if name == "all on":
            continue
        found = [by_key[*column, name] for column in columns]
        cells = " | ".join(
            f"{result['speed_up']:.2f}" if result["applies"] else "n/a" for result in found
        )
        is_same = "yes" if all(result["same_tokens"] for result in found) else "no"
        lines.append(f"| {VARIANTS[name].label} | {cells} | {is_same} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
