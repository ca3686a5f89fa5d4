"""Ablation: new tokens per second with each optimization turned off in turn, against all on.

    python benchmarks/ablation.py [--shape gpt2] [--workloads uniform ragged shared_prefix]
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

Three optimizations live inside the kernel that runs all blocks in one call. They are turned off in
a Python version of that kernel, and compared with this version ("blocks one by one").
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from gptbatch.pipeline.bench.chart import (
    check_matplotlib,
    describe_measurement,
    draw_ablation,
)
from gptbatch.pipeline.bench.machine import describe_machine
from gptbatch.pipeline.bench.random_model import random_model
from gptbatch.pipeline.bench.shapes import SHAPES, shape_config
from gptbatch.pipeline.bench.workloads import WORKLOADS, Workload, make_workload
from gptbatch.pipeline.engine import two_pass_sampling
from gptbatch.pipeline.engine.engine import Engine
from gptbatch.pipeline.engine.sampling import SampledToken, sample_tokens
from gptbatch.pipeline.kernels import build
from gptbatch.pipeline.kernels.huge_pages import HugePages
from gptbatch.pipeline.kv_cache.block_pool import blocks_for
from gptbatch.pipeline.kv_cache.interface import select_backend
from gptbatch.pipeline.kv_cache.paged import PagedAttention, PagedKVCache
from gptbatch.pipeline.kv_cache.quantization import CacheDtype
from gptbatch.pipeline.kv_cache.spec import RAGGED
from gptbatch.pipeline.model import linear
from gptbatch.pipeline.model.config import GPTConfig, parse_config
from gptbatch.pipeline.model.fused_blocks import FusedBlocks
from gptbatch.pipeline.model.gpt import GPT, BlockStack
from gptbatch.pipeline.model.linear import Linear, LinearKind
from gptbatch.pipeline.model.lm_head import make_two_pass_head
from gptbatch.pipeline.model.norm import Norm

CPU = torch.device("cpu")
MAX_SEQS = 64
WARM_UP_TOKENS = 4
# For trying the benchmark out.
TINY = {"vocab_size": 2048, "n_positions": 512, "n_layer": 2, "n_head": 4, "n_embd": 64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One optimization turned off, or on where it is off by default.

    Attributes:
        label: In the table.
        baseline: The variant that it is compared with.
        patch: Called in the worker before the model is made.
        adapt: Called with the model.
        applies: Returns whether the packed model uses the optimization at all.
        cache_dtype: Of the KV cache.
        is_extra: Turns something on; the speed-up is inverted.
    """

    label: str
    baseline: str = "all on"
    patch: Callable[[], None] = lambda: None
    adapt: Callable[[GPT], None] = lambda model: None
    applies: Callable[[GPT], bool] = lambda model: True
    cache_dtype: CacheDtype = "auto"
    is_extra: bool = False


def use_onednn_linears() -> None:
    """Pack linears for oneDNN; the blocks then run one by one."""
    original = linear.packed_kind

    def packed_kind(weight: Tensor, *, native: bool) -> LinearKind:
        return original(weight, native=False)

    linear.packed_kind = packed_kind


def restore_two_pass_head(model: GPT) -> None:
    """Make the two-pass head that only a native head gets."""

    class NativeHead:
        kind = "native"

    model.two_pass_head = make_two_pass_head(
        cast(Linear, NativeHead()), model.wte.weight, HugePages()
    )


def leave_weights_on_small_pages() -> None:
    """Pack each weight into memory of its own."""

    def pack(self: HugePages, weight: Tensor) -> Tensor:
        packed: Tensor = torch.ops.gptbatch.pack_weight(weight)
        return packed

    HugePages.pack = pack  # type: ignore[method-assign]  # a patch


def drop_two_pass_head(model: GPT) -> None:
    """Compute all logits in one pass."""
    model.two_pass_head = None


