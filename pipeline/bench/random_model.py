"""Models with random weights: speed does not depend on the values."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptbatch.pipeline.kv_cache.quantization import CacheDtype
from gptbatch.pipeline.kv_cache.spec import Backend
from gptbatch.pipeline.model.config import GPTConfig
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.linear import Linear
from gptbatch.pipeline.model.packing import pack
from gptbatch.pipeline.system.bundled import locate

# GPT-2's standard deviation of weights.
WEIGHT_STD = 0.02


def random_model(
    config: GPTConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    backend: Backend,
    cache_dtype: CacheDtype = "auto",
) -> GPT:
    """Return a packed model with normally distributed weights, equal in every process."""
    torch.manual_seed(0)
    model = GPT(config, backend=backend, cache_dtype=cache_dtype).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, (Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=WEIGHT_STD)
    model = model.to(device=device, dtype=dtype)
    pack(model)
    return model


def write_random_checkpoint(folder: Path, **config: Any) -> None:
    """Write a checkpoint that transformers initializes, with the tokenizer of the demo.

    Args:
        folder: Where to write.
        **config: Settings of transformers' GPT2Config.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**config)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(locate("bundled:demo/model")) / name, folder)
