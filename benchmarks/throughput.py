"""New tokens a second beside `generate` of transformers: GPT-2 124M shape, random weights, uniform work.

    python benchmarks/throughput.py [--dtype float32] [--attention auto] [--repeats 3] [--rows 64] [--prompt-tokens 32] [--new-tokens 128]

Both run the same prompts in the same process, in turn, with temperature 0.8 and top-k 40, end-of-text ignored. The machine's
own limit stands beside them: the rate of one large matrix product, and the tokens a second that it would allow if nothing
but the linears took time. The last line is a JSON object; medians and the ratio are what to quote.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from workload import TEMPERATURE, TOP_K, as_rows, our_network, random_gpt2, random_prompts

from pipeline.generation.engine import Engine
from pipeline.gpt.attention import choose_backend
from pipeline.gpt.linear import Linear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--attention", choices=["auto", "ragged", "padded"], default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    theirs = random_gpt2()
    attention = choose_backend(args.attention, torch.device(args.device))
    ours = our_network(theirs, attention=attention, dtype=dtype, device=args.device)
    theirs = theirs.to(device=args.device, dtype=dtype)

    def run_ours(repeat: int) -> None:
        engine = Engine(model=ours, batch_size=args.batch_size, end_of_text=None)
        rows = as_rows(random_prompts(args.rows, args.prompt_tokens, repeat=repeat), new_tokens=args.new_tokens)
        ended = sum(len(completions) for completions in engine.generate(iter(rows)))
        assert ended == args.rows
        assert engine.stats.new_tokens == args.rows * args.new_tokens

    @torch.inference_mode()
    def run_theirs(repeat: int) -> None:
        for batch in random_prompts(args.rows, args.prompt_tokens, repeat=repeat).split(args.batch_size):
            idx = batch.to(args.device)
            theirs.generate(  # type: ignore[misc]
                idx,
                attention_mask=torch.ones_like(idx),
                max_new_tokens=args.new_tokens,
                min_new_tokens=args.new_tokens,
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=TOP_K,
                pad_token_id=50256,
            )

    def seconds(run: Callable[[int], None], repeat: int) -> float:
        if args.device != "cpu":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run(repeat)
        if args.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds(run_ours, -1)
    new_tokens = args.rows * args.new_tokens
    speeds: dict[str, list[float]] = {"gptbatch": [], "transformers": []}
    for repeat in range(args.repeats):
        for name, run in (("gptbatch", run_ours), ("transformers", run_theirs)):
            speeds[name].append(new_tokens / seconds(run, repeat))
            print(f"repeat {repeat}: {name:<13} {speeds[name][-1]:7.0f} new tokens/s", flush=True)
    gflops = matrix_gflops(dtype, args.device, args.rows)
    linear_weights = sum(m.in_features * m.out_features for m in ours.modules() if isinstance(m, Linear))
    prefill_weights = linear_weights - ours.lm_head.in_features * ours.lm_head.out_features
    operations = 2 * args.rows * (linear_weights * args.new_tokens + prefill_weights * (args.prompt_tokens - 1))
    limit = new_tokens / (operations / (gflops * 1e9))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    report = {
        "dtype": args.dtype,
        "device": args.device,
        "threads": args.threads,
        "attention": attention,
        "work": f"{args.rows} x ({args.prompt_tokens} + {args.new_tokens})",
        "tokens_per_s": round(medians["gptbatch"], 1),
        "transformers_tokens_per_s": round(medians["transformers"], 1),
        "ratio": round(statistics.median(a / b for a, b in zip(speeds["gptbatch"], speeds["transformers"], strict=True)), 2),
        "matrix_gflops": round(gflops),
        "limit_of_the_linears_tokens_per_s": round(limit),
        "share_of_that_limit": round(medians["gptbatch"] / limit, 2),
    }
    print(json.dumps(report))


def matrix_gflops(dtype: torch.dtype, device: str, rows: int) -> float:
    """The best rate of our own linear at (rows, 768) x (768, 3072), what a decode step is made of."""
    linear = Linear(768, 3072).to(device=device, dtype=dtype).requires_grad_(False)
    torch.nn.init.normal_(linear.weight)
    linear.pack()
    x = torch.randn(rows, 768, device=device, dtype=dtype)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(30):
            began = time.perf_counter()
            for _ in range(10):
                linear(x)
            if device != "cpu":
                torch.cuda.synchronize()
            best = min(best, (time.perf_counter() - began) / 10)
    return 2 * rows * 768 * 3072 / best / 1e9


if __name__ == "__main__":
    main()
