"""Sections `engine` and `transformers`: new tokens/s of our engine, and of `generate` beside it."""

from __future__ import annotations

import gc
import time
import traceback
from collections import Counter
from collections.abc import Hashable
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
from gptbatch.pipeline.bench.random_model import random_model
from gptbatch.pipeline.engine import streams
from gptbatch.pipeline.engine.device_engine import DeviceEngine
from gptbatch.pipeline.engine.device_self_test import device_engine_problem
from gptbatch.pipeline.kv_cache.quantization import CacheDtype
from gptbatch.pipeline.kv_cache.spec import TRITON
from gptbatch.pipeline.model.compiling import compile_kernels
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.self_test import select_batch_invariant_kernels
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.system.error_text import first_line
from gptbatch.pipeline.types import Completion, Prompt, TokenizedPrompt

PROMPT_TOKENS, NEW_TOKENS = (4, 8) if IS_FAKE else (32, 128)
THEIR_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_positions": POSITIONS,
    "n_embd": C,
    "n_inner": INNER,
    "n_layer": LAYERS,
    "n_head": H,
}
# The longest row of `prompts`: the caches hold so much for each.
MAX_TOKENS = 2 * (PROMPT_TOKENS + NEW_TOKENS)


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


def run(engine: DeviceEngine, rows: list[TokenizedPrompt]) -> tuple[list[Completion], float]:
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


def engine() -> None:
    """Measure the engine of the device on GPT-2 124M with random weights; compare its bits."""
    found: dict[str, Any] = {"problems": []}
    for name, cache_dtype in CASES:
        key = f"{name} cache {cache_dtype}"
        try:
            measure_case(found, key, name, cache_dtype)
        except Exception as error:  # noqa: BLE001 - it is reported, and the rest goes on
            traceback.print_exc()
            found["problems"].append(f"{key}: {type(error).__name__}: {first_line(error)}")
        report(found)
        # The memory of a case that failed, which its traceback held.
        gc.collect()
        torch.cuda.empty_cache()


def measure_case(found: dict[str, Any], key: str, name: str, cache_dtype: CacheDtype) -> None:
    """Run the self-tests and measure a model of one dtype and cache, at all row counts."""
    model = random_model(
        CONFIG,
        dtype=DTYPES[name],
        device=torch.device(DEVICE),
        backend=TRITON,
        cache_dtype=cache_dtype,
    )
    note_self_tests(found, key, model)
    results: dict[int, list[tuple[list[int], float | None]]] = {}
    for rows in ROW_COUNTS:
        device_engine, stream = new_engine(model, rows)
        results[rows], rates = measure_rates(device_engine, rows)
        rates |= {"captures": stream.captures, "capture_s": round(stream.capture_s, 2)}
        found[f"{key}, {rows} rows"] = rates
        report(found)
        if not IS_FAKE:
            rates["kernels_us"] = profile(device_engine, rows)
            report(found)
        if rows == ROW_COUNTS[-1] and not IS_FAKE:
            note_ragged(found, key, device_engine)
            # The sampler is the same in all cases.
            if (name, cache_dtype) == ("bfloat16", "int8"):
                note_filters(found, key, device_engine)
        del device_engine, stream
        torch.cuda.empty_cache()
    most = results[ROW_COUNTS[-1]]
    found[f"{key}: bits equal at all row counts"] = all(
        results[rows] == most[:rows] for rows in ROW_COUNTS
    )


def note_self_tests(found: dict[str, Any], key: str, model: GPT) -> None:
    """Compile the kernels, and run the self-tests of a start."""
    # They take a minute on a fake device.
    if IS_FAKE:
        return
    began = time.monotonic()
    n_compiled = compile_kernels(model)
    compiled_at = time.monotonic()
    failures = select_batch_invariant_kernels(model).failures
    problem = device_engine_problem(model)
    found["problems"] += [f"{key}: {each}" for each in (*failures, problem) if each]
    found[f"{key}: self-tests"] = {
        "compiled": n_compiled,
        "compile_s": round(compiled_at - began, 1),
        "failures": failures,
        "device engine": problem,
        "seconds": round(time.monotonic() - compiled_at, 1),
    }
    report(found)


