"""What the host costs per step and per row, beside a device that takes no time.

    python benchmarks/cuda_host.py

The engine of the device runs on a CPU with kernels that do nothing: all tokens are 0. So this is
the most that the host allows, without text, files and the launches of CUDA.
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import torch

from benchmarks.cuda.engines import NEW_TOKENS, prompts
from gptbatch.pipeline.engine.device_engine import DeviceEngine
from gptbatch.pipeline.kernels.cuda.kernels import Kernels
from gptbatch.pipeline.kv_cache.spec import TRITON
from gptbatch.pipeline.model.config import GPTConfig
from gptbatch.pipeline.model.gpt import GPT
from tests.fake_device import LateStream


def nothing(*_: Any, **__: Any) -> None:
    """Take the place of a kernel."""


def main() -> None:
    names = [field.name for field in dataclasses.fields(Kernels)]
    kernels = Kernels(**dict.fromkeys(names, nothing))
    config = GPTConfig(
        vocab_size=50257, n_positions=1024, n_embd=64, n_layer=12, n_head=1, n_inner=64
    )
    model = GPT(config, backend=TRITON).eval().requires_grad_(False)
    found = {}
    for rows in (64, 256, 1024):
        for ragged in (False, True):
            work = prompts(4 * rows, ragged=ragged)
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
                )
                began = time.perf_counter()
                n_ended = sum(len(some) for some in engine.generate(iter(work)))
                best = min(best, time.perf_counter() - began)
                assert n_ended == len(work)
            found[f"{rows} rows{', ragged' * ragged}"] = {
                "ms_per_step": round(best / engine.stats.steps * 1e3, 3),
                "ms_per_row": round(best / len(work) * 1e3, 3),
                "tokens_per_s": round(tokens / best),
            }
    print(json.dumps({"new_tokens": NEW_TOKENS, "torch": torch.__version__, **found}, indent=1))


if __name__ == "__main__":
    main()
