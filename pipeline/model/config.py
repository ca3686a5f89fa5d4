"""The shape and switches of a GPT-2 checkpoint, parsed from its config.json.

Every key that changes the logits is applied or refused by name. Other keys (dropout rates,
generation defaults, labels of other heads) are ignored.

Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gptbatch.pipeline.errors import ModelError

Activation = Literal["none", "gelu_tanh", "gelu", "relu", "silu", "tanh"]

_ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}

# GPT-2 with a language model head, with other heads, or without any. HeadWithValue is of old trl.
_ARCHITECTURES = re.compile(
    r"GPT2(LMHead|DoubleHeads|HeadWithValue|)Model"
    r"|GPT2For(SequenceClassification|TokenClassification|QuestionAnswering)"
    r"|TFGPT2LMHeadModel|FlaxGPT2LMHeadModel"
)

# Keys that must be absent or empty, and why.
_REFUSED_KEYS = {
    "auto_map": "checkpoints that bring their own code are refused",
    "quantization_config": "quantized weights are not supported; "
    "take the checkpoint that they were made from",
    "add_cross_attention": "cross-attention is not supported",
    "pruned_heads": "pruned heads are not supported",
}

# Other names that transformers accepts for GPT-2's own keys
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTConfig:
    """Shape and switches of a model.

    Attributes:
        vocab_size: V.
        n_positions: Length of the context.
        n_embd: Width of hidden states, C.
        n_layer: Blocks, L.
        n_head: Attention heads, H.
        n_inner: Width of the MLP.
        activation: Of the MLP.
        layer_norm_epsilon: Added to variances.
        scale_attn_weights: Scale attention scores by 1 / sqrt(D).
        scale_attn_by_inverse_layer_idx: Divide them by layer + 1, too.
        upcast_attention: Compute attention in float32.
        tied: The head shares the token embedding's weight.
    """

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    activation: Activation = "gelu_tanh"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    upcast_attention: bool = False
    tied: bool = True

    @property
    def head_size(self) -> int:
        """Numbers per head, D."""
        return self.n_embd // self.n_head

    def attention_scale(self, layer: int) -> float:
        """Return the factor of the attention scores in a layer."""
        # Powers of the C library may round another way on another machine.
        scale = 1 / math.sqrt(self.head_size) if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale


def parse_config(content: Mapping[str, Any], where: str) -> GPTConfig:
    """Parse the content of a config.json.

    Args:
        content: The JSON object.
        where: Names the file in errors.

    Raises:
        ModelError: It is not GPT-2, or a key has an unsupported value; the message names it.
    """

    def refuse(key: str, what: str) -> ModelError:
        return ModelError(f"{where}: {key} is {content.get(key)!r}: {what}")

    _check_architecture(content, where)
    for key, what in _REFUSED_KEYS.items():
        if content.get(key):
            raise refuse(key, what)
    content = {
        **content,
        **{
            name: content[alias]
            for alias, name in _ALIASES.items()
            if alias in content and name not in content
        },
    }

    def integer(key: str, default: int, high: int = 2**24) -> int:
        value = content.get(key, default)
        if type(value) is not int or not 1 <= value <= high:
            raise refuse(key, f"a whole number from 1 to {high} is needed")
        return value

    def switch(key: str, default: bool) -> bool:
        value = content.get(key, default)
        if type(value) is not bool:
            raise refuse(key, "true or false is needed")
        return value

    n_embd, n_head = integer("n_embd", 768), integer("n_head", 12)
    if n_embd % n_head:
        raise ModelError(f"{where}: n_embd {n_embd} is not a multiple of n_head {n_head}")
    activation = content.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise refuse("activation_function", f"known are {', '.join(sorted(_ACTIVATIONS))}")
    epsilon = content.get("layer_norm_epsilon", 1e-5)
    if type(epsilon) not in (int, float) or not 0 <= epsilon < 1:
        raise refuse("layer_norm_epsilon", "a number from 0 to 1 is needed")
    return GPTConfig(
        vocab_size=integer("vocab_size", 50257),
        n_positions=integer("n_positions", 1024),
        n_embd=n_embd,
        n_layer=integer("n_layer", 12, 4096),
        n_head=n_head,
        n_inner=4 * n_embd if content.get("n_inner") is None else integer("n_inner", 4 * n_embd),
        activation=_ACTIVATIONS[activation],
        layer_norm_epsilon=float(epsilon),
        scale_attn_weights=switch("scale_attn_weights", True),
        scale_attn_by_inverse_layer_idx=switch("scale_attn_by_inverse_layer_idx", False),
        upcast_attention=switch("reorder_and_upcast_attn", False),
        tied=switch("tie_word_embeddings", True),
    )


def _check_architecture(content: Mapping[str, Any], where: str) -> None:
    """Raise ModelError unless it is GPT-2.

    Old checkpoints lack model_type, or both model_type and architectures.
    """
    model_type, architectures = content.get("model_type"), content.get("architectures")
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    if model_type == "gpt2":
        return
    if model_type is not None:
        raise ModelError(
            f"{where}: model_type is {model_type!r:.100}: "
            "only GPT-2 checkpoints (model_type 'gpt2') can be loaded"
        )
    if names and not any(_ARCHITECTURES.fullmatch(name) for name in names):
        raise ModelError(
            f"{where}: architectures is {names!r:.200}: "
            "only GPT-2 checkpoints (GPT2LMHeadModel) can be loaded"
        )
    if not names and not {"n_embd", "n_head", "n_layer"} <= content.keys():
        raise ModelError(
            f"{where}: model_type is missing: only GPT-2 checkpoints can be loaded; "
            "if this is one, set it to gpt2"
        )
