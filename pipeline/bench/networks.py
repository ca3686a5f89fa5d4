"""Networks of the published shapes with random weights: how fast they run does not depend on what they say."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.gpt.attention import Backend
from pipeline.gpt.config import GPTConfig, parse_config
from pipeline.gpt.linear import Linear
from pipeline.gpt.model import GPT

SHAPES = {  # n_layer, n_head, n_embd
    "distilgpt2": (6, 12, 768),
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


def shape_config(shape: str) -> GPTConfig:
    n_layer, n_head, n_embd = SHAPES[shape]
    sizes = {"vocab_size": 50257, "n_positions": 1024, "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
    return parse_config({"model_type": "gpt2", **sizes}, shape)


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
