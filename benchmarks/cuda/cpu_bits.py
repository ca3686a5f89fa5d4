"""Section `cpu-bits`: the engines of the device and of the host beside that of the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.cuda.cases import FILTERS, TOKEN_BYTES
from benchmarks.cuda.common import CONFIG, DEVICE, IS_FAKE, VOCAB, report
from benchmarks.cuda.parts import Found, run_cases
from gptbatch.pipeline.bench.random_model import random_model
from gptbatch.pipeline.engine.device_engine import DeviceEngine
from gptbatch.pipeline.engine.engine import Engine
from gptbatch.pipeline.kv_cache.quantization import CacheDtype
from gptbatch.pipeline.kv_cache.spec import RAGGED, TRITON, Backend
from gptbatch.pipeline.model.compiling import compile_kernels
from gptbatch.pipeline.model.config import Activation
from gptbatch.pipeline.model.gpt import GPT, Block
from gptbatch.pipeline.system.machine import cores
from gptbatch.pipeline.types import Completion, TokenizedPrompt
from tests.arithmetic_digests import prompts
from tests.conftest import has_kernels

ACTIVATIONS: tuple[Activation, ...] = ("gelu_tanh", "gelu", "silu", "tanh", "relu")
CACHE_DTYPES: tuple[CacheDtype, ...] = ("auto", "int8")
# (layers, activation, cache): first what GPT-2 has.
CASES: list[tuple[int, Activation, CacheDtype]]
CASES = [(2, "gelu_tanh", cache_dtype) for cache_dtype in CACHE_DTYPES]
CASES += [
    (1, activation, cache_dtype) for cache_dtype in CACHE_DTYPES for activation in ACTIVATIONS[1:]
]
# Tokens of the prompts.
LENGTHS = (3, 70, 1, 129, 17, 40, 66, 5, 30, 9)
# The most seconds of a case.
LIMIT = 40


def cpu_bits(first: int = 0) -> None:
    """Compare the float32 kernels with the C++ kernels of the CPU, bit for bit.

    The digests of all logits, tokens and margins of a model as wide as GPT-2, with every activation
    and both caches: the engines of the host, and the engine of the device.
    """
    if not has_kernels():
        report({"error": "the C++ kernels cannot be built here"})
        return
    # The import of tests.conftest leaves one thread.
    torch.set_num_threads(cores().threads)
    cases = {
        f"{activation} {cache_dtype}": functools.partial(
            compare_case, n_layer, activation, cache_dtype
        )
        for n_layer, activation, cache_dtype in CASES[: 2 if IS_FAKE else None]
    }
    run_cases(cases, first, LIMIT)


def compare_case(
    n_layer: int, activation: Activation, cache_dtype: CacheDtype, found: Found
) -> None:
    """Compare the engine of the host with that of the CPU, then the engine of the device."""
    key = f"{activation} {cache_dtype}"
    cpu, triton = (model_of(n_layer, backend) for backend in (RAGGED, TRITON))
    for model in (cpu, triton):
        model.cache_dtype = cache_dtype
        for module in model.modules():
            if isinstance(module, Block):
                module.mlp_in.activation = activation
        model.blocks.fuse()
    if not IS_FAKE:
        compile_kernels(triton)
    rows = prompts(VOCAB, LENGTHS[: 5 if IS_FAKE else None], 12)
    rows += [*adjusted_prompts(rows), *filtered_prompts(rows)]
    options: dict[str, Any] = {"batch_size": 7, "eos_token_ids": (), "token_bytes": TOKEN_BYTES}
    expected = run(Engine(model=cpu, record_logits=True, **options), rows)
    host = run(Engine(model=triton, record_logits=True, **options), rows)
    note_equal(found, f"{key}: logits", expected, host, lambda done: done.logits_digest)
    note_equal(found, f"{key}: tokens", expected, host, lambda done: done.token_ids)
    report(found)
    device = run(DeviceEngine(model=triton, **options), rows)
    compared: dict[str, Callable[[Completion], object]] = {
        "tokens": lambda done: done.token_ids,
        "margins": lambda done: done.min_decision_margin,
        "log probabilities": lambda done: done.logprobs,
    }
    for what, value in compared.items():
        note_equal(found, f"{key}: {what} of the device", expected, device, value)


@functools.cache
def model_of(n_layer: int, backend: Backend) -> GPT:
    """Return a float32 model on the CPU or on the device."""
    return random_model(
        replace(CONFIG, n_layer=n_layer),
        dtype=torch.float32,
        device=torch.device("cpu" if backend is RAGGED else DEVICE),
        backend=backend,
    )


def run(engine: Engine, rows: list[TokenizedPrompt]) -> list[Completion]:
    """Return the completions in order."""
    ended = [done for some in engine.generate(iter(rows)) for done in some]
    return sorted(ended, key=lambda done: done.prompt.index)


def note_equal(
    found: Found,
    key: str,
    expected: list[Completion],
    completions: list[Completion],
    value: Callable[[Completion], object],
) -> None:
    """Note whether a value of all completions is equal, and the rows in which it is not."""
    pairs = zip(expected, completions, strict=True)
    rows = [a.prompt.index for a, b in pairs if value(a) != value(b)]
    found[f"{key} equal"] = not rows
    if rows:
        found[f"{key}: rows that differ"] = rows


def adjusted_prompts(rows: list[TokenizedPrompt]) -> list[TokenizedPrompt]:
    """Return the rows once more, with settings that change their logits."""
    settings: tuple[dict[str, Any], ...] = (
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 1},
        {"frequency_penalty": 0.7, "presence_penalty": -0.4},
        {"allowed_token_ids": tuple(range(30, 60)), "logit_bias": ((31, 0.7), (40, -3.1))},
        {"stop_token_ids": tuple(range(min(1000, VOCAB // 2))), "min_new_tokens": 9, "logprobs": 3},
        {"bad_words": ("ab", "c"), "logprobs": 20},
    )
    made = []
    for number, row in enumerate(rows):
        params = replace(row.prompt.params, **settings[number % len(settings)])
        index = len(rows) + number
        prompt = replace(row.prompt, index=index, prompt_id=str(index), params=params)
        made.append(replace(row, prompt=prompt))
    return made


def filtered_prompts(rows: list[TokenizedPrompt]) -> list[TokenizedPrompt]:
    """Return the rows once more, with the settings of FILTERS."""
    made = []
    for number, row in enumerate(rows):
        filters: dict[str, Any] = {"temperature": 0.9, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        filters |= FILTERS[number % len(FILTERS)]
        index = 2 * len(rows) + number
        params = replace(row.prompt.params, **filters)
        prompt = replace(row.prompt, index=index, prompt_id=str(index), params=params)
        made.append(replace(row, prompt=prompt))
    return made
