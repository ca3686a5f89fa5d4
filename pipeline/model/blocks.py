"""The blocks of the network: masked self-attention and an MLP, each after a norm and added to what comes in (pre-norm GPT-2).

Knows: tokens, as rows of (N, C), and the layer that a block is. Does not know: sequences, embeddings, the head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptbatch.pipeline.kv_cache.interface import Attention
from gptbatch.pipeline.kv_cache.paged import PagedAttention
from gptbatch.pipeline.model.config import Activation, GPTConfig
from gptbatch.pipeline.model.linear import Linear, Projection
from gptbatch.pipeline.model.norm import Norm


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        width = config.n_embd
        self.layer, self.scale = layer, config.attention_scale(layer)
        self.ln_1 = Norm(width, config.layer_norm_epsilon)
        self.attn_qkv = Projection(width, config.n_head)
        self.attn_out = Linear(width, width)
        self.ln_2 = Norm(width, config.layer_norm_epsilon)
        self.mlp_in = Linear(width, config.n_inner, activation=config.activation)
        self.mlp_out = Linear(config.n_inner, width)

    def forward(
        self, x: Tensor, attention: Attention, logits_indices: Tensor | None = None
    ) -> Tensor:
        """x (N, C) -> (N, C), or (S, C) of the tokens `logits_indices` (S,) alone: of the others nothing is computed after attention."""
        attended = attention(self.layer, self.attn_qkv(self.ln_1(x)), self.scale)
        if logits_indices is not None:
            x, attended = x[logits_indices], attended[logits_indices]
        x = self.attn_out(attended, residual=x)
        return self.mlp_out(self.mlp_in(self.ln_2(x)), residual=x)  # type: ignore[no-any-return]

    @property
    def packed(self) -> list[Tensor] | None:
        """The weights in the order in which gptbatch::transformer_blocks takes them; None where a linear has none that it takes."""
        weights: list[Tensor] = []
        for part in (self.ln_1, self.attn_qkv, self.attn_out, self.ln_2, self.mlp_in, self.mlp_out):
            weight = part.packed if isinstance(part, Linear) else part.weight
            if weight is None:
                return None
            weights += [weight, part.get_parameter("bias")]
        return weights


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gathered:
    """What gptbatch::transformer_blocks takes of the blocks: their weights in its order (transformer_blocks.cpp), and of each its layer and its scale."""

    weights: list[Tensor]
    layers: list[int]
    scales: list[float]
    epsilon: float
    activation: Activation


class BlockStack(nn.ModuleList):
    """BlockStack, one after the other.

    In one call of a kernel where attention is ragged, and the linears are laid out for our kernels in the network's own dtype. Their
    modules are then not called, and must not be replaced.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__(blocks)
        self._gathered: _Gathered | None = None
        self.gather()

    def forward(
        self, x: Tensor, attention: Attention, logits_indices: Tensor | None = None
    ) -> Tensor:
        """x (N, C) -> (N, C), or (S, C) of the tokens `logits_indices` (S,) alone: of the others the last block computes keys and values."""
        if self._gathered is not None and isinstance(attention, PagedAttention):
            return self._in_one_call(self._gathered, x, attention, logits_indices)
        *blocks, last = self
        for block in blocks:
            x = block(x, attention)
        return last(x, attention, logits_indices)  # type: ignore[no-any-return]

    def _in_one_call(
        self,
        gathered: _Gathered,
        x: Tensor,
        attention: PagedAttention,
        logits_indices: Tensor | None,
    ) -> Tensor:
        cache = attention.cache
        y: Tensor = torch.ops.gptbatch.transformer_blocks(
            x,
            gathered.weights,
            gathered.epsilon,
            gathered.activation,
            [cache.layers[layer] for layer in gathered.layers],
            gathered.scales,
            cache.table,
            attention.seq_indices,
            attention.positions,
            logits_indices,
        )
        return y

    def gather(self) -> None:
        """Look again for weights that the kernel takes; to be called when the linears have been packed, or run at other numbers of rows."""
        self._gathered = None
        blocks: list[Block] = []
        weights: list[Tensor] = []
        for block in self:
            assert isinstance(block, Block)
            if (packed := block.packed) is None:
                return
            blocks.append(block)
            weights += packed
        self._gathered = _Gathered(
            weights=weights,
            layers=[block.layer for block in blocks],
            scales=[block.scale for block in blocks],
            epsilon=blocks[0].ln_1.eps,
            activation=blocks[0].mlp_in.activation,
        )

    @property
    def in_one_call(self) -> bool:
        """Whether the kernel computes them where attention is ragged."""
        return self._gathered is not None
