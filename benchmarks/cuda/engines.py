"""Sections `engine` and `transformers`: new tokens/s of our engine, and of `generate` beside it."""

from __future__ import annotations

import functools
import gc
import time
from collections import Counter
from collections.abc import Hashable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.cuda.cases import FILTERS
from benchmarks.cuda.common import (
    CASES,
    CONFIG,
    DEVICE,
    DTYPES,
    INNER,
    IS_FAKE,
    LAYERS,
    POSITIONS,
    ROW_COUNTS,
    VOCAB,
    C,
    H,
    report,
    synchronize,
)
from benchmarks.cuda.parts import Case, Found, run_cases
from gptbatch.pipeline.bench.random_model import random_model
from gptbatch.pipeline.engine import streams
from gptbatch.pipeline.engine.device_engine import DeviceEngine
from gptbatch.pipeline.engine.device_self_test import device_engine_problem
from gptbatch.pipeline.engine.engine import EngineStats
from gptbatch.pipeline.kv_cache.quantization import CacheDtype
from gptbatch.pipeline.kv_cache.spec import TRITON
from gptbatch.pipeline.model.compiling import compile_kernels
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.self_test import select_batch_invariant_kernels
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.types import Completion, Prompt, TokenizedPrompt

PROMPT_TOKENS, NEW_TOKENS = (4, 8) if IS_FAKE else (32, 128)
# The beginning that rows of `shared_prompts` have in common.
PREFIX_TOKENS = 128 if IS_FAKE else 384
THEIR_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_positions": POSITIONS,
    "n_embd": C,
    "n_inner": INNER,
    "n_layer": LAYERS,
    "n_head": H,
}
# The longest row of `prompts`: the caches hold as many tokens of each.
MAX_TOKENS = 2 * (PROMPT_TOKENS + NEW_TOKENS)
# The most seconds of a case.
LIMIT = 40

Run = tuple[str, CacheDtype]
# Tokens and the decision margin of a row.
Bits = tuple[list[int], float | None]
# The run whose filters are measured: bfloat16 with int8.
FILTERS_RUN = CASES[2]
# Of the row counts so far, by run: what `bits_of` returns.
_results: dict[Run, dict[int, list[Bits]]] = {}


