"""What the host costs per step and per row, beside a device that takes no time.

    python benchmarks/cuda_host.py

The engine of the device runs on a CPU with kernels that do nothing: all tokens are 0. So this is
the most that the host allows, without text, files and the launches of CUDA.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.cuda.engines import NEW_TOKENS, prompts
from gptbatch.pipeline.engine.device_engine import DeviceEngine
from gptbatch.pipeline.kernels.cuda.kernels import Kernels
from gptbatch.pipeline.kv_cache.spec import TRITON
from gptbatch.pipeline.model.config import GPTConfig
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.types import TokenizedPrompt
from tests.fake_device import LateStream


def nothing(*_: Any, **__: Any) -> None:
    """Take the place of a kernel."""


# Settings of all rows, at SETTING_ROWS rows at once.
SETTINGS: dict[str, dict[str, Any]] = {
    "penalties, n-grams": {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.2,
        "no_repeat_ngram_size": 3,
    },
    "allowed_token_ids, 1,000": {"allowed_token_ids": tuple(range(1000))},
    "min_new_tokens": {"min_new_tokens": 1, "stop_token_ids": (50256,)},
    "bad_words": {"bad_words": ("ab", "cd")},
    "logprobs 5": {"logprobs": 5},
}
SETTING_ROWS = 256


def with_settings(work: list[TokenizedPrompt], settings: dict[str, Any]) -> list[TokenizedPrompt]:
    """Return the rows with other settings."""
    params = [dataclasses.replace(row.prompt.params, **settings) for row in work]
    prompts = [
        dataclasses.replace(row.prompt, params=each) for row, each in zip(work, params, strict=True)
    ]
    return [
        dataclasses.replace(row, prompt=prompt) for row, prompt in zip(work, prompts, strict=True)
    ]


def times(model: GPT, rows: int, work: list[TokenizedPrompt]) -> dict[str, float]:
    """Return times of the best of two runs."""
    kernels = Kernels(**{field.name: nothing for field in dataclasses.fields(Kernels)})
    tokens = sum(each.prompt.params.max_new_tokens for each in work)
    best = float("inf")
    for _ in range(2):
        engine = DeviceEngine(
            model=model,
            batch_size=rows,
            eos_token_ids=(),
            kernels=kernels,
            stream=LateStream(0),
            memory_bytes=2**30,
            token_bytes=[bytes([97 + token % 26]) for token in range(model.config.vocab_size)],
        )
        began = time.perf_counter()
        n_ended = sum(len(some) for some in engine.generate(iter(work)))
        best = min(best, time.perf_counter() - began)
        assert n_ended == len(work)
    return {
        "ms_per_step": round(best / engine.stats.steps * 1e3, 3),
        "ms_per_row": round(best / len(work) * 1e3, 3),
        "tokens_per_s": round(tokens / best),
    }


def measure(row_counts: Sequence[int]) -> dict[str, Any]:
    """Return ms per step and per row, and new tokens/s, by the rows that run at once."""
    model, found = small_model(), {}
    for rows in row_counts:
        for ragged in (False, True):
            work = prompts(4 * rows, ragged=ragged)
            found[f"{rows} rows{', ragged' * ragged}"] = times(model, rows, work)
    return {"new_tokens": NEW_TOKENS, "torch": torch.__version__, **found}


def small_model() -> GPT:
    """Return a narrow model with the layers and the vocabulary of GPT-2."""
    config = GPTConfig(
        vocab_size=50257, n_positions=1024, n_embd=64, n_layer=12, n_head=1, n_inner=64
    )
    return GPT(config, backend=TRITON).eval().requires_grad_(False)


def main() -> None:
    found, model = measure((64, 256, 1024)), small_model()
    for name, settings in SETTINGS.items():
        work = with_settings(prompts(4 * SETTING_ROWS), settings)
        found[f"{SETTING_ROWS} rows, {name}"] = times(model, SETTING_ROWS, work)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