def build_without_prefetch() -> None:
    """Build kernels whose prefetch instructions are left out."""
    original = build.compile_flags
    build.compile_flags = lambda: [*original(), "-D__builtin_prefetch(...)="]


def compute_all_of_the_last_block() -> None:
    """Run the last block for all tokens, not only for those that need logits."""
    original = BlockStack.forward

    def forward(
        self: BlockStack, x: Tensor, attention: Any, logits_indices: Tensor | None = None
    ) -> Tensor:
        y = original(self, x, attention)
        return y if logits_indices is None else y[logits_indices]

    BlockStack.forward = forward  # type: ignore[method-assign]  # a patch


def sample_with_torch() -> None:
    """Sample by torch's operators."""

    def sample(*arguments: Any, native: bool) -> list[SampledToken]:
        return sample_tokens(*arguments, native=False)

    vars(two_pass_sampling)["sample_tokens"] = sample


def run_one_by_one(*, fuse_qkv: bool = True, native_norm: bool = True) -> Callable[[], None]:
    """Return a patch that runs the blocks operator by operator, as the kernel does in C++."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        if native_norm:
            y: Tensor = torch.ops.gptbatch.layer_norm(x, weight, bias, epsilon)
            return y
        return F.layer_norm(x, weight.shape, weight, bias, epsilon)

    def product(x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        y: Tensor = torch.ops.gptbatch.linear(x, weight, bias.numel(), bias, *rest)
        return y

    def attend(
        x: Tensor, qkv: Tensor, bias: Tensor, cache: Tensor, call: tuple[Any, ...]
    ) -> Tensor:
        y: Tensor
        heads = cache.shape[0]
        head_size = bias.numel() // (3 * heads)
        if fuse_qkv and torch.ops.gptbatch.runs_by_head(heads, head_size):
            y = torch.ops.gptbatch.qkv_paged_attention(x, qkv, bias, cache, *call)
            return y
        projected = product(x, qkv, bias, None, "none").view(len(x), heads, 3, head_size)
        y = torch.ops.gptbatch.paged_attention(projected.transpose(1, 2), cache, *call)
        return y

    def run(
        self: FusedBlocks, x: Tensor, attention: PagedAttention, logits_indices: Tensor | None
    ) -> Tensor:
        cache = attention.cache
        for index, (layer, scale) in enumerate(zip(self.layers, self.scales, strict=True)):
            count = len(self.weights) // len(self.layers)
            n1, b1, qkv, qkv_b, out, out_b, n2, b2, w_in, in_b, w_out, w_out_b = self.weights[
                index * count : (index + 1) * count
            ]
            call = (cache.block_table, attention.seq_indices, attention.positions, scale)
            normed = norm(x, n1, b1, self.epsilon)
            attended = attend(normed, qkv, qkv_b, cache.layers[layer], call)
            if logits_indices is not None and index == len(self.layers) - 1:
                x, attended = x[logits_indices], attended[logits_indices]
            x = product(attended, out, out_b, x, "none")
            inner = product(norm(x, n2, b2, self.epsilon), w_in, in_b, None, self.activation)
            x = product(inner, w_out, w_out_b, x, "none")
        return x

    def patch() -> None:
        FusedBlocks.__call__ = run  # type: ignore[method-assign]  # a patch
        if not native_norm:
            # A patch of the norms outside of fused blocks.
            Norm.forward = torch.nn.LayerNorm.forward  # type: ignore[method-assign, assignment]

    return patch


def has_fused_blocks(model: GPT) -> bool:
    """Return whether all blocks run in one kernel call."""
    return model.blocks.fused is not None


def has_fused_qkv(model: GPT) -> bool:
    """Return whether the kernel fuses projection and attention of this model."""
    config = model.config
    return has_fused_blocks(model) and bool(
        torch.ops.gptbatch.runs_by_head(config.n_head, config.head_size)
    )


def has_two_pass_head(model: GPT) -> bool:
    """Return whether the head runs in two passes."""
    return model.two_pass_head is not None


ONE_BY_ONE = "blocks one by one"
VARIANTS = {
    "all on": Variant(label="all on"),
    "nothing": Variant(label="nothing (the noise of the measurement)"),
    "linears": Variant(
        label="C++ linears, against oneDNN's (and blocks one by one)",
        patch=use_onednn_linears,
        adapt=restore_two_pass_head,
    ),
    ONE_BY_ONE: Variant(
        label="all blocks in one kernel call", patch=run_one_by_one(), applies=has_fused_blocks
    ),
    "qkv": Variant(
        label="QKV projection and attention in one kernel",
        baseline=ONE_BY_ONE,
        patch=run_one_by_one(fuse_qkv=False),
        applies=has_fused_qkv,
    ),
    "norm": Variant(
        label="layer norm kernel, against torch's",
        baseline=ONE_BY_ONE,
        patch=run_one_by_one(native_norm=False),
    ),
    "huge pages": Variant(label="weights on huge pages", patch=leave_weights_on_small_pages),
    "prefetch": Variant(label="software prefetch", patch=build_without_prefetch),
    "two-pass": Variant(
        label="two-pass LM head", adapt=drop_two_pass_head, applies=has_two_pass_head
    ),
    "last block": Variant(
        label="last block only for tokens that need logits", patch=compute_all_of_the_last_block
    ),
    "sampler": Variant(label="sampling kernel, against torch", patch=sample_with_torch),
    "int8": Variant(label="int8 KV cache (off by default)", cache_dtype="int8", is_extra=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a worker runs: the first rows of a workload, cut to max_new_tokens."""

    config: GPTConfig
    dtype: str
    rows: int
    max_new_tokens: int
    threads: int


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