def prompts(rows: int, ragged: bool = False, **settings: Any) -> list[TokenizedPrompt]:
    """Return random prompts: 32 + 128 tokens, or 1 to 64 + 1 to 256; top_k 40 without settings."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (rows, 2 * PROMPT_TOKENS), generator=generator).tolist()
    lengths = torch.randint(1, 2 * PROMPT_TOKENS + 1, (rows,), generator=generator).tolist()
    budgets = torch.randint(1, 2 * NEW_TOKENS + 1, (rows,), generator=generator).tolist()
    made = []
    for index in range(rows):
        length, budget = (lengths[index], budgets[index]) if ragged else (PROMPT_TOKENS, NEW_TOKENS)
        chosen = {"top_k": 0, **settings} if settings else {"top_k": 40}
        params = SamplingParams(seed=index, temperature=0.8, max_new_tokens=budget, **chosen)
        prompt = Prompt(index=index, prompt_id=str(index), text="", params=params, metadata=None)
        made.append(
            TokenizedPrompt(
                prompt=prompt, token_ids=tokens[index][:length], tokens_dropped=0, read_s=0.0
            )
        )
    return made


def shared_prompts(rows: int, seed: int) -> list[TokenizedPrompt]:
    """Return equal rows, all after the same prefix, which follows from the seed."""
    generator = torch.Generator().manual_seed(seed)
    prefix = torch.randint(VOCAB, (PREFIX_TOKENS,), generator=generator).tolist()
    return [replace(each, token_ids=prefix + each.token_ids) for each in prompts(rows)]


def generate(engine: DeviceEngine, rows: list[TokenizedPrompt]) -> tuple[list[Completion], float]:
    """Return the completions in order, and the seconds."""
    synchronize()
    began = time.monotonic()
    ended = [done for some in engine.generate(iter(rows)) for done in some]
    synchronize()
    seconds = time.monotonic() - began
    return sorted(ended, key=lambda done: done.prompt.index), seconds


class TimedStream(streams.CudaStream):
    """Counts the captures of CUDA graphs, which are the second work of each key, and their seconds.

    A fake device captures nothing.
    """

    def __init__(self) -> None:
        super().__init__(torch.device(DEVICE))
        self._calls: Counter[Hashable] = Counter()
        self.captures, self.capture_s = 0, 0.0

    def repeat(self, key: Hashable, work: streams.Work) -> None:
        """Run work; see `CudaStream`."""
        began = time.monotonic()
        super().repeat(key, work)
        self._calls[key] += 1
        if self._calls[key] == 2:
            self.captures += 1
            self.capture_s += time.monotonic() - began

    def reset(self) -> None:
        """Forget all keys; see `CudaStream`."""
        super().reset()
        self._calls.clear()


def engine(first: int = 0) -> None:
    """Measure the engine of the device on GPT-2 124M with random weights; compare its bits.

    The rates of all runs come first. Profiles come last: they slow down the steps that follow.
    """
    cases: dict[str, Case] = {}
    for run in CASES:
        for rows in ROW_COUNTS:
            cases[f"{key_of(run)}, {rows} rows"] = partial(note_rates, run, rows)
    # The others take a minute on a fake device, which has no profiles.
    if not IS_FAKE:
        cases |= {f"{key_of(run)}, ragged": partial(note_ragged, run) for run in CASES}
        cases |= {f"{key_of(run)}, shared prefix": partial(note_shared, run) for run in CASES}
        cases |= {f"{key_of(run)}, self-tests": partial(note_self_tests, run) for run in CASES}
        # The sampler is the same in all runs.
        for settings in FILTERS:
            name = f"{key_of(FILTERS_RUN)}, {settings}"
            cases[name] = partial(note_filter, FILTERS_RUN, settings)
        for run in CASES:
            for rows in (ROW_COUNTS[0], ROW_COUNTS[-1]):
                cases[f"{key_of(run)}, {rows} rows, kernels"] = partial(note_kernels, run, rows)
    run_cases(cases, first, LIMIT)


def key_of(run: Run) -> str:
    """Return how findings name a run."""
    name, cache_dtype = run
    return f"{name} cache {cache_dtype}"


@functools.cache
def model_of(run: Run) -> GPT:
    """Return a model of one dtype and cache, whose kernels are compiled."""
    name, cache_dtype = run
    model = random_model(
        CONFIG,
        dtype=DTYPES[name],
        device=torch.device(DEVICE),
        backend=TRITON,
        cache_dtype=cache_dtype,
    )
    if not IS_FAKE:
        compile_kernels(model)
    return model


def note_rates(run: Run, rows: int, found: Found) -> None:
    """Measure equal rows, and compare their bits with those of the row counts before."""
    key = key_of(run)
    device_engine, stream = new_engine(model_of(run), rows)
    results, rates = measure_rates(device_engine, rows)
    rates |= {"captures": stream.captures, "capture_s": round(stream.capture_s, 2)}
    found[f"{key}, {rows} rows"] = rates
    if rows > ROW_COUNTS[0] and run not in _results:
        found[f"{key}, {rows} rows: bits"] = "not compared: the cases before ran in another process"
    for fewer, expected in _results.setdefault(run, {}).items():
        found[f"{key}: bits equal at {fewer} and {rows} rows"] = results[:fewer] == expected
    _results[run][rows] = results


def note_ragged(run: Run, found: Found) -> None:
    """Measure rows of many lengths, twice the rows that run at once.

    A new shape of a step costs a capture, so the second time counts.
    """
    rows = 2 * ROW_COUNTS[-1]
    device_engine, stream = new_engine(model_of(run), ROW_COUNTS[-1])
    many = prompts(rows, ragged=True)
    total = sum(each.prompt.params.max_new_tokens for each in many)
    times: list[dict[str, int]] = []
    found[f"{key_of(run)}, {rows} ragged rows, half at once"] = times
    for _ in range(2):
        captures = stream.captures
        _, seconds = generate(device_engine, many)
        times.append(
            {"tokens_per_s": round(total / seconds), "captures": stream.captures - captures}
        )
        report(found)


def note_shared(run: Run, found: Found) -> None:
    """Measure rows with a shared prefix, another one each time, and compare bits of some of them.

    The second time replays what the first one captured.
    """
    few, rows = ROW_COUNTS[0], ROW_COUNTS[-1]
    key = f"{key_of(run)}, {rows} rows after the same {PREFIX_TOKENS} tokens"
    device_engine, _ = new_engine(model_of(run), rows)
    times: list[dict[str, int]] = []
    found[key] = times
    for seed in range(2):
        device_engine.stats = EngineStats()
        ended, seconds = generate(device_engine, shared_prompts(rows, seed))
        cached = device_engine.stats.cached_tokens
        times.append({"tokens_per_s": round(rows * NEW_TOKENS / seconds), "cached_tokens": cached})
        report(found)
    expected, _ = generate(new_engine(model_of(run), few)[0], shared_prompts(few, 1))
    found[f"{key}: bits equal at {few} rows"] = bits_of(ended[:few]) == bits_of(expected)


def note_self_tests(run: Run, found: Found) -> None:
    """Run the self-tests of a start."""
    key, model = key_of(run), model_of(run)
    began = time.monotonic()
    failures = select_batch_invariant_kernels(model).failures
    found[f"{key}: self-test, s"] = round(time.monotonic() - began, 1)
    found["problems"] += [f"{key}: {failure}" for failure in failures]
    report(found)
    began = time.monotonic()
    problem = device_engine_problem(model)
    found[f"{key}: self-test of the device engine, s"] = round(time.monotonic() - began, 1)
    if problem:
        found["problems"].append(f"{key}: {problem}")


def note_filter(run: Run, settings: dict[str, Any], found: Found) -> None:
    """Measure rows whose cutoff may lie anywhere in the vocabulary; compare with fewer rows."""
    few, rows = ROW_COUNTS[0], ROW_COUNTS[-1]
    device_engine, _ = new_engine(model_of(run), rows)
    expected, _ = generate(device_engine, prompts(few, **settings))
    runs = [generate(device_engine, prompts(rows, **settings)) for _ in range(3)]
    seconds = min(seconds for _, seconds in runs)
    found[f"{key_of(run)}, {rows} rows, {settings}"] = {
        "tokens_per_s": round(rows * NEW_TOKENS / seconds),
        "step_us": round(seconds / NEW_TOKENS * 1e6),
    }
    is_equal = bits_of(runs[-1][0][:few]) == bits_of(expected)
    found[f"{key_of(run)}, {settings}: bits equal at {few} and {rows} rows"] = is_equal


def note_kernels(run: Run, rows: int, found: Found) -> None:
    """Note microseconds per step by kernel, from a profile of replayed steps."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    device_engine, _ = new_engine(model_of(run), rows)
    # Captures.
    for _ in range(2):
        generate(device_engine, prompts(rows))
    steps = device_engine.stats.steps
    with torch_profile(activities=[ProfilerActivity.CUDA]) as profiler:
        generate(device_engine, prompts(rows))
    steps = device_engine.stats.steps - steps
    found[f"{key_of(run)}, {rows} rows, kernels_us"] = {
        event.key: round(event.device_time_total / steps, 1)
        for event in profiler.key_averages()
        if event.device_time_total / steps > 0.5
    }


