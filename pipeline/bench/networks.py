"""Networks with random weights: how fast they run does not depend on what they say."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptbatch.pipeline.kv_cache.interface import Backend
from gptbatch.pipeline.model.config import GPTConfig
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.linear import Linear
from gptbatch.pipeline.system.bundled import locate


def random_network(
    config: GPTConfig, *, attention: Backend, dtype: torch.dtype, device: torch.device
) -> GPT:
    """The same weights in every process, normal with GPT-2's standard deviation of 0.02, ready to run."""
    torch.manual_seed(0)
    model = GPT(config, attention=attention).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, (Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
    model = model.to(device=device, dtype=dtype)
    model.pack()
    return model


def write_random_checkpoint(folder: Path, **config: Any) -> None:
    """The same in files, as transformers initialises and writes them; config: settings of its GPT2Config. The tokenizer is the demo's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**config)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(locate("bundled:demo/model")) / name, folder)
