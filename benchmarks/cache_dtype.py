"""How far an int8 cache moves the logits, and how far the two attention backends are from each other, with and without it.

    python benchmarks/cache_dtype.py

The demo model, and gpt2's shape with random weights, on random tokens: the largest difference of a logit as a share of the largest logit
of its position, and the share of positions whose largest logit stays where it was. verify's tolerances rest on the first. The last
line is a JSON object.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from gptbatch.pipeline.bench.random_model import random_model
from gptbatch.pipeline.bench.shapes import shape_config
from gptbatch.pipeline.kv_cache.interface import Backend, select_backend
from gptbatch.pipeline.model.checkpoint import find_checkpoint
from gptbatch.pipeline.model.config import parse_config
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.weights import load_gpt

CPU = torch.device("cpu")
SEQUENCES, TOKENS = 4, 200

Make = Callable[[Backend, torch.dtype], GPT]


def demo(attention: Backend, dtype: torch.dtype) -> GPT:
    checkpoint = find_checkpoint("bundled:demo/model")
    config = parse_config(checkpoint.config, "bundled:demo/model")
    return load_gpt(config, list(checkpoint.weights), dtype=dtype, device=CPU, attention=attention)


def gpt2(attention: Backend, dtype: torch.dtype) -> GPT:
    return random_model(shape_config("gpt2"), attention=attention, dtype=dtype, device=CPU)


@torch.inference_mode()
def measure(make: Make, dtype: torch.dtype) -> dict[str, float]:
    logits: dict[tuple[str, str], torch.Tensor] = {}
    backends: tuple[Backend, ...] = ("ragged", "padded")
    for attention in backends:
        model = make(attention, dtype)
        idx = torch.randint(
            model.config.vocab_size, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(0)
        )
        for cache_dtype in ("auto", "int8"):
            model.cache_dtype = cache_dtype
            logits[attention, cache_dtype] = model(idx).float()
    full, int8 = logits["ragged", "auto"], logits["ragged", "int8"]
    largest = full.abs().amax(-1)

    def share(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(f"{float(((a - b).abs().amax(-1) / largest).max()):.2g}")

    return {
        "int8 from full": share(int8, full),
        "backends, full": share(full, logits["padded", "auto"]),
        "backends, int8": share(int8, logits["padded", "int8"]),
        "same largest logit": round(float((int8.argmax(-1) == full.argmax(-1)).float().mean()), 4),
    }


def main() -> None:
    select_backend("ragged", CPU)  # builds the kernels
    found = {}
    for name, make in {"demo": demo, "gpt2": gpt2}.items():
        for dtype in (torch.float32, torch.bfloat16):
            key = f"{name}, {str(dtype).removeprefix('torch.')}"
            found[key] = measure(make, dtype)
            print(f"{key:<16} {found[key]}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