def new_engine(model: GPT, rows: int) -> tuple[DeviceEngine, TimedStream]:
    """Return an engine whose cache holds this number of the longest rows, and its stream."""
    # The memory of the engine before.
    gc.collect()
    torch.cuda.empty_cache()
    spec, stream = model.cache_spec, TimedStream()
    memory = spec.capacity_for([MAX_TOKENS] * rows) * spec.bytes_per_token
    made = DeviceEngine(
        model=model, batch_size=rows, eos_token_ids=(), memory_bytes=memory, stream=stream
    )
    return made, stream


def measure_rates(device_engine: DeviceEngine, rows: int) -> tuple[list[Bits], dict[str, Any]]:
    """Return tokens and margins of equal rows, and their rates."""
    # Compiles, captures, and then replays.
    times = []
    for _ in range(2 if IS_FAKE else 4):
        ended, seconds = generate(device_engine, prompts(rows))
        times.append(seconds)
    rates = {
        "tokens_per_s": round(rows * NEW_TOKENS / min(times)),
        "step_us": round(min(times) / NEW_TOKENS * 1e6),
        "seconds": [round(each, 3) for each in times],
        "halvings": device_engine.stats.halvings,
    }
    return bits_of(ended), rates


def bits_of(completions: list[Completion]) -> list[Bits]:
    """Return tokens and margins."""
    return [(done.token_ids, done.min_decision_margin) for done in completions]