def new_engine(model: GPT, rows: int) -> tuple[DeviceEngine, TimedStream]:
    """Return an engine whose cache holds this number of the longest rows, and its stream."""
    spec, stream = model.cache_spec, TimedStream()
    memory = spec.capacity_for([MAX_TOKENS] * rows) * spec.bytes_per_token
    made = DeviceEngine(
        model=model, batch_size=rows, eos_token_ids=(), memory_bytes=memory, stream=stream
    )
    return made, stream


def measure_rates(
    device_engine: DeviceEngine, rows: int
) -> tuple[list[tuple[list[int], float | None]], dict[str, Any]]:
    """Return tokens and margins of equal rows, and their rates."""
    # Compiles, captures, and then replays.
    times = []
    for _ in range(2 if IS_FAKE else 4):
        ended, seconds = run(device_engine, prompts(rows))
        times.append(seconds)
    rates = {
        "tokens_per_s": round(rows * NEW_TOKENS / min(times)),
        "step_us": round(min(times) / NEW_TOKENS * 1e6),
        "seconds": [round(each, 3) for each in times],
        "halvings": device_engine.stats.halvings,
    }
    return [(done.token_ids, done.min_decision_margin) for done in ended], rates


def note_ragged(found: dict[str, Any], key: str, device_engine: DeviceEngine) -> None:
    """Measure rows of many lengths, twice the rows that run at once."""
    rows = 2 * ROW_COUNTS[-1]
    many = prompts(rows, ragged=True)
    _, seconds = run(device_engine, many)
    total = sum(each.prompt.params.max_new_tokens for each in many)
    found[f"{key}, {rows} ragged rows, half at once: tokens/s"] = round(total / seconds)
    report(found)


def note_filters(found: dict[str, Any], key: str, device_engine: DeviceEngine) -> None:
    """Measure rows whose cutoff may lie anywhere in the vocabulary."""
    rows = ROW_COUNTS[-1]
    for settings in FILTERS:
        rates, is_equal = filter_rates(device_engine, rows, settings)
        found[f"{key}, {rows} rows, {settings}"] = rates
        found[f"{key}, {settings}: bits equal at two row counts"] = is_equal
        report(found)


def filter_rates(
    device_engine: DeviceEngine, rows: int, settings: dict[str, Any]
) -> tuple[dict[str, int], bool]:
    """Measure rows with a filter; compare their bits with those of fewer rows."""
    few = ROW_COUNTS[0]
    expected, _ = run(device_engine, prompts(few, **settings))
    runs = [run(device_engine, prompts(rows, **settings)) for _ in range(3)]
    seconds = min(seconds for _, seconds in runs)
    found = [(done.token_ids, done.min_decision_margin) for done in runs[-1][0][:few]]
    rates = {
        "tokens_per_s": round(rows * NEW_TOKENS / seconds),
        "step_us": round(seconds / NEW_TOKENS * 1e6),
    }
    return rates, found == [(done.token_ids, done.min_decision_margin) for done in expected]


def profile(device_engine: DeviceEngine, rows: int) -> dict[str, float] | str:
    """Return microseconds per step by kernel, or why there is no profile here."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    steps = device_engine.stats.steps
    try:
        with torch_profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run(device_engine, prompts(rows))
        steps = device_engine.stats.steps - steps
        return {
            event.key: round(event.device_time_total / steps, 1)
            for event in profiler.key_averages()
            if event.device_time_total / steps > 0.5
        }
    except Exception as error:  # noqa: BLE001 - it is reported, and the rest goes on
        return f"{type(error).__name__}: {first_line(error)}"


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