def measure(
    names: list[str], work: Work, workloads: list[str], repeats: int
) -> list[dict[str, Any]]:
    """Run all variants in turn; return a result per workload and variant."""
    pairs: dict[str, list[Pair]] = {workload: [] for workload in workloads}
    applies: dict[str, bool] = {}
    for repeat in range(repeats):
        is_odd = repeat % 2 == 1
        # The order of the processes decides where their memory lies.
        with started(names[::-1] if is_odd else names, work) as (connections, found):
            applies |= found
            for workload, done in pairs.items():
                # Other prompts for every pair, so that no run finds those of an earlier one cached.
                done += [
                    run_pair(name, work.dtype, workload, turn, connections, swap=is_odd)
                    for turn, name in enumerate(names[1:], len(done))
                ]
    return [
        summarize(name, work.dtype, workload, done) | {"applies": applies[name]}
        for workload, done in pairs.items()
        for name in names
    ]


@contextmanager
def started(
    names: list[str], work: Work
) -> Iterator[tuple[dict[str, Connection], dict[str, bool]]]:
    """Start a process per variant; yield its connection, and whether the optimization is used."""
    context = multiprocessing.get_context("spawn")
    connections: dict[str, Connection] = {}
    applies: dict[str, bool] = {}
    processes = []
    try:
        for name in names:
            connections[name], other = context.Pipe()
            process = context.Process(target=serve, args=(name, work, other), daemon=True)
            process.start()
            other.close()
            processes.append(process)
            # One after the other, so that only one loads at a time.
            applies[name] = connections[name].recv()
        yield connections, applies
    finally:
        for process in processes:
            process.terminate()
            process.join()


def serve(name: str, work: Work, connection: Connection) -> None:
    """Run in a worker: load the variant, then run a workload per request."""
    torch.set_num_threads(work.threads)
    variant = VARIANTS[name]
    variant.patch()
    select_backend("ragged", CPU)
    model = random_model(
        work.config,
        dtype=getattr(torch, work.dtype),
        device=CPU,
        backend=RAGGED,
        cache_dtype=variant.cache_dtype,
    )
    applies = variant.applies(model)
    variant.adapt(model)
    run(model, work, "uniform", 0, WARM_UP_TOKENS)
    connection.send(applies)
    while True:
        workload, repeat = connection.recv()
        connection.send(run(model, work, workload, repeat + 1, work.max_new_tokens))


