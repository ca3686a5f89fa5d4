"""Shapes of the GPT-2 family.

Imports no torch.
"""

from __future__ import annotations

from gptbatch.pipeline.model.config import GPTConfig, parse_config

# Name -> (n_layer, n_head, n_embd)
SHAPES = {
    "distilgpt2": (6, 12, 768),
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


def shape_config(shape: str) -> GPTConfig:
    """Return the config of a name in SHAPES."""
    n_layer, n_head, n_embd = SHAPES[shape]
    sizes = {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_embd": n_embd,
    }
    return parse_config({"model_type": "gpt2", **sizes}, shape)
