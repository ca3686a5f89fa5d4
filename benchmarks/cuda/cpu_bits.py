"""Section `cpu-bits`: the engines of the device and of the host beside that of the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.cuda.cases import FILTERS, TOKEN_BYTES
from benchmarks.cuda.common import CONFIG, DEVICE, IS_FAKE, VOCAB, report
from gptbatch.pipeline.bench.random_model import random_model
from gptbatch.pipeline.engine.device_engine import DeviceEngine
from gptbatch.pipeline.engine.engine import Engine
from gptbatch.pipeline.kv_cache.quantization import CacheDtype
from gptbatch.pipeline.kv_cache.spec import RAGGED, TRITON, Backend
from gptbatch.pipeline.model.compiling import compile_kernels
from gptbatch.pipeline.model.config import Activation
from gptbatch.pipeline.model.gpt import GPT, Block
from gptbatch.pipeline.types import TokenizedPrompt
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


def cpu_bits() -> None:
    """Compare the float32 kernels with the C++ kernels of the CPU, bit for bit.

    The digests of all logits, tokens and margins of a model as wide as GPT-2, with every activation
    and both caches: the engines of the host, and the engine of the device.
    """
    if not has_kernels():
        report({"error": "the C++ kernels cannot be built here"})
        return
    found: dict[str, Any] = {}
    models: dict[Backend, GPT] = {}
    rows = prompts(VOCAB, LENGTHS[: 5 if IS_FAKE else None], 12)
    rows += [*adjusted_prompts(rows), *filtered_prompts(rows)]
    for n_layer, activation, cache_dtype in CASES[: 2 if IS_FAKE else None]:
        if not models or n_layer != models[TRITON].config.n_layer:
            models = {backend: new_model(n_layer, backend) for backend in (RAGGED, TRITON)}
        for model in models.values():
            model.cache_dtype = cache_dtype
            for module in model.modules():
                if isinstance(module, Block):
                    module.mlp_in.activation = activation
            model.blocks.fuse()
        if not IS_FAKE:
            compile_kernels(models[TRITON])
        found |= {
            f"{activation} {cache_dtype}: {what} equal": is_equal
            for what, is_equal in equal_bits(models, rows).items()
        }
        report(found)


def new_model(n_layer: int, backend: Backend) -> GPT:
    """Return a float32 model on the CPU or on the device."""
    return random_model(
        replace(CONFIG, n_layer=n_layer),
        dtype=torch.float32,
        device=torch.device("cpu" if backend is RAGGED else DEVICE),
        backend=backend,
    )


def equal_bits(models: dict[Backend, GPT], rows: list[TokenizedPrompt]) -> dict[str, bool]:
    """Return whether the three engines have equal bits, by what is compared."""
    options: dict[str, Any] = {"batch_size": 7, "eos_token_ids": (), "token_bytes": TOKEN_BYTES}
    engines = [Engine(model=model, record_logits=True, **options) for model in models.values()]
    engines.append(DeviceEngine(model=models[TRITON], **options))
    cpu, host, device = (
        sorted(
            (done for some in engine.generate(iter(rows)) for done in some),
            key=lambda done: done.prompt.index,
        )
        for engine in engines
    )
    both, all_three = [*zip(cpu, device, strict=True)], [*zip(cpu, host, device, strict=True)]
    return {
        "logits": all(a.logits_digest == b.logits_digest for a, b, _ in all_three),
        "tokens": all(a.token_ids == b.token_ids == c.token_ids for a, b, c in all_three),
        "margins of the device": all(
            a.min_decision_margin == b.min_decision_margin for a, b in both
        ),
        "log probabilities of the device": all(a.logprobs == b.logprobs for a, b in both),
    }


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