def run(model: GPT, work: Work, name: str, repeat: int, max_new_tokens: int) -> tuple[float, str]:
    """Return new tokens per second, and a hash of all tokens."""
    config = work.config
    engine = Engine(model=model, batch_size=MAX_SEQS, eos_token_ids=())
    workload = make_workload(
        name, vocab_size=config.vocab_size, n_positions=config.n_positions
    ).first(work.rows)
    prompts = workload.prompts(
        repeat,
        vocab_size=config.vocab_size,
        max_new_tokens=max_new_tokens,
        read_s=time.monotonic(),
    )
    take_memory(engine, workload, max_new_tokens)
    began = time.perf_counter()
    completions = [done for finished in engine.generate(prompts) for done in finished]
    seconds = time.perf_counter() - began
    tokens = {done.prompt.index: done.token_ids for done in completions}
    digest = hashlib.sha256(json.dumps(tokens, sort_keys=True).encode()).hexdigest()
    return sum(map(len, tokens.values())) / seconds, digest


@torch.inference_mode()
def take_memory(engine: Engine, workload: Workload, max_new_tokens: int) -> None:
    """Write the blocks of the cache that the rows take, or more where they share them."""
    cache = engine._cache
    assert isinstance(cache, PagedKVCache)
    block_size = cache.pool.block_size
    rows = workload.rows
    n_blocks = sum(blocks_for(len(row.token_ids) + max_new_tokens, block_size) for row in rows)
    for layer in cache.layers:
        layer[:, :n_blocks] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One run of a variant, and one of its baseline beside it."""

    name: str
    baseline_rate: float
    rate: float
    same_tokens: bool


def run_pair(
    name: str,
    dtype: str,
    workload: str,
    turn: int,
    connections: dict[str, Connection],
    *,
    swap: bool,
) -> Pair:
    """Run the prompts of a turn by a baseline and its variant, the variant first if `swap`."""
    baseline = VARIANTS[name].baseline
    found: dict[str, tuple[float, str]] = {}
    for which in (name, baseline) if swap else (baseline, name):
        connections[which].send((workload, turn))
        found[which] = connections[which].recv()
    (baseline_rate, baseline_digest), (rate, digest) = found[baseline], found[name]
    print(
        f"{dtype}, {workload}, turn {turn}: {baseline} {baseline_rate:.1f}, {name} {rate:.1f}",
        flush=True,
    )
    return Pair(
        name=name,
        baseline_rate=baseline_rate,
        rate=rate,
        same_tokens=baseline_digest == digest,
    )


def summarize(name: str, dtype: str, workload: str, pairs: list[Pair]) -> dict[str, Any]:
    """Compare a variant with its baseline; of "all on", list the rates of all pairs."""
    variant = VARIANTS[name]
    if name == "all on":
        rates = [pair.baseline_rate for pair in pairs if VARIANTS[pair.name].baseline == name]
        return {
            "dtype": dtype,
            "workload": workload,
            "variant": name,
            "tokens_per_s": [round(rate, 1) for rate in rates],
        }
    pairs = [pair for pair in pairs if pair.name == name]
    ratios = [pair.baseline_rate / pair.rate for pair in pairs]
    if variant.is_extra:
        ratios = [1 / ratio for ratio in ratios]
    return {
        "dtype": dtype,
        "workload": workload,
        "variant": name,
        "label": variant.label,
        "baseline": variant.baseline,
        "tokens_per_s": [round(pair.rate, 1) for pair in pairs],
        "ratios": [round(ratio, 3) for ratio in ratios],
        "speed_up": round(statistics.median(ratios), 3),
        "same_tokens": all(pair.same_tokens for pair in pairs),
    }


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
