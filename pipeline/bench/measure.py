"""Measure the engine on a workload: rates, where the time goes, and the ceiling of this machine.

The ceiling, as in a roofline model, is the rate if only two things took time, one after the other:
the matrix products at the best GEMM rate seen here, and the keys and values of decoding rows at the
best read bandwidth seen here. With long contexts a CPU may exceed it a little, because the kernel
reads keys and values while it multiplies.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.profiler

from gptbatch.pipeline.bench.workloads import TOP_K, Workload
from gptbatch.pipeline.engine.engine import Engine, EngineStats
from gptbatch.pipeline.model.gpt import GPT, Block
from gptbatch.pipeline.model.linear import Linear
from gptbatch.pipeline.model.lm_head import HEAD_EVENT, MAX_HEAD_ROWS

WARM_UP_TOKENS = 4
GEMM_ROWS = (64, 128, 256)
GEMM_TRIES, READ_TRIES = 20, 5
# Float32 elements read: a gigabyte, far beyond any cache.
ELEMENTS_READ = 2**28
# Parts of a step, by the names of torch's operators.
PARTS = {
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
class CeilingRates:
    """The best rates seen on this machine, from which the ceiling follows.

    Attributes:
        gemm_gflops: Of the blocks' linears.
        head_gflops: Of the head: the same unless it runs in two passes.
        read_gb_per_s: Of reading memory.
    """

    gemm_gflops: float
    head_gflops: float
    read_gb_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Results of `measure`. Rates are medians over the repeats, of wall time.

    Attributes:
        tokens_per_s: New tokens per second.
        repeats_tokens_per_s: The same of each repeat.
        prompt_tokens_per_s: Prompt tokens per second of the whole workload.
        padding_share: Padding rows among all rows of the forward passes.
        prefix_share: Prompt tokens taken from the prefix cache.
        tokens_per_step: Mean tokens per step.
        seconds_by_operation: Seconds of one more repeat, under torch.profiler. prefill and decode
            divide each step by its tokens. linears, attention (with the QKV projection where one
            kernel computes both), head, sampling and other are the model's operators. waiting is
            time outside of operators. On a GPU only prefill and decode.
        ceiling_rates: Best rates of this machine.
        ceiling_tokens_per_s: See the module's description.
        ceiling_share: tokens_per_s / ceiling_tokens_per_s.
    """

    tokens_per_s: float
    repeats_tokens_per_s: list[float]
    prompt_tokens_per_s: float
    padding_share: float
    prefix_share: float
    tokens_per_step: float
    seconds_by_operation: dict[str, float]
    ceiling_rates: CeilingRates
    ceiling_tokens_per_s: float
    ceiling_share: float


