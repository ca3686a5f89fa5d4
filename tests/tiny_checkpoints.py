"""Tiny GPT-2 checkpoints, written without torch in a few milliseconds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 260  # end-of-text, 256 bytes, "hi", and two that prompts never hold
HI, STOP, OTHER_STOP = 257, 258, 259
N_EMBD, N_LAYER, N_POSITIONS = 32, 2, 64

Tensors = dict[str, np.ndarray[Any, np.dtype[Any]]]


def config_json(**changes: Any) -> dict[str, Any]:
    """Return the content of config.json. A value of ... removes a key."""
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "model_type": "gpt2",
        "n_embd": N_EMBD,
        "n_head": 4,
        "n_layer": N_LAYER,
        "n_positions": N_POSITIONS,
        "vocab_size": VOCAB_SIZE,
    } | changes
    return {key: value for key, value in config.items() if value is not ...}


def random_tensors(
    *, vocab_size: int = VOCAB_SIZE, prefix: str = "transformer.", script: Sequence[int] = ()
) -> Tensors:
    """Return the tensors of a GPT-2 by name.

    Args:
        vocab_size: Size of the vocabulary.
        prefix: Prefix of the names of tensors.
        script: After p tokens of context, the network greedily gives script[(p - 1) % len(script)].
            An empty script makes it random.
    """
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray[Any, np.dtype[Any]]:
        return (0.15 * rng.standard_normal(shape)).astype(np.float32)

    tensors = {"wte.weight": normal(vocab_size, N_EMBD), "wpe.weight": normal(N_POSITIONS, N_EMBD)}
    for layer in range(N_LAYER):
        block = f"h.{layer}."
        for name, inputs, outputs in (
            ("attn.c_attn", N_EMBD, 3 * N_EMBD),
            ("attn.c_proj", N_EMBD, N_EMBD),
            ("mlp.c_fc", N_EMBD, 4 * N_EMBD),
            ("mlp.c_proj", 4 * N_EMBD, N_EMBD),
        ):
            factor = 0 if script and name.endswith("c_proj") else 1
            tensors |= {
                f"{block}{name}.weight": factor * normal(inputs, outputs),
                f"{block}{name}.bias": factor * normal(outputs),
            }
    for norm in (*(f"h.{layer}.ln_{i}" for layer in range(N_LAYER) for i in (1, 2)), "ln_f"):
        tensors |= {
            f"{norm}.weight": np.ones(N_EMBD, np.float32),
            f"{norm}.bias": np.zeros(N_EMBD, np.float32),
        }
    if script:
        dimensions = {token: dimension for dimension, token in enumerate(dict.fromkeys(script))}
        tensors["wte.weight"] *= 0.1
        tensors["wpe.weight"][:] = 0
        for token, dimension in dimensions.items():
            tensors["wte.weight"][token] = np.eye(N_EMBD, dtype=np.float32)[dimension]
        for position in range(N_POSITIONS):
            tensors["wpe.weight"][position, dimensions[script[position % len(script)]]] = 30
    return {prefix + name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def byte_tokenizer() -> Tokenizer:
    """Return a byte-level BPE of VOCAB_SIZE tokens."""
    tokens = [
        END_OF_TEXT,
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        "hi",
        "<|stop|>",
        "<|other|>",
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[("h", "i")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False)
            for text in (END_OF_TEXT, "<|stop|>", "<|other|>")
        ]
    )
    return tokenizer


def write_checkpoint(
    folder: Path,
    *,
    config: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    tensors: Tensors | None = None,
    script: Sequence[int] = (),
) -> Path:
    """Write config.json, model.safetensors, tokenizer.json and, given `generation`, its config."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_json(**(config or {}))))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    save_file(
        random_tensors(script=script) if tensors is None else tensors,
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder
