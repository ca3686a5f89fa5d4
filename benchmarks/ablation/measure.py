"""Runs variants beside what they are compared with, in processes of their own."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.ablation.variants import VARIANTS
from gptbatch.pipeline.bench.random_model import random_model
from gptbatch.pipeline.bench.workloads import Workload, make_workload
from gptbatch.pipeline.engine.engine import Engine
from gptbatch.pipeline.kv_cache.block_pool import blocks_for
from gptbatch.pipeline.kv_cache.interface import select_backend
from gptbatch.pipeline.kv_cache.paged import PagedKVCache
from gptbatch.pipeline.kv_cache.spec import RAGGED
from gptbatch.pipeline.model.config import GPTConfig
from gptbatch.pipeline.model.gpt import GPT

CPU = torch.device("cpu")
MAX_SEQS = 64
WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a worker runs: the first rows of a workload, cut to max_new_tokens."""

    config: GPTConfig
    dtype: str
    rows: int
    max_new_tokens: int
    threads: int


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
