"""All transformer blocks in one kernel call, for paged attention and packed native weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptbatch.pipeline.kv_cache.paged import PagedAttention
from gptbatch.pipeline.model.config import Activation
from gptbatch.pipeline.model.linear import Linear

if TYPE_CHECKING:
    from gptbatch.pipeline.model.gpt import Block


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedBlocks:
    """The arguments of the kernel that do not change between calls.

    Attributes:
        weights: Packed weight and bias of ln_1, attn_qkv, attn_out, ln_2, mlp_in and mlp_out, block
            by block.
        layers: The layer of each block.
        scales: The attention scale of each block.
    """

    weights: list[Tensor]
    layers: list[int]
    scales: list[float]
    epsilon: float
    activation: Activation

    def __call__(
        self, x: Tensor, attention: PagedAttention, logits_indices: Tensor | None
    ) -> Tensor:
        """Run the blocks: x (N, C) -> (N, C), or (S, C) of the tokens logits_indices (S,)."""
        cache = attention.cache
        y: Tensor = torch.ops.gptbatch.transformer_blocks(
            x,
            self.weights,
            self.epsilon,
            self.activation,
            [cache.layers[layer] for layer in self.layers],
            self.scales,
            cache.block_table,
            attention.seq_indices,
            attention.positions,
            logits_indices,
        )
        return y


def fuse_blocks(blocks: Iterable[Block]) -> FusedBlocks | None:
    """Return the blocks as one kernel call; None where a weight is not packed for the kernel."""
    blocks = list(blocks)
    weights: list[Tensor] = []
    for block in blocks:
        packed = _packed_weights(block)
        if packed is None:
            return None
        weights += packed
    return FusedBlocks(
        weights=weights,
        layers=[block.layer for block in blocks],
        scales=[block.scale for block in blocks],
        epsilon=blocks[0].ln_1.eps,
        activation=blocks[0].mlp_in.activation,
    )


def _packed_weights(block: Block) -> list[Tensor] | None:
    weights: list[Tensor] = []
    for module in (
        block.ln_1,
        block.attn_qkv,
        block.attn_out,
        block.ln_2,
        block.mlp_in,
        block.mlp_out,
    ):
        weight = module.packed if isinstance(module, Linear) else module.weight
        if weight is None:
            return None
        weights += [weight, module.get_parameter("bias")]
    return weights
