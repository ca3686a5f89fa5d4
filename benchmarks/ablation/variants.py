"""The variants: how each optimization is turned off.

Three optimizations live inside the kernel that runs all blocks in one call. They are turned off in
a Python version of that kernel, and compared with this version ("blocks one by one").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from gptbatch.pipeline.engine import two_pass_sampling
from gptbatch.pipeline.engine.sampling import SampledToken, sample_tokens
from gptbatch.pipeline.kernels import build
from gptbatch.pipeline.kernels.huge_pages import HugePages
from gptbatch.pipeline.kv_cache.paged import PagedAttention
from gptbatch.pipeline.kv_cache.quantization import CacheDtype
from gptbatch.pipeline.model import linear
from gptbatch.pipeline.model.fused_blocks import FusedBlocks
from gptbatch.pipeline.model.gpt import GPT, BlockStack
from gptbatch.pipeline.model.linear import Linear, LinearKind
from gptbatch.pipeline.model.lm_head import make_two_pass_head
from gptbatch.pipeline.model.norm import Norm


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One optimization turned off, or on where it is off by default.

    Attributes:
        label: In the table.
        baseline: The variant that it is compared with.
        patch: Called in the worker before the model is made.
        adapt: Called with the model.
        applies: Returns whether the packed model uses the optimization at all.
        cache_dtype: Of the KV cache.
        is_extra: Turns something on; the speed-up is inverted.
    """

    label: str
    baseline: str = "all on"
    patch: Callable[[], None] = lambda: None
    adapt: Callable[[GPT], None] = lambda model: None
    applies: Callable[[GPT], bool] = lambda model: True
    cache_dtype: CacheDtype = "auto"
    is_extra: bool = False


def use_onednn_linears() -> None:
    """Pack linears for oneDNN; the blocks then run one by one."""
    original = linear.packed_kind

    def packed_kind(weight: Tensor, *, native: bool) -> LinearKind:
        return original(weight, native=False)

    linear.packed_kind = packed_kind


def restore_two_pass_head(model: GPT) -> None:
    """Make the two-pass head that only a native head gets."""

    class NativeHead:
        kind = "native"

    model.two_pass_head = make_two_pass_head(
        cast(Linear, NativeHead()), model.wte.weight, HugePages()
    )


def leave_weights_on_small_pages() -> None:
    """Pack each weight into memory of its own."""

    def pack(self: HugePages, weight: Tensor) -> Tensor:
        packed: Tensor = torch.ops.gptbatch.pack_weight(weight)
        return packed

    HugePages.pack = pack  # type: ignore[method-assign]  # a patch


def drop_two_pass_head(model: GPT) -> None:
    """Compute all logits in one pass."""
    model.two_pass_head = None


def build_without_prefetch() -> None:
    """Build kernels whose prefetch instructions are left out."""
    original = build.compile_flags
    build.compile_flags = lambda: [*original(), "-D__builtin_prefetch(...)="]


def compute_all_of_the_last_block() -> None:
    """Run the last block for all tokens, not only for those that need logits."""
    original = BlockStack.forward

    def forward(
        self: BlockStack, x: Tensor, attention: Any, logits_indices: Tensor | None = None
    ) -> Tensor:
        y = original(self, x, attention)
        return y if logits_indices is None else y[logits_indices]

    BlockStack.forward = forward  # type: ignore[method-assign]  # a patch


def sample_with_torch() -> None:
    """Sample by torch's operators."""

    def sample(*arguments: Any, native: bool) -> list[SampledToken]:
        return sample_tokens(*arguments, native=False)

    vars(two_pass_sampling)["sample_tokens"] = sample


