"""Networks with random weights: how fast they run does not depend on what they say."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.gpt.attention import Backend
from pipeline.gpt.config import GPTConfig
from pipeline.gpt.linear import Linear
from pipeline.gpt.model import GPT


def random_network(config: GPTConfig, *, attention: Backend, dtype: torch.dtype, device: torch.device) -> GPT:
    """The same weights in every process, normal with GPT-2's standard deviation of 0.02, ready to run."""
    torch.manual_seed(0)
    model = GPT(config, attention=attention).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, (Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
    model = model.to(device=device, dtype=dtype)
    model.pack()
    return model
