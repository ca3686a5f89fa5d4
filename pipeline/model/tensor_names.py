"""Map tensor names of checkpoint files to parameters of GPT-2.

Trainers wrap a model before they save it, and each wrapper adds a component to every name. Other
tensors are constants of old versions, or heads trained beside the language model.

Imports no torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

# Parameter of a Block -> its name inside h.N of a checkpoint, and whether it is transposed there:
# transformers stores the linears of a block as (in, out), Linear as (out, in).
BLOCK_NAMES = {
    "ln_1.weight": ("ln_1.weight", False),
    "ln_1.bias": ("ln_1.bias", False),
    "attn_qkv.weight": ("attn.c_attn.weight", True),
    "attn_qkv.bias": ("attn.c_attn.bias", False),
    "attn_out.weight": ("attn.c_proj.weight", True),
    "attn_out.bias": ("attn.c_proj.bias", False),
    "ln_2.weight": ("ln_2.weight", False),
    "ln_2.bias": ("ln_2.bias", False),
    "mlp_in.weight": ("mlp.c_fc.weight", True),
    "mlp_in.bias": ("mlp.c_fc.bias", False),
    "mlp_out.weight": ("mlp.c_proj.weight", True),
    "mlp_out.bias": ("mlp.c_proj.bias", False),
}
OUTER_NAMES = ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")
EMBEDDING_NAME, HEAD_NAME = "wte.weight", "lm_head.weight"

# Added in front: transformers, DDP and DeepSpeed, Lightning, trl, peft after a merge
_LEADING = frozenset({"transformer", "module", "model", "pretrained_model", "base_model"})
# Added anywhere: torch.compile, FSDP, activation checkpointing
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
# Occurs once in every GPT-2; unlike the token embedding it has no second name.
_WPE = "wpe.weight"


def plain_name(stored_name: str, prefix: str = "") -> str:
    """Remove the components that wrappers add, as in module.transformer.h.0.ln_1.weight.

    Args:
        stored_name: Name in the file.
        prefix: Result of `unknown_prefix`; its components are removed too.
    """
    leading = _LEADING.union(prefix.split("."))
    parts = [part for part in stored_name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in leading:
        parts = parts[1:]
    return ".".join(parts)


def unknown_prefix(stored_names: Iterable[str]) -> str:
    """Return the prefix of an unknown wrapper, as `student.transformer`; "" for none or several."""
    names = {name for name in map(plain_name, stored_names) if f".{name}".endswith(f".{_WPE}")}
    return names.pop().removesuffix(f".{_WPE}") if len(names) == 1 and _WPE not in names else ""


def is_constant(name: str) -> bool:
    """Return whether a plain name is a mask or positions, which old checkpoints store."""
    return _CONSTANTS.fullmatch(name) is not None


def other_head(name: str) -> str | None:
    """Return the head beside the language model that this plain name belongs to, or None."""
    head = name.split(".", 1)[0]
    return head if head in _HEADS else None


def describe_heads(names: Iterable[str]) -> str:
    """Count the tensors of each head, from plain names: `v_head (2 tensors), score (1 tensor)`."""
    counts = Counter(name.split(".", 1)[0] for name in names)
    return ", ".join(
        f"{head} ({count} tensor{'' if count == 1 else 's'})"
        for head, count in sorted(counts.items())
    )


def hint_for(names: Iterable[str], *, complete: bool = False) -> str:
    """Return advice about tensors that GPT-2 does not have, to append to a message; "" for none.

    Args:
        names: Plain names of these tensors.
        complete: Whether all tensors of GPT-2 are present as well.
    """
    names = list(names)
    text = " ".join(names)
    if "lora_" in text or ".base_layer." in text:
        return (
            "; a LoRA adapter that is not merged: merge it with merge_and_unload() "
            "and save the result"
        )
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
        return (
            "; where the language model does not need them, save it without them "
            f"(heads that are known are left out: {heads})"
        )
    return ""
