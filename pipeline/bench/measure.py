"""How fast the engine is on a workload, where the time goes, and how near that is to what the machine can do.

The ceiling is what the workload would take if its matrix products ran at the best rate seen on this machine and each decoding
row's keys and values came from memory at the best rate seen, one after the other, and nothing else took time. (On a CPU keys and
values are read while the projection is multiplied, so that where they are many, a little more than the ceiling can be reached.)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from gptbatch.pipeline.bench.workloads import TOP_K, Workload
from gptbatch.pipeline.engine.engine import Engine, EngineStats
from gptbatch.pipeline.model.gpt import GPT, Block
from gptbatch.pipeline.model.linear import Linear
from gptbatch.pipeline.model.lm_head import HEAD_EVENT, MAX_HEAD_ROWS

WARM_UP_TOKENS = 4
GEMM_ROWS = (64, 128, 256)
PARTS = {  # of a step, by the names of torch's operators
    "linears": (
        "gptbatch::linear",
        "gptbatch::linear_float32_out",
        "gptbatch::rescore",
        "mkldnn::_linear_pointwise",
        "aten::addmm",
        "aten::mm",
    ),
    "attention": (
        "gptbatch::paged_attention",
        "gptbatch::qkv_paged_attention",
        "aten::bmm",
        "aten::_softmax",
    ),
    "sampling": ("gptbatch::sample", "aten::topk", "aten::sort"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The best rates seen: of a linear of the network, of the head (the same, unless a two_pass_head computes it), and of reading memory."""

    gemm_gflops: float
    head_gflops: float
    read_gb_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What was measured. Rates are medians over the repeats, of the wall time; shares are of the tokens or of the time.

    seconds_by_part: of one repeat more, under a profiler: prefill and decode share each step by its tokens; linears, attention (with
    the projection to queries, keys and values, where both are one kernel), head, sampling and other are of the network, waiting is the
    rest, in which no operator ran; between two kernels of the blocks it is other. On a GPU prefill and decode only.
    """

    tokens_per_s: float
    repeats_tokens_per_s: list[float]
    prompt_tokens_per_s: float
    padding_share: float
    prefix_share: float
    tokens_per_step: float
    seconds_by_part: dict[str, float]
    limits: Limits
    ceiling_tokens_per_s: float
    ceiling_share: float


def measure(
    engine: Engine,
    workload: Workload,
    *,
    repeats: int,
    top_k: int = TOP_K,
    said: Callable[[str], None],
) -> Measurement:
    """Run the workload `repeats` times after a warm-up. said: is told of each repeat."""
    vocab_size = engine.model.config.vocab_size

    def run(repeat: int, most_new_tokens: int | None = None) -> float:
        engine.stats = EngineStats()
        began = time.perf_counter()
        rows = workload.prompts(
            repeat,
            vocab_size=vocab_size,
            most_new_tokens=most_new_tokens,
            top_k=top_k,
            read_s=time.monotonic(),
        )
        for _ in engine.generate(rows):
            pass
        return time.perf_counter() - began

    run(0, WARM_UP_TOKENS)
    walls = []
    for repeat in range(1, repeats + 1):
        walls.append(run(repeat))
        said(f"repeat {repeat}: {workload.new_tokens / walls[-1]:.0f} new tokens/s")
    stats = engine.stats
    wall = statistics.median(walls)
    computed = stats.prefilled_tokens + stats.decoded_tokens
    limits = measure_limits(engine.model)
    ceiling_s = _ceiling_s(engine.model, workload, stats, limits)
    return Measurement(
        tokens_per_s=workload.new_tokens / wall,
        repeats_tokens_per_s=[workload.new_tokens / wall for wall in walls],
        prompt_tokens_per_s=workload.prompt_tokens / wall,
        padding_share=stats.padding_tokens / (computed + stats.padding_tokens),
        prefix_share=stats.cached_tokens / workload.prompt_tokens,
        tokens_per_step=computed / stats.steps,
        seconds_by_part=_seconds_by_part(engine, lambda: run(repeats + 1)),
        limits=limits,
        ceiling_tokens_per_s=workload.new_tokens / ceiling_s,
        ceiling_share=ceiling_s / wall,
    )


def _seconds_by_part(engine: Engine, run: Callable[[], float]) -> dict[str, float]:
    if engine.model.device.type != "cpu":  # what runs on the device is not seen from here
        run()
        return {"prefill": engine.stats.prefill_s, "decode": engine.stats.decode_s}
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        wall = run()
    seconds = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
    head = sum(
        event.cpu_time_total / 1e6 for event in profiler.key_averages() if event.key == HEAD_EVENT
    )
    parts = {part: sum(seconds.get(name, 0.0) for name in names) for part, names in PARTS.items()}
    busy = sum(seconds.values())
    parts["linears"] -= head
    parts["head"] = head
    parts["other"] = busy - sum(parts.values())
    parts["waiting"] = wall - busy
    return {"prefill": engine.stats.prefill_s, "decode": engine.stats.decode_s, **parts}


def measure_limits(model: GPT) -> Limits:
    """The best of some tries: neighbours on a shared machine can only make it slower."""
    block = model.blocks[0]
    assert isinstance(block, Block)
    best = 0.0
    with torch.inference_mode():
        for rows in GEMM_ROWS:
            for linear in (block.attn_qkv, block.mlp_in, block.mlp_out):
                x = torch.randn(rows, linear.in_features, dtype=model.dtype, device=model.device)
                seconds = min(_time(lambda linear=linear, x=x: linear(x)) for _ in range(20))  # type: ignore[misc]
                best = max(
                    best, 2 * rows * linear.in_features * linear.out_features / seconds / 1e9
                )
        head = best
        if (
            (two_pass_head := model.two_pass_head) is not None
            and two_pass_head.n_rows
            and two_pass_head.is_worthwhile
        ):
            hidden = torch.randn(MAX_HEAD_ROWS, model.config.n_embd)
            seconds = min(
                _time(lambda: two_pass_head.approximate_logits(hidden)) for _ in range(20)
            )
            head = (
                2
                * len(hidden)
                * model.lm_head.in_features
                * model.lm_head.out_features
                / seconds
                / 1e9
            )
    return Limits(gemm_gflops=best, head_gflops=head, read_gb_per_s=measure_reading(model.device))


def measure_reading(device: torch.device) -> float:
    """Gigabytes that come from memory in a second, the best of some tries."""
    numbers = torch.zeros(2**28, dtype=torch.float32, device=device)  # a gigabyte
    return numbers.nbytes / min(_time(numbers.sum) for _ in range(5)) / 1e9


def _time(call: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _ceiling_s(model: GPT, workload: Workload, stats: EngineStats, limits: Limits) -> float:
    last = model.blocks[-1]
    assert isinstance(last, Block)
    weights, qkv, of_last = (
        sum(
            module.in_features * module.out_features
            for module in part.modules()
            if isinstance(module, Linear)
        )
        for part in (model.blocks, last.attn_qkv, last)
    )
    head = model.lm_head.in_features * model.lm_head.out_features
    tokens = stats.prefilled_tokens + stats.decoded_tokens
    # after its attention the last block computes those alone that a new token follows
    products_s = (
        2
        * (weights * tokens - (of_last - qkv) * (tokens - stats.new_tokens))
        / (limits.gemm_gflops * 1e9)
    )
    products_s += 2 * head * stats.new_tokens / (limits.head_gflops * 1e9)
    # a prefix that rows share is read once for all of them, which is next to nothing
    reused = stats.cached_tokens / len(workload.rows)
    positions = sum(
        (row.new_tokens - 1) * (len(row.token_ids) - reused + row.new_tokens / 2)
        for row in workload.rows
    )
    return products_s + positions * model.cache_spec.bytes_per_token / (limits.read_gb_per_s * 1e9)