def transformers_rates() -> None:
    """Measure new tokens/s of transformers: generate, and generate_batch where it runs."""
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    found: dict[str, Any] = {}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**THEIR_SHAPE)).eval()
    settings = {
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 40,
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "pad_token_id": 0,
    }
    few, most = ROW_COUNTS[0], ROW_COUNTS[-1]
    for dtype, rows in (
        ("bfloat16", few),
        ("float32", few),
        ("bfloat16", most),
        ("float32", most),
        ("bfloat16", 4 * few),
    ):
        model = model.to(device=DEVICE, dtype=DTYPES[dtype])
        idx = torch.randint(VOCAB, (rows, PROMPT_TOKENS), device=DEVICE)
        try:
            times = []
            for repeat in range(3 if rows == few else 2):
                started = time.monotonic()
                with torch.inference_mode():
                    out = model.generate(
                        idx,
                        attention_mask=torch.ones_like(idx),
                        **{**settings, "eos_token_id": None},
                    )
                synchronize()
                times.append(time.monotonic() - started)
                del repeat
            assert out.shape == (rows, PROMPT_TOKENS + NEW_TOKENS)
            found[f"generate {dtype} {rows}"] = round(rows * NEW_TOKENS / min(times))
        except Exception as error:  # noqa: BLE001 - it is reported, and the rest goes on
            found[f"generate {dtype} {rows}"] = str(error)[:200]
        report(found)
    for dtype, rows in (("bfloat16", few), ("bfloat16", most))[: 1 if IS_FAKE else None]:
        try:
            batch = GPT2LMHeadModel(GPT2Config(**THEIR_SHAPE)).eval()
            batch = batch.to(device=DEVICE, dtype=DTYPES[dtype])
            inputs = torch.randint(VOCAB, (rows, PROMPT_TOKENS)).tolist()
            times = []
            for _ in range(1 if IS_FAKE else 2):
                started = time.monotonic()
                # It runs in a thread of its own, where inference mode is off.
                with torch.no_grad():
                    outputs = batch.generate_batch(
                        inputs=inputs,
                        generation_config=GenerationConfig(eos_token_id=-1, **settings),
                    )
                times.append(time.monotonic() - started)
            new = sum(len(output.generated_tokens) for output in outputs.values())
            found[f"generate_batch {dtype} {rows}"] = [round(new / min(times)), new]
        except Exception as error:  # noqa: BLE001 - it is reported, and the rest goes on
            found[f"generate_batch {dtype} {rows}"] = f"{type(error).__name__}: {error}"[:300]
        report(found)