def run_one_by_one(*, fuse_qkv: bool = True, native_norm: bool = True) -> Callable[[], None]:
    """Return a patch that runs the blocks operator by operator, as the kernel does in C++."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        if native_norm:
            y: Tensor = torch.ops.gptbatch.layer_norm(x, weight, bias, epsilon)
            return y
        return F.layer_norm(x, weight.shape, weight, bias, epsilon)

    def product(x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        y: Tensor = torch.ops.gptbatch.linear(x, weight, bias.numel(), bias, *rest)
        return y

    def attend(
        x: Tensor, qkv: Tensor, bias: Tensor, cache: Tensor, call: tuple[Any, ...]
    ) -> Tensor:
        y: Tensor
        heads = cache.shape[0]
        head_size = bias.numel() // (3 * heads)
        if fuse_qkv and torch.ops.gptbatch.runs_by_head(heads, head_size):
            y = torch.ops.gptbatch.qkv_paged_attention(x, qkv, bias, cache, *call)
            return y
        projected = product(x, qkv, bias, None, "none").view(len(x), heads, 3, head_size)
        y = torch.ops.gptbatch.paged_attention(projected.transpose(1, 2), cache, *call)
        return y

    def run(
        self: FusedBlocks, x: Tensor, attention: PagedAttention, logits_indices: Tensor | None
    ) -> Tensor:
        cache = attention.cache
        for index, (layer, scale) in enumerate(zip(self.layers, self.scales, strict=True)):
            count = len(self.weights) // len(self.layers)
            n1, b1, qkv, qkv_b, out, out_b, n2, b2, w_in, in_b, w_out, w_out_b = self.weights[
                index * count : (index + 1) * count
            ]
            call = (cache.block_table, attention.seq_indices, attention.positions, scale)
            normed = norm(x, n1, b1, self.epsilon)
            attended = attend(normed, qkv, qkv_b, cache.layers[layer], call)
            if logits_indices is not None and index == len(self.layers) - 1:
                x, attended = x[logits_indices], attended[logits_indices]
            x = product(attended, out, out_b, x, "none")
            inner = product(norm(x, n2, b2, self.epsilon), w_in, in_b, None, self.activation)
            x = product(inner, w_out, w_out_b, x, "none")
        return x

    def patch() -> None:
        FusedBlocks.__call__ = run  # type: ignore[method-assign]  # a patch
        if not native_norm:
            # A patch of the norms outside of fused blocks.
            Norm.forward = torch.nn.LayerNorm.forward  # type: ignore[method-assign, assignment]

    return patch


def has_fused_blocks(model: GPT) -> bool:
    """Return whether all blocks run in one kernel call."""
    return model.blocks.fused is not None


def has_fused_qkv(model: GPT) -> bool:
    """Return whether the kernel fuses projection and attention of this model."""
    config = model.config
    return has_fused_blocks(model) and bool(
        torch.ops.gptbatch.runs_by_head(config.n_head, config.head_size)
    )


def has_two_pass_head(model: GPT) -> bool:
    """Return whether the head runs in two passes."""
    return model.two_pass_head is not None


ONE_BY_ONE = "blocks one by one"
VARIANTS = {
    "all on": Variant(label="all on"),
    "nothing": Variant(label="nothing (the noise of the measurement)"),
    "linears": Variant(
        label="C++ linears, against oneDNN's (and blocks one by one)",
        patch=use_onednn_linears,
        adapt=restore_two_pass_head,
    ),
    ONE_BY_ONE: Variant(
        label="all blocks in one kernel call", patch=run_one_by_one(), applies=has_fused_blocks
    ),
    "qkv": Variant(
        label="QKV projection and attention in one kernel",
        baseline=ONE_BY_ONE,
        patch=run_one_by_one(fuse_qkv=False),
        applies=has_fused_qkv,
    ),
    "norm": Variant(
        label="layer norm kernel, against torch's",
        baseline=ONE_BY_ONE,
        patch=run_one_by_one(native_norm=False),
    ),
    "huge pages": Variant(label="weights on huge pages", patch=leave_weights_on_small_pages),
    "prefetch": Variant(label="software prefetch", patch=build_without_prefetch),
    "two-pass": Variant(
        label="two-pass LM head", adapt=drop_two_pass_head, applies=has_two_pass_head
    ),
    "last block": Variant(
        label="last block only for tokens that need logits", patch=compute_all_of_the_last_block
    ),
    "sampler": Variant(label="sampling kernel, against torch", patch=sample_with_torch),
    "int8": Variant(label="int8 KV cache (off by default)", cache_dtype="int8", is_extra=True),
}