def measure(
    engine: Engine,
    workload: Workload,
    *,
    repeats: int,
    top_k: int = TOP_K,
    report: Callable[[str], None],
) -> Measurement:
    """Run the workload after a warm-up.

    Args:
        engine: Runs the workload; its stats are reset.
        workload: What to generate.
        repeats: Timed runs.
        top_k: Sampling parameter of all rows.
        report: Receives a line per repeat.
    """
    vocab_size = engine.model.config.vocab_size

    def run(repeat: int, max_new_tokens: int | None = None) -> float:
        engine.stats = EngineStats()
        began = time.perf_counter()
        rows = workload.prompts(
            repeat,
            vocab_size=vocab_size,
            max_new_tokens=max_new_tokens,
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
        report(f"repeat {repeat}: {workload.new_tokens / walls[-1]:.0f} new tokens/s")
    stats = engine.stats
    wall = statistics.median(walls)
    computed = stats.prefilled_tokens + stats.decoded_tokens
    ceiling_rates = measure_ceiling_rates(engine.model)
    ceiling_s = _ceiling_s(engine.model, workload, stats, ceiling_rates)
    return Measurement(
        tokens_per_s=workload.new_tokens / wall,
        repeats_tokens_per_s=[workload.new_tokens / wall for wall in walls],
        prompt_tokens_per_s=workload.prompt_tokens / wall,
        padding_share=stats.padding_tokens / (computed + stats.padding_tokens),
        prefix_share=stats.cached_tokens / workload.prompt_tokens,
        tokens_per_step=computed / stats.steps,
        seconds_by_operation=_seconds_by_operation(engine, lambda: run(repeats + 1)),
        ceiling_rates=ceiling_rates,
        ceiling_tokens_per_s=workload.new_tokens / ceiling_s,
        ceiling_share=ceiling_s / wall,
    )


def measure_ceiling_rates(model: GPT) -> CeilingRates:
    """Return the best rates of many tries: load on the machine can only lower them."""
    block = model.blocks[0]
    assert isinstance(block, Block)
    with torch.inference_mode():
        gemm_gflops = max(
            _gemm_gflops(linear, rows, model)
            for rows in GEMM_ROWS
            for linear in (block.attn_qkv, block.mlp_in, block.mlp_out)
        )
        head_gflops = _two_pass_gflops(model) or gemm_gflops
    return CeilingRates(
        gemm_gflops=gemm_gflops,
        head_gflops=head_gflops,
        read_gb_per_s=measure_reading(model.device),
    )


def measure_reading(device: torch.device, *, n_elements: int = ELEMENTS_READ) -> float:
    """Return the best rate of reading memory, in GB per second, from float32 elements."""
    elements = torch.zeros(n_elements, dtype=torch.float32, device=device)
    return elements.nbytes / min(_time(elements.sum) for _ in range(READ_TRIES)) / 1e9


def _seconds_by_operation(engine: Engine, run: Callable[[], float]) -> dict[str, float]:
    if engine.model.device.type != "cpu":
        # torch.profiler measures CPU operators here, not the device's kernels.
        run()
        return {"prefill": engine.stats.prefill_s, "decode": engine.stats.decode_s}
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        wall = run()
    events = profiler.key_averages()
    seconds = {event.key: event.self_cpu_time_total / 1e6 for event in events}
    head = sum(event.cpu_time_total / 1e6 for event in events if event.key == HEAD_EVENT)
    parts = {part: sum(seconds.get(name, 0.0) for name in names) for part, names in PARTS.items()}
    busy = sum(seconds.values())
    parts["linears"] -= head
    parts["head"] = head
    parts["other"] = busy - sum(parts.values())
    parts["waiting"] = wall - busy
    return {"prefill": engine.stats.prefill_s, "decode": engine.stats.decode_s, **parts}


def _gemm_gflops(linear: Linear, rows: int, model: GPT) -> float:
    x = torch.randn(rows, linear.in_features, dtype=model.dtype, device=model.device)
    seconds = min(_time(lambda: linear(x)) for _ in range(GEMM_TRIES))
    return 2 * rows * linear.in_features * linear.out_features / seconds / 1e9


def _two_pass_gflops(model: GPT) -> float | None:
    """Return the rate of the head's first pass; None where the head runs in one pass."""
    two_pass_head, head = model.two_pass_head, model.lm_head
    if two_pass_head is None or not two_pass_head.n_rows or not two_pass_head.is_worthwhile:
        return None
    hidden = torch.randn(MAX_HEAD_ROWS, model.config.n_embd)
    seconds = min(
        _time(lambda: two_pass_head.approximate_logits(hidden)) for _ in range(GEMM_TRIES)
    )
    return 2 * len(hidden) * head.in_features * head.out_features / seconds / 1e9


def _time(call: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _ceiling_s(
    model: GPT, workload: Workload, stats: EngineStats, ceiling_rates: CeilingRates
) -> float:
    last = model.blocks[-1]
    assert isinstance(last, Block)
    all_weights, qkv_weights, last_weights = (
        sum(
            module.in_features * module.out_features
            for module in part.modules()
            if isinstance(module, Linear)
        )
        for part in (model.blocks, last.attn_qkv, last)
    )
    head_weights = model.lm_head.in_features * model.lm_head.out_features
    tokens = stats.prefilled_tokens + stats.decoded_tokens
    # After its attention, the last block computes only the tokens whose logits are needed.
    pruned = (last_weights - qkv_weights) * (tokens - stats.new_tokens)
    gemm_s = 2 * (all_weights * tokens - pruned) / (ceiling_rates.gemm_gflops * 1e9)
    head_s = 2 * head_weights * stats.new_tokens / (ceiling_rates.head_gflops * 1e9)
    # A shared prefix is read once for all rows, which is negligible.
    reused = stats.cached_tokens / len(workload.rows)
    positions = sum(
        (row.new_tokens - 1) * (len(row.token_ids) - reused + row.new_tokens / 2)
        for row in workload.rows
    )
    read_s = positions * model.cache_spec.bytes_per_token / (ceiling_rates.read_gb_per_s * 1e9)
    return gemm_s + head_s + read_s
