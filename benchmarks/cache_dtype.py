"""How far an int8 cache and the other attention backend move the logits.

    python benchmarks/cache_dtype.py

Runs the demo model, and gpt2's shape with random weights, on random tokens. Prints the largest
difference of a logit relative to the largest logit of its position, and the share of positions
whose largest logit stays the same. The tolerances of verify follow from these. The last line is a
JSON object.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from gptbatch.pipeline.bench.random_model import random_model
from gptbatch.pipeline.bench.shapes import shape_config
from gptbatch.pipeline.kv_cache.interface import select_backend
from gptbatch.pipeline.kv_cache.quantization import CacheDtype
from gptbatch.pipeline.kv_cache.spec import PADDED, RAGGED, Backend
from gptbatch.pipeline.model.checkpoint import find_checkpoint
from gptbatch.pipeline.model.config import parse_config
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.weights import load_gpt

CPU = torch.device("cpu")
SEQUENCES, TOKENS = 4, 200

Make = Callable[[Backend, CacheDtype, torch.dtype], GPT]


def demo(backend: Backend, cache_dtype: CacheDtype, dtype: torch.dtype) -> GPT:
    """Load the demo model."""
    checkpoint = find_checkpoint("bundled:demo/model")
    config = parse_config(checkpoint.config, "bundled:demo/model")
    return load_gpt(
        config,
        list(checkpoint.weights),
        dtype=dtype,
        device=CPU,
        backend=backend,
        cache_dtype=cache_dtype,
    )


def gpt2(backend: Backend, cache_dtype: CacheDtype, dtype: torch.dtype) -> GPT:
    """Return gpt2's shape with random weights."""
    return random_model(
        shape_config("gpt2"), dtype=dtype, device=CPU, backend=backend, cache_dtype=cache_dtype
    )


@torch.inference_mode()
def measure(make: Make, dtype: torch.dtype) -> dict[str, float]:
    """Return the differences between caches and backends."""
    logits: dict[tuple[Backend, CacheDtype], torch.Tensor] = {}
    cache_dtypes: tuple[CacheDtype, ...] = ("auto", "int8")
    for backend in (RAGGED, PADDED):
        for cache_dtype in cache_dtypes:
            model = make(backend, cache_dtype, dtype)
            generator = torch.Generator().manual_seed(0)
            shape = (SEQUENCES, TOKENS)
            idx = torch.randint(model.config.vocab_size, shape, generator=generator)
            logits[backend, cache_dtype] = model(idx).float()
    full, int8 = logits[RAGGED, "auto"], logits[RAGGED, "int8"]
    largest = full.abs().amax(-1)

    def share(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(f"{float(((a - b).abs().amax(-1) / largest).max()):.2g}")

    return {
        "int8 from full": share(int8, full),
        "backends, full": share(full, logits[PADDED, "auto"]),
        "backends, int8": share(int8, logits[PADDED, "int8"]),
        "same largest logit": round(float((int8.argmax(-1) == full.argmax(-1)).float().mean()), 4),
    }


def main() -> None:
    """Measure both models in both dtypes."""
    # Builds the kernels.
    select_backend("ragged", CPU)
    results = {}
    for name, make in {"demo": demo, "gpt2": gpt2}.items():
        for dtype in (torch.float32, torch.bfloat16):
            key = f"{name}, {str(dtype).removeprefix('torch.')}"
            results[key] = measure(make, dtype)
            print(f"{key:<16} {results[key]}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
