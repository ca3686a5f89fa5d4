"""Sections `engine`, `dependent-launch` and `transformers`: our engine; `generate` beside it."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import torch
import triton

from benchmarks.cuda.common import (
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
    run_part,
    synchronize,
)
from benchmarks.cuda.kernels import FILTERS
from gptbatch.pipeline.bench.random_model import random_model
from gptbatch.pipeline.engine.device_engine import DeviceEngine
from gptbatch.pipeline.engine.device_self_test import device_engine_problem
from gptbatch.pipeline.kernels.cuda import launch as launch_module
from gptbatch.pipeline.kv_cache.quantization import CacheDtype
from gptbatch.pipeline.kv_cache.spec import TRITON
from gptbatch.pipeline.model.self_test import select_batch_invariant_kernels
from gptbatch.pipeline.params.sampling_params import SamplingParams
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
CASES: tuple[tuple[str, CacheDtype], ...] = (
    ("bfloat16", "auto"),
    ("float32", "auto"),
    ("bfloat16", "int8"),
    ("float32", "int8"),
)


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


def engine() -> None:
    """Measure the engine of the device on GPT-2 124M with random weights; compare its bits."""
    found: dict[str, Any] = {"problems": []}
    for name, cache_dtype in CASES:
        key = f"{name} cache {cache_dtype}"
        began = time.monotonic()
        model = random_model(
            CONFIG,
            dtype=DTYPES[name],
            device=torch.device(DEVICE),
            backend=TRITON,
            cache_dtype=cache_dtype,
        )
        # They take a minute on a fake device.
        failures = () if IS_FAKE else select_batch_invariant_kernels(model).failures
        problem = "" if IS_FAKE else device_engine_problem(model)
        found["problems"] += [*failures, *filter(None, [problem])]
        found[f"{key}: self-tests"] = {
            "failures": failures,
            "device engine": problem,
            "seconds": round(time.monotonic() - began, 1),
        }
        report(found)
        results: dict[int, list[tuple[list[int], float | None]]] = {}
        for rows in ROW_COUNTS:
            device_engine = DeviceEngine(model=model, batch_size=rows, eos_token_ids=())
            # Compiles, captures, and then replays.
            times = []
            for _ in range(2 if IS_FAKE else 4):
                ended, seconds = run(device_engine, prompts(rows))
                times.append(seconds)
            results[rows] = [(done.token_ids, done.min_decision_margin) for done in ended]
            found[f"{key}, {rows} rows"] = {
                "tokens_per_s": round(rows * NEW_TOKENS / min(times)),
                "first_s": round(times[0], 2),
                "step_us": round(min(times) / NEW_TOKENS * 1e6),
            }
            report(found)
            if not IS_FAKE:
                found[f"{key}, {rows} rows"]["kernels_us"] = profile(device_engine, rows)
            if rows == ROW_COUNTS[-1] and cache_dtype == "auto" and not IS_FAKE:
                many = prompts(4 * rows, ragged=True)
                _, seconds = run(device_engine, many)
                total = sum(each.prompt.params.max_new_tokens for each in many)
                found[f"{key}, {4 * rows} ragged rows, {rows} at once: tokens/s"] = round(
                    total / seconds
                )
                report(found)
                for settings in FILTERS:
                    rates, is_equal = filter_rates(device_engine, rows, settings)
                    found[f"{key}, {rows} rows, {settings}"] = rates
                    found[f"{key}, {settings}: bits equal at two row counts"] = is_equal
            report(found)
            del device_engine
            torch.cuda.empty_cache()
        most = results[ROW_COUNTS[-1]]
        found[f"{key}: bits equal at all row counts"] = all(
            results[rows] == most[:rows] for rows in ROW_COUNTS
        )
        report(found)
        del model
        torch.cuda.empty_cache()


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


def profile(device_engine: DeviceEngine, rows: int) -> dict[str, float]:
    """Return microseconds per step by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    steps = device_engine.stats.steps
    with torch_profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run(device_engine, prompts(rows))
    steps = device_engine.stats.steps - steps
    return {
        event.key: round(event.device_time_total / steps, 1)
        for event in profiler.key_averages()
        if event.device_time_total / steps > 0.5
    }


def dependent_launch() -> None:
    """Compare steps with and without dependent launch: microseconds, tokens and margins."""
    parts = [run_part(f"dependent-one:{flag}") for flag in (0, 1)]
    found: dict[str, Any] = {}
    for key in parts[0]:
        values = [part[key] for part in parts]
        if "us" in key:
            found[f"{key}: plain, dependent"] = values
        else:
            found[f"{key} equal"] = values[0] == values[1]
    report(found)


def dependent_one(is_dependent: int) -> None:
    """Measure steps in bfloat16, all kernels dependent or none."""
    launch_module.DEPENDENT_LAUNCH = triton.language.constexpr(bool(is_dependent))
    model = random_model(
        CONFIG, dtype=DTYPES["bfloat16"], device=torch.device(DEVICE), backend=TRITON
    )
    found: dict[str, Any] = {}
    for rows in (ROW_COUNTS[0], ROW_COUNTS[-1]):
        device_engine = DeviceEngine(model=model, batch_size=rows, eos_token_ids=())
        runs = [run(device_engine, prompts(rows)) for _ in range(2 if IS_FAKE else 4)]
        seconds = min(seconds for _, seconds in runs)
        found[f"{rows} rows, step_us"] = round(seconds / NEW_TOKENS * 1e6)
        outcome = [(done.token_ids, done.min_decision_margin) for done in runs[-1][0]]
        found[f"{rows} rows, bits"] = hashlib.sha256(repr(outcome).encode()).hexdigest()
    report(found)


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
