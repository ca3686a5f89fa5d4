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
_CONSTANTS = re.compile(
    r"(h\.\d+\.(attn|crossattention)\.(bias|masked_bias)|(.*\.)?(position_ids|inv_freq))"
)
_HEADS = frozenset(
    {
        *("multiple_choice_head", "score", "classifier", "qa_outputs", "summary"),  # transformers
        *("v_head", "value_head", "reward_head"),  # trl
        *("ilql_heads", "q1_head", "q2_head", "target_q1_head", "target_q2_head"),  # trlx
        "medusa_head",
    }
)
_WPE = "wpe.weight"  # stands once in every GPT-2, and has no second name as the token embedding has


def plain_name(stored_name: str, prefix: str = "") -> str:
    """The name without the components that wrappers add: h.0.ln_1.weight for module.transformer.h.0.ln_1.weight.

    prefix: what `unknown_prefix` found; its components count as those of a wrapper.
    """
    leading = _LEADING.union(prefix.split("."))
    parts = [part for part in stored_name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in leading:
        parts = parts[1:]
    return ".".join(parts)


def unknown_prefix(stored_names: Iterable[str]) -> str:
    """The prefix of a wrapper that is not known, `student.transformer`; "" where there is none, or more than one."""
    names = {name for name in map(plain_name, stored_names) if f".{name}".endswith(f".{_WPE}")}
    return names.pop().removesuffix(f".{_WPE}") if len(names) == 1 and _WPE not in names else ""


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
    return ", ".join(
        f"{head} ({count} tensor{'' if count == 1 else 's'})"
        for head, count in sorted(counts.items())
    )


def hint_for(names: Iterable[str], *, complete: bool = False) -> str:
    """What to do about tensors that GPT-2 does not have, to be put behind a message; "" where nobody knows.

    complete: whether all tensors of GPT-2 are there as well.
    """
    names = list(names)
    text = " ".join(names)
    if "lora_" in text or ".base_layer." in text:
        return "; a LoRA adapter that is not merged: merge it with merge_and_unload() and save the result"
    if re.search(r"\.(qweight|qzeros|absmax|quant_state|SCB|weight_scale|scales)\b", text):
        return "; quantized weights are not supported: take the checkpoint that they were made from"
    if ".crossattention." in text:
        return "; cross-attention is not supported"
    models = sorted(
        {f".{name}".removesuffix(_WPE).strip(".") for name in names if name.endswith(f".{_WPE}")}
    )
    if len(models) > 1:
        return f"; they are {len(models)} models, {' and '.join(models)}: save one of them alone"
    if complete:
        heads = ", ".join(sorted(_HEADS))
        return f"; where the language model does not need them, save it without them (heads that are known are left out: {heads})"
    return ""
