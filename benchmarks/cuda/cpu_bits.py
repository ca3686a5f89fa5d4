"""Section `cpu-bits`: engines on the GPU against the engine of the CPU, in float32."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import torch

from benchmarks.cuda.common import CONFIG, DEVICE, IS_FAKE, VOCAB, report
from benchmarks.cuda.kernels import FILTERS, TOKEN_BYTES
from gptbatch.pipeline.bench.random_model import random_model
from gptbatch.pipeline.engine.device_engine import DeviceEngine
from gptbatch.pipeline.engine.engine import Engine
from gptbatch.pipeline.kv_cache.spec import RAGGED, TRITON
from gptbatch.pipeline.model.config import Activation
from gptbatch.pipeline.types import TokenizedPrompt
from tests.arithmetic_digests import prompts
from tests.conftest import has_kernels


def cpu_bits() -> None:
    """Compare the float32 kernels with the C++ kernels of the CPU, bit for bit.

    The digests of all logits, tokens and margins of a model as wide as GPT-2, with every activation
    and both caches: the engines of the host, and the engine of the device.
    """
    if not has_kernels():
        report({"error": "the C++ kernels cannot be built here"})
        return
    found: dict[str, Any] = {}
    rows = prompts(VOCAB, (3, 70, 1, 129, 17, 40, 66, 5, 30, 9), 12)
    rows += [*adjusted_prompts(rows), *filtered_prompts(rows)]
    options: dict[str, Any] = {"batch_size": 7, "eos_token_ids": (), "token_bytes": TOKEN_BYTES}
    activations: tuple[Activation, ...] = ("gelu_tanh", "gelu", "silu", "tanh", "relu")
    for activation in activations[: 1 if IS_FAKE else None]:
        n_layer = 2 if activation == "gelu_tanh" else 1
        config = replace(CONFIG, n_layer=n_layer, activation=activation)
        for cache_dtype in ("auto", "int8"):
            models = {
                backend: random_model(
                    config,
                    dtype=torch.float32,
                    device=torch.device("cpu" if backend is RAGGED else DEVICE),
                    backend=backend,
                    cache_dtype=cache_dtype,
                )
                for backend in (RAGGED, TRITON)
            }
            engines = [
                Engine(model=model, record_logits=True, **options) for model in models.values()
            ]
            engines.append(DeviceEngine(model=models[TRITON], **options))
            cpu, host, device_ = (
                sorted(
                    (done for some in engine.generate(iter(rows)) for done in some),
                    key=lambda done: done.prompt.index,
                )
                for engine in engines
            )
            key = f"{activation} {cache_dtype}"
            found[f"{key}: logits equal"] = sum(
                a.logits_digest == b.logits_digest for a, b in zip(cpu, host, strict=True)
            ) == len(rows)
            found[f"{key}: tokens equal"] = all(
                a.token_ids == b.token_ids == c.token_ids
                for a, b, c in zip(cpu, host, device_, strict=True)
            )
            found[f"{key}: margins of the device equal"] = all(
                a.min_decision_margin == b.min_decision_margin
                for a, b in zip(cpu, device_, strict=True)
            )
            found[f"{key}: log probabilities of the device equal"] = all(
                a.logprobs == b.logprobs for a, b in zip(cpu, device_, strict=True)
            )
            report(found)


def adjusted_prompts(rows: list[TokenizedPrompt]) -> list[TokenizedPrompt]:
    """Return the rows once more, with settings that change their logits."""
    settings: tuple[dict[str, Any], ...] = (
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 1},
        {"frequency_penalty": 0.7, "presence_penalty": -0.4},
        {"allowed_token_ids": tuple(range(30, 60)), "logit_bias": ((31, 0.7), (40, -3.1))},
        {"stop_token_ids": tuple(range(VOCAB // 50)), "min_new_tokens": 9, "logprobs": 3},
        {"bad_words": ("ab", "c"), "logprobs": 20},
    )
    made = []
    for number, row in enumerate(rows):
        params = dataclasses.replace(row.prompt.params, **settings[number % len(settings)])
        index = len(rows) + number
        prompt = dataclasses.replace(row.prompt, index=index, prompt_id=str(index), params=params)
        made.append(dataclasses.replace(row, prompt=prompt))
    return made


def filtered_prompts(rows: list[TokenizedPrompt]) -> list[TokenizedPrompt]:
    """Return the rows once more, with the settings of FILTERS."""
    made = []
    for number, row in enumerate(rows):
        filters: dict[str, Any] = {"temperature": 0.9, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        filters |= FILTERS[number % len(FILTERS)]
        index = 2 * len(rows) + number
        params = dataclasses.replace(row.prompt.params, **filters)
        prompt = dataclasses.replace(row.prompt, index=index, prompt_id=str(index), params=params)
        made.append(dataclasses.replace(row, prompt=prompt))
    return made
