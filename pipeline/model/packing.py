"""Pack a model's weights for this machine and apply padding plans to its linears."""

from __future__ import annotations

from collections.abc import Iterator

from gptbatch.pipeline.kernels.huge_pages import HugePages
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.linear import Linear
from gptbatch.pipeline.model.lm_head import make_two_pass_head
from gptbatch.pipeline.model.norm import Norm
from gptbatch.pipeline.model.padding import AS_IS, PADDING_PLANS, PaddingPlan


def pack(model: GPT, memory: HugePages | None = None) -> None:
    """Lay out all weights for this CPU (see `Linear.pack`) and use the fastest padding plan.

    The model can no longer be copied into or moved to another device.

    Args:
        model: The model; linears that are packed stay as they are.
        memory: Takes the weights; None is new memory.
    """
    memory = memory or HugePages()
    if model.backend.triton:
        _pack_for_triton(model)
        return
    is_tied = model.lm_head.weight is model.wte.weight
    for module in model.modules():
        if isinstance(module, Linear):
            module.pack(memory, native=model.backend.native)
        elif isinstance(module, Norm):
            module.native = model.backend.native
    if is_tied:
        model.two_pass_head = make_two_pass_head(model.lm_head, model.wte.weight, memory)
    use_padding_plan(model, padding_plans(model)[0])


def padding_plans(model: GPT) -> tuple[PaddingPlan, ...]:
    """Return the plans that the model's linears may use, the fastest first."""
    if model.linear_kind == "triton":
        # The engine of the device pads by none of them.
        return (AS_IS,)
    is_native = model.linear_kind in ("native", "native_float32")
    return (AS_IS, *PADDING_PLANS) if is_native else PADDING_PLANS


def use_padding_plan(model: GPT, plan: PaddingPlan) -> None:
    """Run all linears under this plan; with fixed rows, at the first of them."""
    model.padding_plan = plan
    for _, linear in _linears(model):
        linear.fixed_rows = plan.fixed_rows[0] if plan.fixed_rows else None
    model.blocks.fuse()


def use_fixed_rows(model: GPT, name: str, rows: int) -> None:
    """Run the linears of this name, as `mlp_out`, at another of the plan's fixed row counts."""
    assert rows in model.padding_plan.fixed_rows
    for other, linear in _linears(model):
        if other == name:
            linear.fixed_rows = rows


def describe_padding(model: GPT) -> str:
    """Return the plan's name and the linears that deviate from it: `fixed_64, mlp_out 32`."""
    plan = model.padding_plan
    first = plan.fixed_rows[0] if plan.fixed_rows else None
    deviating = [
        f"{name} {linear.fixed_rows}"
        for name, linear in _linears(model)
        if linear.fixed_rows != first
    ]
    return ", ".join([plan.name, *dict.fromkeys(deviating)])


def _pack_for_triton(model: GPT) -> None:
    for module in model.modules():
        if isinstance(module, Linear):
            module.pack_for_triton()
        elif isinstance(module, Norm):
            module.triton = True
    # Every path computes logits by the kernel that the engine of the device launches.
    model.lm_head.is_head = True
    use_padding_plan(model, padding_plans(model)[0])


def _linears(model: GPT) -> Iterator[tuple[str, Linear]]:
    """Yield every linear and its name inside its block."""
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            yield path.rpartition(".")[2], module
