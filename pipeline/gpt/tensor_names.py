"""Reads the names of tensors in checkpoint files: which tensor of GPT-2 each is, and which are no part of the language model.

Trainers wrap a model before they save it, and each wrapper adds a component to every name. Other tensors are constants of old
versions, or heads that were trained beside the language model. Imports no torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

# added in front: transformers, DDP and DeepSpeed, Lightning, trl, peft after a merge
_LEADING = frozenset({"transformer", "module", "model", "pretrained_model", "base_model"})
# added anywhere: torch.compile, FSDP, activation checkpointing
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_CONSTANTS = re.compile(r"(h\.\d+\.(attn|crossattention)\.(bias|masked_bias)|(.*\.)?(position_ids|inv_freq))")
_HEADS = frozenset(
    {"v_head", "value_head", "reward_head", "multiple_choice_head", "score", "classifier", "qa_outputs", "summary"}
)  # trl and transformers


def plain_name(stored_name: str) -> str:
    """The name without the components that wrappers add: h.0.ln_1.weight for module.transformer.h.0.ln_1.weight."""
    parts = [part for part in stored_name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in _LEADING:
        parts = parts[1:]
    return ".".join(parts)


def is_constant(name: str) -> bool:
    """Whether a plain name is that of a mask or of positions, which old checkpoints carry."""
    return _CONSTANTS.fullmatch(name) is not None


def other_head(name: str) -> str | None:
    """The head beside the language model that a tensor of this plain name belongs to; None for other tensors."""
    head = name.split(".", 1)[0]
    return head if head in _HEADS else None


def describe_heads(names: Iterable[str]) -> str:
    """The heads that tensors of these plain names belong to, with counts: v_head (2 tensors), score (1 tensor)."""
    counts = Counter(name.split(".", 1)[0] for name in names)
    return ", ".join(f"{head} ({count} tensor{'' if count == 1 else 's'})" for head, count in sorted(counts.items()))


def hint_for(names: Iterable[str]) -> str:
    """What to do about tensors that GPT-2 does not have, to be put behind a message; "" where nobody knows."""
    text = " ".join(names)
    if "lora_" in text or ".base_layer." in text:
        return "; a LoRA adapter that is not merged: merge it with merge_and_unload() and save the result"
    if re.search(r"\.(qweight|qzeros|absmax|quant_state|SCB|weight_scale|scales)\b", text):
        return "; quantized weights are not supported: take the checkpoint that they were made from"
    if ".crossattention." in text:
        return "; cross-attention is not supported"
    return ""
